"""The plan of a model: what every site gets: the scheme's method with tiles that fit, what a whole file needs beside it, and what the user keeps."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.engine.coverage import coverage, coverage_line
from laconic.engine.plan import Plan, plan_of
from laconic.engine.resolve import resolve
from laconic.errors import CheckpointError, SchemeError
from laconic.methods.base import Method
from laconic.methods.fitting import difference, fitted
from laconic.methods.free import Free
from laconic.methods.hadamard import Hadamard
from laconic.methods.magnitude import Magnitude
from laconic.methods.rtn import RTN
from laconic.model.sites import Slot, find_slots
from laconic.scheme.filling import fix
from laconic.scheme.keep import Keep
from laconic.scheme.text import Choice, parse
from laconic.weights import View


def slot(name: str, rows: int, columns: int, role: str = "body") -> Slot:
    return Slot(name, ((name, "weight"),), View((rows, columns)), role=role)


BODY = [
    slot(f"model.layers.{i}.mlp.{kind}_proj", *shape)
    for i in range(2)
    for kind, shape in (("up", (96, 64)), ("down", (64, 96)))
]
OUTSIDE = [
    Slot("model.embed_tokens", (("model.embed_tokens", "weight"), ("lm_head", "weight")), View((320, 64)), role="embedding"),
    slot("score", 300, 64, "head"), slot("model.layers.0.mlp.gate", 8, 64, "router"),
]  # fmt: skip
SMALL = [slot("model.layers.0.tiny", 8, 16)]
SLOTS = OUTSIDE + BODY + SMALL


def chosen_by_name(scheme: str, **options: object) -> dict[str, Choice]:
    plan = resolve(parse(scheme), SLOTS, **options)  # type: ignore[arg-type]
    return {slot.name: plan.methods[slot] if slot in plan.methods else Keep(plan.kept[slot]) for slot in SLOTS}


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("GPTQ(rate=3.25)", 6), ("RTN(bits=4, group=32)", 6), ("RTN(bits=7, group='channel')", 7), ("RTN(bits=8, group=64)", 8),
        ("Magnitude(0.5)", None), ("Cast('float16')", None), ("Keep()", None),
    ],
)  # fmt: skip
def test_one_method_is_made_a_whole_file(scheme: str, bits: int | None) -> None:
    chosen = chosen_by_name(scheme, whole_file=True)
    expected = Keep() if bits is None else RTN(bits=bits, group="channel", codec="ans")
    assert chosen["model.embed_tokens"] == chosen["score"] == expected
    assert all(chosen[s.name] == parse(scheme) for s in BODY)
    if scheme != "Keep()":
        assert chosen["model.layers.0.mlp.gate"].reason == "router"  # type: ignore[attr-defined]
        assert chosen["model.layers.0.tiny"].reason == "small: under 2048 entries"  # type: ignore[attr-defined]


def test_training_and_searches_leave_what_is_outside_the_body() -> None:
    assert list(resolve(parse("GPTQ(rate=3.25)"), SLOTS).kept) == OUTSIDE


def test_nothing_is_left_out_of_plans_and_functions() -> None:
    for scheme in ("[('*', RTN(4, 'channel'))]", "RTN(4, 'channel') if rows > 0 else Keep()"):
        assert set(chosen_by_name(scheme, whole_file=True).values()) == {RTN(4, "channel")}


def test_where_small_matrices_are_what_there_is_they_are_compressed() -> None:
    slots = [slot("a", 8, 16), slot("b", 40, 40), slot("head", 4, 16, "head")]
    assert not resolve(RTN(4), slots, whole_file=True).kept


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        ("lm_head", ["model.embed_tokens"]), (["*.down_proj"], [s.name for s in BODY if "down" in s.name]), ("embedding", ["model.embed_tokens"]),
        (["head", "up_proj"], ["score", *(s.name for s in BODY if "up" in s.name)]), ("layers.1", [s.name for s in BODY if ".1." in s.name]),
        (["*.layers.[0]*"], [s.name for s in SLOTS if "layers.0" in s.name]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["RTN(4)", "[('*', RTN(4))]", "RTN(4) if rows > 0 else RTN(3)"])
def test_patterns_keep_what_they_match_beside_any_scheme(scheme: str, keep: str | list[str], names: list[str]) -> None:
    without, chosen = chosen_by_name(scheme, whole_file=True), chosen_by_name(scheme, whole_file=True, keep=keep)
    for name in names:
        assert chosen[name] == Keep()
        assert "keep '" in chosen[name].reason  # type: ignore[attr-defined]
    assert all(method == without[name] for name, method in chosen.items() if name not in names)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("*.dwn_proj", r"keep '\*.dwn_proj' matches no site; did you mean '\*.down_proj'"), ("rooter", "did you mean 'router'"),
        ("emb", "matches no site"), ("*", "nothing is left to compress"), ([3], "expected patterns"), ("layer", "did you mean 'layers'"),
    ],
)  # fmt: skip
def test_patterns_that_keep_nothing_or_everything_are_refused(keep: object, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        chosen_by_name("RTN(4)", whole_file=True, keep=keep)


@pytest.mark.parametrize(
    ("scheme", "columns", "fits", "text"),
    [
        ("RTN(bits=4, group=64)", 96, "RTN(bits=4, group=32)", "group 32 instead of 64"),
        ("RTN(bits=4, group=64)", 128, "RTN(bits=4, group=64)", ""),
        ("GPTQ(bits=3, group=128)", 100, "GPTQ(bits=3, group='channel')", "group channel instead of 128"),
        ("GPTQ(rate=3.0, group=128)", 100, "GPTQ(rate=3.0, group=128)", ""),  # no groups at a rate
        ("AWQ(bits=4, group=64)", 48, "AWQ(bits=4, group=16)", "group 16 instead of 64"),
        ("SpQR(bits=3)", 24, "SpQR(bits=3, group=8)", "group 8 instead of 16"),
        ("SmoothQuant(group=64)", 27, "SmoothQuant(group='channel')", "group channel instead of 64"),
        ("Hadamard(method=GPTQ(bits=2, group=64))", 96, "Hadamard(method=GPTQ(bits=2, group=32))", "group 32 instead of 64"),
        ("Magnitude(0.5) >> RTN(4, 64)", 96, "Magnitude(0.5) >> RTN(4, 32)", "group 32 instead of 64"),
        ("GPTQ(4, 64) + EoRA(rank=4, factors=RTN(4, 16))", 96, "GPTQ(4, 32) + EoRA(rank=4, factors=RTN(4, 'channel'))",
         "group 32 instead of 64, group channel instead of 16"),
        ("KMeans(bits=8, dimension=4)", 27, "KMeans(bits=2)", "bits 2 instead of 8, dimension 1 instead of 4"),
        ("GPTVQ(bits=7, dimension=4)", 6, "GPTVQ(bits=4, dimension=2)", "bits 4 instead of 7, dimension 2 instead of 4"),
        ("KMeans(bits=4, rows=64)", 64, "KMeans(bits=4, rows=16)", "rows 16 instead of 64"),
        ("SparseGPT(pattern='2:4')", 6, "SparseGPT(pattern='1:2')", "pattern 1:2 instead of 2:4"),
        ("SparseGPT(pattern='2:4')", 27, "SparseGPT(pattern='2:4')", ""),  # which expected_bits refuses
    ],
)  # fmt: skip
def test_tiles_are_made_to_divide(scheme: str, columns: int, fits: str, text: str) -> None:
    asked = parse(scheme)
    assert isinstance(asked, Method)
    got = fitted(asked, (48, columns))
    assert got == parse(fits)
    assert difference(asked, got) == text


def test_a_fallback_is_in_the_notes_once_for_like_sites() -> None:
    notes: list[str] = []
    plan = resolve(RTN(4, 64), BODY, notes=notes)
    assert notes == ["model.layers.*.mlp.down_proj (2 sites): group 32 instead of 64: 96 columns"]
    assert set(plan.methods.values()) == {RTN(4, 64)}, (
        "one scheme stays one, whose sites share what it spreads over them"
    )


def test_what_cannot_be_treated_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        SchemeError,
        match=r"down_proj: group 64 does not divide 96 columns; .*\('\*.down_proj', RTN\(bits=4, group=32\)\), \('\*', ",
    ):
        resolve(RTN(4, 64), BODY, group="strict")
    with pytest.raises(SchemeError, match=r"odd: pattern '2:4' does not tile.*\('\*.odd', Keep\(\)\).*keep='\*.odd'"):
        resolve(parse("SparseGPT(pattern='2:4')"), [slot("a.odd", 64, 27)])
    with pytest.raises(SchemeError, match="expected 'fit' or 'strict'"):
        resolve(RTN(4), BODY, group="loose")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="RTN: bits should be int, got '4'"):
        resolve(RTN("4"), BODY)  # type: ignore[arg-type]


class Net(nn.Module):
    """A convolution whose 27 columns no group divides, a tower that is large, and things that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 96, 3)
        self.wide = nn.Linear(96, 96)
        self.up = nn.ConvTranspose2d(96, 4, 2)
        self.norm = nn.LayerNorm(96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.wide(self.stem(x).mean((2, 3))))
        return self.up(y[:, :, None, None]).flatten(1)


