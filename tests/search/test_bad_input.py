"""Bad input to a search: what is refused, when, and in which words; and what is carried out all the same."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.needs import extra

extra("optuna")
extra("torch_pruning")
extra("sklearn")

import laconic as lc
from laconic.disk.store import amend_manifest
from laconic.errors import DataError, OutputError, SchemeError, SearchError, SurgeryError
from laconic.host.progress import Log
from laconic.measure.candidate import Candidate
from laconic.measure.objectives import flops, stored_bytes
from laconic.methods.rtn import RTN
from laconic.recover import Direct, FineTune
from laconic.search import Found, SearchOptions, search_task
from laconic.weights import installed
from tests.recover.nets import seeded, trained
from tests.search.digits import Branching, Problem, run

pytestmark = pytest.mark.usefixtures("no_pictures")


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "nothing free": (
        SearchError,
        r"Magnitude\(sparsity=0.5\): nothing to search; leave a hyper-parameter open",
        {"scheme": "Magnitude(0.5)"},
    ),
    "reversed bounds": (SchemeError, "the lower one first, got 0.9 and 0.1", {"scheme": "Magnitude(Free(0.9, 0.1))"}),
    "bounds outside": (
        SchemeError,
        r"sparsity = 1.9\d*, which Free\(0, 2\) allows",
        {"scheme": "Magnitude(Free(0, 2))"},
    ),
    "a choice that does not fit": (
        SchemeError,
        r"rank = 99, which Free\(.*allows: 1: rank 99",
        {"scheme": "LowRank(rank=Free(choices=(2, 99)))"},
    ),
    "a floor above the original": (
        SearchError,
        r"the floor 0.99\d* is above the score of the original, 0.9",
        {"keep": lc.at_least(0.999)},
    ),
    "no floor": (SearchError, r"expected within\(margin\) or at_least\(score\), got 0.02", {"keep": 0.02}),
    "no goal": (SearchError, r"expected Maximize\(...\) or Minimize\(...\)", {"objective": stored_bytes}),
    "no goals": (SearchError, "or several, got \\[\\]", {"objective": []}),
    "one goal twice": (
        SearchError,
        "expected different names",
        {"objective": [lc.Minimize(flops), lc.Maximize(flops)]},
    ),
    "an objective of NaN": (
        SearchError,
        "objective odd: expected a finite number, got nan",
        {"objective": lc.Minimize(lambda c: math.nan, "odd")},
    ),
    "no recovery": (SearchError, r"recover: expected LC\(...\)", {"recover": "LC()"}),
    "no trials": (SearchError, "at least one trial, got trials=0", {"trials": 0}),
    "no minutes": (SearchError, "minutes above 0", {"minutes": 0.0}),
    "no share": (SearchError, "warm_share: expected a share", {"warm_share": 1.5}),
    "no heartbeat": (SearchError, "heartbeat: expected seconds from 1", {"heartbeat": 0}),
    "an unknown sampler": (SearchError, "two-sided, drucb, gp or tpe, got 'bayes'", {"sampler": "bayes"}),
    "a sampler for one variable": (
        SearchError,
        "drucb searches one real number",
        {"scheme": "RTN(Free(2, 8, integer=True), 'channel')", "sampler": "drucb"},
    ),
    "a storage that is away": (
        SearchError,
        r"nobody:\*\*\*@127.0.0.1",
        {"storage": "postgresql://nobody:secret@127.0.0.1:1/db"},
    ),
    "a scheme that is none": (
        SchemeError,
        "unknown method 'Magnitud'.*did you mean 'Magnitude'",
        {"scheme": "Magnitud(Free(0, 1))"},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str, problem: Problem, tmp_path: Path) -> None:
    kind, message, changes = BAD[case]
    with pytest.raises(kind, match=message):
        run(problem, tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists() or list((tmp_path / "s").iterdir()) == []


def test_an_objective_that_fails_later_is_named(problem: Problem, tmp_path: Path) -> None:
    """A finite number for the original, NaN for what is compressed; mended, the search goes on."""

    def density(candidate: Candidate) -> float:
        left = float((candidate.network[8].weight != 0).float().mean())
        return left if left == 1 else math.nan

    with pytest.raises(SearchError, match="objective density: expected a finite number, got nan"):
        run(
            problem,
            tmp_path / "s",
            "Magnitude(Free(0.1, 0.5))",
            recover=Direct(2),
            objective=lc.Minimize(density),
            trials=1,
        )

    def mended(candidate: Candidate) -> float:
        return float((candidate.network[8].weight != 0).float().mean())

    goal = lc.Minimize(mended, "density")
    found = run(
        problem, tmp_path / "s", "Magnitude(Free(0.1, 0.5))", recover=Direct(2), objective=goal, trials=1, resume=True
    )
    failed, done = found.result["trials"]
    assert (failed["state"], done["state"]) == ("fail", "complete")
    assert failed["values"] == done["values"]
    assert "objective density" in failed["failure"]


def test_splits_that_share_samples(problem: Problem, tmp_path: Path) -> None:
    (x, y), *_ = problem[1].validation
    for name in ("train", "test"):
        shared = [(torch.cat([torch.rand(3, 8, 8), x[7:8]]), torch.cat([y[:3], y[7:8]]))]
        with pytest.raises(
            DataError, match=r"example \d of \w+ is example \d of \w+: the splits may not share samples"
        ):
            run(problem, tmp_path / "s", **{name: shared})
    assert not (tmp_path / "s").exists()


def test_a_score_that_is_not_deterministic(problem: Problem, tmp_path: Path) -> None:
    """It is found by scoring the original twice, reported, and heeded by the rule: a sample just below the floor closes nothing."""
    wheel = random.Random(3)

    def unsteady(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (output.argmax(1) == batch[1]).float() + wheel.uniform(-0.01, 0.01)

    found = run(
        problem, tmp_path / "s", "Magnitude(Free(0.1, 0.9))", recover=Direct(2), score=unsteady, keep=lc.within(0.1)
    )
    assert 0 < found.result["noise"] < 0.02
    assert f"differs by {found.result['noise']:.3g} when measured twice" in found.result["notes"][0]
    facts = found.study.user_attrs["facts"]
    assert facts["noise"] == found.result["noise"]
    steady = run(
        problem,
        tmp_path / "s",
        "Magnitude(Free(0.1, 0.9))",
        recover=Direct(2),
        keep=lc.within(0.1),
        score=_harder,
        resume=True,
    )
    assert steady.result["noise"] == found.result["noise"]
    assert "differs by" in steady.result["notes"][0]
    assert "the latter holds. Is it the same model, on the same data?" in steady.result["notes"][1]


def _harder(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (output.argmax(1) == batch[1]).float() - 0.05


def test_folder_and_storage_belong_together(problem: Problem, tmp_path: Path) -> None:
    options = {"scheme": "Magnitude(Free(0.1, 0.9))", "recover": Direct(2), "keep": lc.within(0.2), "trials": 1}
    run(problem, tmp_path / "one", storage=tmp_path / "shared.db", **options)
    with pytest.raises(OutputError, match=r"two: does not hold the models of trials \[1\]"):
        run(problem, tmp_path / "two", storage=tmp_path / "shared.db", resume=True, **options)
    with pytest.raises(OutputError, match="one: holds the trials of another search"):
        run(problem, tmp_path / "one", storage=tmp_path / "other.db", **options)
    amend_manifest(tmp_path / "one" / "trials" / "000" / "model", {"scheme": "Wanda(Free(0.1, 0.9))"})
    with pytest.raises(SearchError, match="this is not trial 1 of this search"):
        run(problem, tmp_path / "one", storage=tmp_path / "shared.db", resume=True, **options)


class Whole(RTN):
    """A grid for 72 columns and no others."""

    def expected_bits(self, shape: tuple[int, int]) -> float:
        if shape[1] != 72:
            raise SchemeError("72 columns only")
        return super().expected_bits(shape)


def test_widths_that_the_scheme_cannot_encode(problem: Problem, tmp_path: Path) -> None:
    cut = lc.FilterPrune(lc.Free(0.45, 0.55))
    scheme = [("1", cut), ("4", cut >> Whole(8)), ("*", lc.Keep())]
    with pytest.raises(SchemeError, match="72 columns only.* channels were cut: choose what fits any width"):
        run(problem, tmp_path / "s", scheme, recover=Direct(2), trials=1)


def test_a_run_that_diverges_is_a_trial_that_misses_the_floor(problem: Problem, tmp_path: Path) -> None:
    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1]) * (math.nan if output.requires_grad else 1)

    with pytest.raises(SearchError, match="training diverged in every trial"):
        run(problem, tmp_path / "s", "Magnitude(Free(0.1, 0.9))", loss=loss, trials=2)
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["trials"]
    assert [row["score"] for row in rows] == [None, None]
    assert rows[1]["values"]["sparsity"] < rows[0]["values"]["sparsity"]
    assert "training diverged" in rows[0]["notes"][0]


def test_networks_that_cannot_be_traced(problem: Problem, tmp_path: Path) -> None:
    task = replace(problem[1], test=None)
    net = trained(seeded(Branching), task.train, 60)
    goal = (lc.Minimize(flops),)
    scheme = "FilterPrune(Free(0.1, 0.6), scale='layer')"

    def carry_out(out: Path, **options: Any) -> Found:
        return search_task(
            net,
            scheme,
            task,
            goal,
            lc.within(0.3),
            FineTune(8, checks=1),
            out,
            SearchOptions(trials=2, **options),
            Log(),
        )

    with pytest.raises(
        SurgeryError, match=r"Tensor\.__bool__.*; masks without thinning still work: --no-thin .*thin=False"
    ):
        carry_out(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    found = carry_out(tmp_path / "s", thin=False)
    weights = installed(found.model)
    assert {name: tuple(w().shape) for name, w in weights.items()} == {
        "first.weight": (8, 9),
        "second.weight": (8, 72),
        "last.weight": (10, 128),
    }
    zero = {name: int((w() == 0).all(1).sum()) for name, w in weights.items()}
    assert zero.pop("last.weight") == 0
    assert all(0 < count < 8 for count in zero.values())
    assert found.result["best"]["objective"] < found.result["reference"]["objective"]
    assert "rows are only set to zero, each for itself" in found.result["notes"][0]
    assert "still work" not in found.result["notes"][0]


def test_recovery_masks_a_network_that_cannot_be_traced(problem: Problem) -> None:
    """It never thins, so nothing has to be traced; the notes say that rows go one by one."""
    compressed, found = lc.recover(
        seeded(Branching), "FilterPrune(0.5)", Direct(), train=problem[1].train, validation=problem[1].validation
    )
    assert "rows are only set to zero, each for itself" in found.notes[0]
    gone = sum(int((weight() == 0).all(1).sum()) * weight().shape[1] for weight in installed(compressed).values())
    assert abs(gone - 324) <= 36  # half of 8 x 9 + 8 x 72 entries, to within half a filter


def test_a_missing_optuna_says_what_to_install(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = sys.modules["laconic.search"]
    for name in ("outcome", "study", "storage", "samplers"):
        monkeypatch.delitem(
            sys.modules, f"laconic.search.{name}", raising=False
        )  # there if an earlier test imported it
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"pip install 'laconic\[search\]'"):
        run(problem, tmp_path / "s")
