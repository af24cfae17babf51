"""The page of a search: its figures are those of the JSON, it needs nothing else, and parts that are missing are left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from laconic.search.result import publish
from laconic.show.search_page import outcome_rows, render_search, search_summary, shown, write_search_page
from laconic.show.search_pictures import searched_number
from tests.test_report import Page, hostile

X = [i / 20 for i in range(1, 20)]


def trial(number: int, sparsity: float, **changes: Any) -> dict[str, Any]:
    score = 0.9 - 0.5 * sparsity**4
    posterior = {
        "x": X,
        "mean": [0.9 - 0.5 * x**4 for x in X],
        "std": [abs(x - sparsity) / 5 for x in X],
        "acquisition": X,
    }
    curve = [
        {"step": j, "minibatches": 40 * j, "mu": 1e-3, "loss": 1.0, "distance": 2.0, "score": score - 0.1 / (j + 1)}
        for j in range(4)
    ]
    made = {
        "number": number, "stage": 1 if number < 4 else 2, "values": {"sparsity": sparsity}, "score": score, "direct_score": score - 0.3,
        "objective": 1000 + 500 * sparsity, "domain": [0.0, 1.0], "posterior": posterior if number in (1, 5) else None,
        "warm_from": number - 1 if number else None, "stopped_early": number == 2, "minibatches": 120, "cold_minibatches": 400,
        "seconds": 9.5, "curve": curve, "state": "complete",
    }  # fmt: skip
    return made | changes


def result(**changes: Any) -> dict[str, Any]:
    layer = {
        "entries_before": 2304,
        "entries_after": 1152,
        "nonzero": 1152,
        "macs_before": 2e6,
        "macs_after": 1e6,
        "ms_before": 0.2,
        "ms_after": 0.1,
    }
    made = {
        "scheme": "FilterPrune(sparsity=Free(0, 1))", "objective": {"name": "throughput", "direction": "maximize"}, "floor": 0.87, "margin": 0.02,
        "reference": {"score": 0.89, "test_score": 0.88, "objective": 1000.0, "stored_bytes": 1_000_000, "parameters": 270_000},
        "free": {"sparsity": {"low": 0.0, "high": 1.0}},
        "trials": [trial(i, s) for i, s in enumerate((0.5, 0.9, 0.7, 0.45, 0.48, 0.49, 0.47))], "best": {
            "trial": 0, "values": {"sparsity": 0.5}, "score": 0.87, "test_score": 0.865, "direct_test_score": 0.4, "objective": 1250.0,
            "stored_bytes": 250_000, "nonzero_bytes": 200_000, "parameters": 90_000, "ratio": 4.0, "nonzero_ratio": 5.0,
        },
        "layers": [layer | {"name": f"layer{i}.conv"} for i in range(3)], "cost": {"minibatches": 840, "cold_minibatches": 2800},
        "noise": 0.0, "seconds": 66.0, "seed": 7, "command": "laconic search", "versions": {"torch": "2"}, "machine": {"threads": 2},
        "notes": ["a note"], "data": {"validation": "5,000 images"},
    }  # fmt: skip
    return made | changes


def pictures(page: Page) -> int:
    return sum(tag == "svg" for tag, _ in page.tags)


def test_the_files_hold_the_result(tmp_path: Path) -> None:
    publish(tmp_path, result(), write_search_page)
    assert json.loads((tmp_path / "search.json").read_text()) == result()
    assert pictures(Page((tmp_path / "search.html").read_text())) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["search.html", "search.json"]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_search(result()))


def test_the_page_shows_the_figures(page: Page) -> None:
    assert pictures(page) == 4, "profile, posteriors, learning curves, layers"
    assert page.row("score on validation data")[1:] == ["0.8900", f"{0.9 - 0.5**5 - 0.3:.4f}", "0.8700", "-0.0200"]
    assert page.row("score on test data")[1:] == ["0.8800", "0.4000", "0.8650", "-0.0150"]
    assert page.row("throughput")[1:] == ["1,000 / s", "", "1,250 / s", "1.25 x"]
    assert page.row("bytes on disk")[1:] == ["1.00 MB", "", "250.00 kB", "4.00 x"]
    assert page.row("bytes of non-zero parameters")[3:] == ["200.00 kB", "5.00 x"]
    assert page.row("parameters of the network that runs")[1:] == ["270 k", "", "90 k", "3.00 x"]
    trials = page.table("minibatches")
    assert [row[0] for row in trials] == [str(i) for i in range(1, 8)]
    assert trials[2][2:6] == [
        "sparsity 0.7",
        f"{0.9 - 0.5 * 0.7**4:.4f}",
        f"{0.9 - 0.5 * 0.7**4 - 0.3:.4f}",
        "1,350 / s",
    ]
    assert trials[2][-1] == "warm from 2, stopped early"
    assert [row[0] for row in page.table("MACs")] == ["layer0.conv", "layer1.conv", "layer2.conv"]
    text = "".join(page.text)
    assert "840 minibatches of training in 7 trials" in text
    assert "3.33 times" in text
    assert page.row("seed") == ["seed", "7"]
    assert page.row("validation data") == ["validation data", "5,000 images"]


def test_the_page_needs_nothing_else(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "img")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href", "data") or str(value).startswith("#")


def test_hostile_names_are_shown_and_do_nothing() -> None:
    made = result(
        scheme=hostile("scheme"), command=hostile("command"), notes=[hostile("note")], free={hostile("free"): {"low": 0.0, "high": 1.0}},
        objective={"name": hostile("goal") + " $\\frac$", "direction": "minimize"}, data={hostile("split"): hostile("source")},
        versions={hostile("package"): hostile("version")},
    )  # fmt: skip
    name = hostile("free")
    made["trials"] = [t | {"values": {name: t["values"]["sparsity"]}, "state": "complete"} for t in made["trials"]]
    made["trials"].append(trial(9, 0.5, values={name: 0.5}, state=hostile("state")))
    made["best"] = made["best"] | {"values": {name: 0.5}}
    made["layers"] = [made["layers"][0] | {"name": hostile("layer") + " $x$"}]
    page = Page(render_search(made))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert pictures(page) == 4
    text = "".join(page.text)
    for field in (
        "scheme",
        "command",
        "note",
        "free",
        "goal",
        "split",
        "source",
        "package",
        "version",
        "state",
        "layer",
    ):
        assert hostile(field) in text, field


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"layers": []}, 3),
        ({"layers": None, "cost": None, "notes": None, "versions": {}, "machine": {}, "command": ""}, 3),
        ({"trials": [trial(0, 0.5)]}, 3),
        ({"trials": [trial(0, 0.5, curve=[], direct_score=None, domain=None)]}, 2),
        ({"trials": [trial(i, 0.4 + i / 10, posterior=None) for i in range(3)]}, 3),
        ({"trials": [], "best": None, "layers": []}, 0),
        ({"best": None}, 4),
        ({"reference": {"score": 0.89, "objective": None}}, 4),
        (
            {
                "trials": [
                    trial(0, 0.5),
                    trial(
                        1, 0.6, state="failed", score=None, objective=None, direct_score=None, curve=[], posterior=None
                    ),
                ]
            },
            3,
        ),
    ],
)
def test_parts_that_are_missing_are_left_out(changes: dict[str, Any], count: int) -> None:
    made = result(**changes)
    page = Page(render_search(made))
    assert pictures(page) == count
    assert len(page.table("minibatches")) == len(made["trials"])
    assert len(search_summary(made)) >= 1


def test_no_trial_reached_the_level_set() -> None:
    made = result(best=None)
    assert "no trial reached the level set 0.8700" in "".join(Page(render_search(made)).text)
    assert outcome_rows(made) == []
    assert search_summary(made)[0] == ("chosen", "none: no trial reached the level set 0.8700")


def test_the_summary_for_a_terminal() -> None:
    lines = dict(search_summary(result()))
    assert lines["chosen"] == "sparsity 0.5 (trial 1 of 7)"
    assert lines["throughput"] == "1,250 / s from 1,000 / s (1.25 x)"
    assert lines["score on test data"] == "0.8650 from 0.8800 (-0.0150), compressed directly 0.4000"
    assert lines["cost"].startswith("840 minibatches")


def test_several_objectives_and_parameters() -> None:
    goals = [{"name": "stored_bytes", "direction": "minimize"}, {"name": "macs", "direction": "minimize"}]
    free = {
        "sparsity": {"low": 0.0, "high": 1.0},
        "bits": {"choices": [2, 4, 8]},
        "rate": {"low": 1e-4, "high": 0.1, "log": True},
    }
    trials = [
        trial(
            i,
            s,
            objective=[1e5 * (1 - s), 1e7 * s],
            values={"sparsity": s, "bits": (2, 4, 8)[i % 3], "rate": 10.0**-i},
            posterior=None,
        )
        for i, s in enumerate((0.3, 0.5, 0.7, 0.9))
    ]
    made = result(objective=goals, free=free, trials=trials, pareto=[0, 1], layers=[])
    made["reference"] |= {"objective": [1e5, 1e7]}
    made["best"] |= {"values": trials[0]["values"], "objective": [7e4, 3e6]}
    page = Page(render_search(made))
    assert pictures(page) == 3, "scatter, Pareto front, learning curves"
    assert page.row("stored_bytes")[1:] == ["100.00 kB", "", "70.00 kB", "1.43 x"]
    assert page.row("macs")[1:] == ["10 M", "", "3 M", "3.33 x"]
    assert page.table("minibatches")[1][5:7] == ["50.00 kB", "5 M"]
    assert searched_number(made) is None


def test_one_choice_alone_is_a_scatter() -> None:
    trials = [trial(i, 0.5, values={"block": (i, i)}, posterior=None) for i in (1, 2)]
    made = result(free={"block": {"choices": [(1, 1), (2, 2)]}}, trials=trials, best=None, layers=[])
    assert pictures(Page(render_search(made))) == 2
    assert pictures(Page(render_search(json.loads(json.dumps(made))))) == 2, "also as read back from JSON"


def test_figures_as_people_read_them() -> None:
    assert shown("latency", 0.0123) == "12.3 ms"
    assert shown("throughput", 1234.5) == "1,234 / s"
    assert shown("macs", 4.1e7) == "41 M"
    assert shown("parameters", 900) == "900"
    assert shown("energy", float("nan")) == "-"
    assert shown("energy", 0.123456) == "0.1235"