def test_a_module_is_compressed_with_tiles_that_fit_and_says_so() -> None:
    net = Net()
    before = copy.deepcopy(net)
    model, report = lc.compress(net, "RTN(bits=4, group=64)", keep="wide")
    assert report.notes == ["stem: group channel instead of 64: 27 columns"]
    assert [site["method"] for site in report.sites] == ["RTN(bits=4, group='channel')"]
    assert torch.equal(model.wide.weight, before.wide.weight)  # type: ignore[union-attr, arg-type]
    assert report["keep"] == ["wide"]
    total = sum(p.numel() for p in before.parameters())
    found = report["coverage"]
    assert found["parameters"] == total
    assert found["compressed"] == 96 * 27
    assert found["kept"] == {"keep 'wide'": 96 * 96}
    why = "of a layer that is not supported, ConvTranspose2d"
    assert found["untreated"] == [{"name": "up.weight", "shape": [96, 4, 2, 2], "entries": 96 * 16, "reason": why}]
    assert found["compressed"] + sum(found["kept"].values()) + found["vectors"] + 96 * 16 == total
    assert report.coverage.startswith(
        f"18.9 % of {total:,} parameters compressed; kept: keep 'wide' 67.1 %; not compressible: norms and biases "
    )
    with pytest.raises(SchemeError, match="stem: group 64 does not divide 27 columns"):
        lc.compress(before, "RTN(bits=4, group=64)", group="strict")


def test_a_threshold_over_the_model_is_one_where_groups_are_exchanged() -> None:
    """Sites whose group falls back are spread over together with the others."""
    net = Net()
    with torch.no_grad():
        net.stem.weight.mul_(100)
    model, _ = lc.compress(net, "Magnitude(0.5, scope='model') >> RTN(bits=8, group=64)")
    assert float((model.stem.weight == 0).float().mean()) < 0.2  # type: ignore[union-attr]


def test_coverage_names_a_few_and_counts_the_rest() -> None:
    net = nn.ModuleDict(
        {f"up{i}": nn.ConvTranspose2d(2, 2, 2, bias=False) for i in range(7)} | {"line": nn.Linear(64, 64, bias=False)}
    )
    line = coverage_line(coverage(net, Plan.of(dict.fromkeys(find_slots(net), RTN(4)))))
    assert line.count("ConvTranspose2d") == 4
    assert "3 more" in line


def test_the_command_line_keeps_and_refuses(tiny: Path, tmp_path: Path) -> None:
    base = ["compress", str(tiny), "--out", str(tmp_path / "out"), "--scheme", "RTN(4, 64)", "--no-evaluate"]
    done = CliRunner().invoke(app, [*base, "--keep", "embedding", "--keep", "*.v_proj", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (
        report["keep"]
        == ["embedding", "*.v_proj"]
        == json.loads((tmp_path / "out" / "laconic.json").read_text())["keep"]
    )
    assert not any("v_proj" in site["name"] or site["role"] == "embedding" for site in report["sites"])
    assert "keep 'embedding'" in report["coverage_line"]
    assert report["coverage_line"] in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")
    assert report["notes"] == ["model.layers.*.mlp.down_proj (3 sites): group 32 instead of 64: 96 columns"]
    done = CliRunner().invoke(app, [*base, "--overwrite", "--group", "strict"])
    assert done.exit_code == 2
    assert (tmp_path / "out" / "laconic.json").is_file()
    done = CliRunner().invoke(app, [*base, "--dry-run", "--json"])
    sites = {site["name"]: site for site in json.loads(done.stdout)["sites"]}
    assert sites["model.embed_tokens"]["method"] == "RTN(bits=6, group='channel', codec='ans')"
    assert sites["model.layers.0.mlp.down_proj"]["method"] == "RTN(bits=4, group=32)"


def test_a_plan_says_of_every_site_what_happens_to_it_in_the_models_order() -> None:
    plan = resolve(parse("[('score', Keep('of the task')), ('*.down_proj', RTN(4, 64)), ('*', GPTQ(rate=3.0))]"), SLOTS)
    assert plan.slots == tuple(SLOTS)
    assert {**plan.methods, **plan.kept}.keys() == set(SLOTS)
    assert plan.kept == {SLOTS[1]: "of the task"}
    assert list(plan.methods) == [s for s in SLOTS if s is not SLOTS[1]]
    assert plan.reads_data
    assert set(plan.allocations()) == {parse("GPTQ(rate=3.0)")}, "equal methods share one"
    down = [s for s in BODY if "down" in s.name]
    assert [plan.fitted().methods[s] for s in down] == [RTN(4, 32)] * 2
    assert list(plan.fitted().methods) == list(plan.methods)
    fewer = plan.keeping({down[0]: "not finite"})
    assert list(fewer.kept.items()) == [(SLOTS[1], "of the task"), (down[0], "not finite")]
    assert fewer.keeping({}) == fewer
    other = plan.having({s: RTN(2, 16) for s in down})
    assert [other.methods[s] for s in down] == [RTN(2, 16)] * 2
    assert [s for s in SLOTS if other.methods.get(s) != plan.methods.get(s)] == down
    assert not resolve(RTN(4, 32), BODY).reads_data
    assert list(resolve(parse("SmoothQuant()"), BODY).rounding) == BODY
    assert resolve(parse("FilterPrune(0.5)"), BODY).structures == BODY


@pytest.mark.parametrize(
    "scheme",
    [
        "RTN(4, 32)", "[('score', Keep('of the task')), ('*.1.*', Magnitude(0.5) >> (RTN(4, 32) >> KMeans(2))), ('*', RTN(3, 'channel'))]",
        "RTN(4, 32) if block < 1 else Keep()", "Cut(rows=(3, 5), columns=(0, 7)) >> GPTQ(bits=4, group='channel')", "Keep('all of it')",
        "Hadamard(GPTQ(bits=3, group=32), outputs=False) + EoRA(rank=4, factors=RTN(8, 'channel'))", "SpQR(bits=3, outliers=float('inf'))",
    ],
)  # fmt: skip
def test_a_plan_is_read_back_as_it_was_written(scheme: str) -> None:
    for plan in (resolve(parse(scheme), SLOTS, whole_file=True), resolve(parse(scheme), SLOTS).fitted()):
        told = json.loads(json.dumps(plan.to_json()))
        assert Plan.from_json(told, plan.slots) == plan
        assert plan_of({"plan": told}) == told


def test_like_sites_share_an_entry_and_others_have_their_own() -> None:
    plan = resolve(parse("[('*.1.mlp.up_proj', RTN(3, 32)), ('*.down_proj', RTN(4, 32)), ('*', Keep())]"), SLOTS)
    assert plan.to_json() == {
        "model.embed_tokens": "Keep()", "score": "Keep()", "model.layers.0.mlp.gate": "Keep()", "model.layers.0.mlp.up_proj": "Keep()",
        "model.layers.*.mlp.down_proj": "RTN(bits=4, group=32)", "model.layers.1.mlp.up_proj": "RTN(bits=3, group=32)",
        "model.layers.0.tiny": "Keep()",
    }  # fmt: skip
    many = [slot(str(i), 64, 64) for i in range(5)]
    told = Plan.of({s: RTN(3, 32) if s.name == "2" else RTN(4, 32) for s in many}).to_json()
    assert told == {"*": "RTN(bits=4, group=32)", "2": "RTN(bits=3, group=32)"}
    with pytest.raises(CheckpointError, match="says nothing of model.layers.0.tiny"):
        Plan.from_json(told, tuple(SMALL))
    assert plan_of({}) == {}
    for damaged in ([], {"a": 3}, "RTN()"):
        with pytest.raises(CheckpointError, match="damaged"):
            plan_of({"plan": damaged})


@pytest.mark.parametrize(
    "compose", [lambda m: m >> Keep(), lambda m: m + Keep(), lambda m: Keep() >> m, lambda m: Keep() + m]
)
@pytest.mark.parametrize("method", [RTN(4), parse("Magnitude(0.5)"), Keep(), parse("Magnitude(0.5) >> RTN(4)")])
def test_keep_is_no_part_of_a_composition(compose: Callable[[Any], Any], method: Any) -> None:
    with pytest.raises(SchemeError, match=r"Keep\(\).* cannot be part of a composition"):
        compose(method)


def test_keep_is_no_part_of_a_method_and_its_reason_is_a_text() -> None:
    free = Magnitude(0.5) >> Free(choices=(RTN(4), Keep()))  # type: ignore[operator]
    with pytest.raises(SchemeError, match="no method and cannot be part"):
        fix(free, {"second": Keep()})
    for text in ("Keep() + RTN(4)", "RTN(4) >> Keep()"):
        with pytest.raises(SchemeError, match="cannot be part of a composition"):
            parse(text)
    for text in ("Hadamard(Keep())", "LowRank(factors=Keep())"):
        with pytest.raises(SchemeError, match="should be Method.*, got Keep"):
            parse(text)
    with pytest.raises(SchemeError, match="method should be Method"):
        resolve(Hadamard(Keep()), BODY)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="reason should be str, got 3"):
        Keep(3)  # type: ignore[arg-type]
    assert not isinstance(Keep(), Method)


def test_the_plan_is_in_the_manifest_and_read_back(tiny: Path, text: Path, tmp_path: Path) -> None:
    """What was done to every site, whatever spread one number over them; `inspect` shows it."""
    scheme = "[('*.v_proj', Keep()), ('model.embed_tokens', RTN(8, 'channel')), ('*.mlp.*', GPTQ(rate=3.0)), ('*', RTN(4, 64))]"
    options: dict[str, Any] = {"data": str(text), "samples": 8, "length": 32, "evaluate": False}
    report = lc.compress(tiny, scheme, out=tmp_path / "out", **options)
    manifest = json.loads((tmp_path / "out" / "laconic.json").read_text())
    slots = tuple(find_slots(lc.load(tmp_path / "out")))
    plan = Plan.from_json(plan_of(manifest), slots)
    assert {s.name: repr(method) for s, method in plan.methods.items()} == {
        site["name"]: site["method"] for site in report.sites
    }
    assert len({method for s, method in plan.methods.items() if ".mlp." in s.name}) > 1, "each matrix at its own rate"
    assert all("v_proj" in s.name for s in plan.kept)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout)["plan"] == plan_of(manifest)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "model.layers.*.self_attn.v_proj" in shown
