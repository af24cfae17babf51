"""RoundInputs: ranges that are calibrated, conv nets and language models from training to disk and back, and what is refused before work."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.disk.store import MANIFEST, Compressed, write_manifest
from laconic.engine.reservoir import Reservoir
from laconic.engine.solve import matrix_of
from laconic.engine.statistics import Statistics
from laconic.engine.walk import parameters_of
from laconic.errors import CheckpointError, SchemeError
from laconic.methods.base import Method
from laconic.methods.ranges import calibrated
from laconic.model.sites import Site, Stats, find_slots
from laconic.pipeline import Options, compress_directory
from laconic.recover import Direct, FineTune, recover_task
from laconic.recover.prepare import convert, prepare
from laconic.scheme.filling import fix
from laconic.solvers.ranges import least_error
from laconic.weights import Dense, Inputs, Weight, bake, installed
from laconic.weights.inputs import round_input
from tests.conftest import make_site
from tests.recover.nets import mlp, seeded, task
from tests.recover.test_finetune import FAST

STATIC = "RoundInputs(RTN(8, 'channel'), granularity='tensor', symmetric=False, range='mse')"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10),
    )  # fmt: skip


def of(net: nn.Module) -> list[Inputs | None]:
    return [weight.inputs for weight in installed(net).values()]


# ranges


def squared_error(x: Tensor, inputs: Inputs) -> float:
    return float((round_input(x, inputs) - x).square().double().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_least_error_is_near_the_best_of_a_fine_grid(bits: int, symmetric: bool) -> None:
    """Normal values with a few outliers: shrinking pays, and a search of every end in steps of a 400th finds at most 2 % less."""
    x = random(4096) + (0.5 if not symmetric else 0.0)
    x[:4] = torch.tensor([9.0, -7.0, 8.0, -8.0])
    low, high = float(x.min()), float(x.max())
    found = squared_error(x, least_error(x, low, high, bits, symmetric))
    shares = torch.arange(1, 401, 1 if symmetric else 20) / 400
    pairs = [(s, s) for s in shares] if symmetric else [(a, b) for a in shares for b in shares]
    best = min(squared_error(x, Inputs.within(float(a) * low, float(b) * high, bits, symmetric)) for a, b in pairs)
    whole = squared_error(x, Inputs.within(low, high, bits, symmetric))
    assert found <= best * 1.02
    assert found <= whole
    assert bits == 8 or found < 0.7 * whole


def test_a_range_is_that_of_what_is_rounded() -> None:
    """Of x diag(c) where the weight has a column scale; and the zero point is the code of 0."""
    site = make_site()
    assert site.low is not None
    assert site.high is not None
    form = Inputs(8, "tensor", False)
    plain = Dense((48, 64), dtype="float32")
    found = calibrated(form, "minmax", site, plain)
    assert found == Inputs.within(float(site.low.min()), float(site.high.max()), 8, False)
    weight = lc.SmoothQuant(granularity="tensor", range="minmax")(site)
    c = weight.column_scale().flatten()  # type: ignore[attr-defined]
    largest = max(-float((site.low * c).min()), float((site.high * c).max()))
    assert weight.inputs == Inputs.within(-largest, largest)


@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_inputs_that_nothing_showed_stay_dynamic_and_say_so(range: Any) -> None:
    site, method = make_site(), lc.RoundInputs(lc.RTN(8), granularity="tensor", range=range)
    zeros = torch.zeros(1, 64)
    for given in (site.having(low=None, high=None, sample=None), site.having(low=zeros, high=zeros, sample=zeros)):
        site.notes.clear()
        assert method(given).inputs == Inputs(8, "tensor")
        assert any("a static range of its inputs is not known" in note for note in site.notes)


# statistics


class Three(nn.Module):
    """Two layers that are fed one tensor, and a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.gate = nn.Conv1d(8, 8, 3, groups=2, padding=1), nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.up(h).sum(-1) + self.gate(h).sum(-1)


def described(parts: int, wanted: Stats) -> dict[str, Site]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Three().requires_grad_(False)
    slots = find_slots(net)
    statistics = Statistics(parameters_of(net, slots), dict.fromkeys(slots, wanted))
    with torch.no_grad(), statistics.watch():
        for part in random(300, 8, 6, seed=1).chunk(parts):
            net(part)
    return {slot.name: statistics.describe(slot, matrix_of(net, slot), 0) for slot in slots}


def test_ranges_and_samples_are_those_of_all_inputs_however_they_come() -> None:
    whole, parts = (described(n, Stats.RANGE | Stats.SAMPLE) for n in (1, 7))
    x = random(300, 8, 6, seed=1)
    low = torch.stack([x[:, :4].amin((0, 2)), x[:, 4:].amin((0, 2))])
    seen = whole["conv"].low
    assert seen is not None
    torch.testing.assert_close(seen.unflatten(1, (4, 3)).amin(2), low)
    for name, site in whole.items():
        assert site.low is not None
        assert site.high is not None
        assert site.sample is not None
        assert torch.equal(site.low, parts[name].low)  # type: ignore[arg-type]
        assert torch.equal(site.high, parts[name].high)  # type: ignore[arg-type]
        assert bool((site.sample >= site.low.amin(0)).all())
    assert torch.equal(whole["up"].sample, parts["up"].sample)  # type: ignore[arg-type]
    assert whole["up"].sample is whole["gate"].sample, "slots that are fed one tensor share it"


def test_a_reservoir_is_an_even_sample() -> None:
    whole, parts = Reservoir(512, torch.device("cpu")), Reservoir(512, torch.device("cpu"))
    x = torch.arange(6000.0).unsqueeze(1).expand(-1, 512)
    whole.add(x.unsqueeze(0))
    for part in x.split(700):
        parts.add(part.unsqueeze(0))
    assert whole.rows.shape == (512, 512)
    assert torch.equal(whole.rows, parts.rows)
    numbers = whole.rows[:, 0]
    assert len(numbers.unique()) == 512
    assert abs(float(numbers.mean()) - 3000) < 300, "four standard errors of the mean of 512 uniform draws"
    twin = parts.copy()
    for one in (parts, twin):
        one.add(-x.unsqueeze(0))
    assert torch.equal(parts.rows, twin.rows)
    assert int((twin.rows < 0).sum()) > 0


# whole models


@pytest.mark.parametrize(
    "scheme",
    [
        STATIC,
        "RoundInputs(GPTQ(4, 'channel'), 4, 'tensor', range='minmax')",
        "RoundInputs(RTN(8, 'channel'), granularity='tensor')",
    ],
)
def test_a_conv_net_goes_to_disk_and_back(scheme: str, tmp_path: Path) -> None:
    x = random(16, 3, 8, 8)
    net = seeded(convnet).eval()
    with torch.no_grad():
        exact = net(x)
    net, report = lc.compress(net, f"[('*', {scheme})]", data=[x])
    static = "range" in scheme
    assert [inputs is not None and inputs.range == ("static" if static else "dynamic") for inputs in of(net)] == [
        True
    ] * 3
    with torch.no_grad():
        rounded = net(x)
        lc.save(net, tmp_path)
        again = lc.load_into(seeded(convnet), tmp_path).eval()
        assert of(again) == of(net)
        assert torch.equal(again(x), rounded)
        bake(again)
        torch.testing.assert_close(again(x), rounded, rtol=1e-4, atol=1e-4)
        for weight in installed(net).values():
            weight.inputs = None  # which an installed weight says at every call
        assert not torch.equal(net(x), rounded)
    assert (rounded - exact).square().mean() < (1e-3 if "8" in scheme else 0.2) * exact.var()
    assert all("inputs" in site and "per tensor" in site["kind"] for site in report.sites)


def test_behind_relu_a_zero_point_has_twice_the_levels(tmp_path: Path) -> None:
    x = random(16, 3, 8, 8)
    errors = {}
    for symmetric in (True, False):
        net = seeded(convnet).eval()
        with torch.no_grad():
            exact = net(x)
            method = lc.RoundInputs(lc.RTN(8, "channel"), 5, "tensor", symmetric, "minmax")
            lc.compress(net, [("0", lc.Keep()), ("*", method)], data=[x])
            errors[symmetric] = float((net(x) - exact).square().mean())
    assert errors[False] < 0.5 * errors[True]


def test_a_directory_and_a_module_find_the_same_ranges_and_everything_reads_them(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    plan = (
        "[('*.layers.*', RoundInputs(RTN(8, 32), granularity='tensor', symmetric=False, range='mse')), ('*', Keep())]"
    )
    options = Options(data=str(text), test=str(text), samples=8, length=32, test_tokens=256)
    report = compress_directory(tiny, lc.parse(plan), tmp_path / "out", options)
    stored = Compressed(tmp_path / "out")
    assert all(spec["inputs"]["scale"] > 0 for spec in stored.weights.values())
    assert report.metrics["kl"] > 0
    ids = torch.tensor([[5, 99, 17, 300, 42, 7, 7, 256]])
    import transformers

    models = {
        "dense": lc.load(tmp_path / "out", dtype=torch.float32), "installed": lc.load(tmp_path / "out", dense=False, dtype=torch.float32),
        "transformers": transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
    }  # fmt: skip
    with torch.no_grad():
        found = {name: model(ids).logits for name, model in models.items()}
        original = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(ids).logits
    for logits in found.values():
        torch.testing.assert_close(logits, found["dense"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["dense"], original, atol=1e-3)
    with pytest.raises(SchemeError, match="rounds its inputs"):
        models["dense"].save_pretrained(tmp_path / "plain")
    with pytest.raises(SchemeError, match="rounds its inputs"):
        lc.save(models["dense"], tmp_path / "plain")


def test_a_damaged_range_is_refused(tmp_path: Path) -> None:
    net, _ = lc.compress(seeded(convnet), f"[('*', {STATIC})]", data=[random(4, 3, 8, 8)])
    lc.save(net, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for key, value in (("scale", float("nan")), ("scale", -1.0), ("zero", 999), ("granularity", "token"), ("bits", 99)):
        damaged = copy.deepcopy(manifest)
        damaged["specs"][0]["inputs"][key] = value
        write_manifest(tmp_path, damaged)
        with pytest.raises(CheckpointError, match="spec 0: .*inputs"):
            lc.load_into(seeded(convnet), tmp_path)
    manifest["specs"][0]["inputs"] = {"bits": 8, "granularity": "token", "symmetric": False}
    write_manifest(tmp_path, manifest)
    with pytest.raises(
        CheckpointError, match="0.weight is stored with inputs: the inputs of Conv2d cannot be rounded token by token"
    ):
        lc.load_into(seeded(convnet), tmp_path)


# training


@pytest.mark.parametrize("how", [Direct(), FineTune(8, FAST, checks=1)])
@pytest.mark.parametrize("inner", ["RTN(4, 'channel')", "DKM(bits=3)"])
def test_recovery_trains_and_delivers_it(how: Any, inner: str) -> None:
    scheme = f"RoundInputs({inner}, 6, 'tensor', range='minmax')"
    model, found = recover_task(seeded(mlp), scheme, how, task())
    assert all(inputs is not None and inputs.range == "static" for inputs in of(model))
    assert task().judge(model, task().validation).loss == pytest.approx(found.loss, rel=1e-6)


@pytest.mark.parametrize("inner", ["RTN(4, 'channel')", "DKM(bits=3)"])
def test_anybodys_loop_trains_it(inner: str) -> None:
    x = next(iter(task().train))[0]
    prepared = prepare(seeded(mlp), f"RoundInputs({inner}, 6, 'tensor', range='mse')", [x]).eval()
    before = prepared(x)
    assert torch.equal(convert(prepared)(x), before)
    assert all(inputs is not None and inputs.range == "static" for inputs in of(prepared))


# schemes


def test_a_scheme_composes() -> None:
    site = make_site()
    pruned = lc.parse("Magnitude(0.5) >> RoundInputs(RTN(8, 'channel'), 6)")
    assert isinstance(pruned, Method)
    weight = pruned(site)
    assert weight.inputs == Inputs(6)
    assert {part.inputs for part in weight.modules() if isinstance(part, Weight) and part is not weight} == {None}
    other = lc.parse("RoundInputs(Magnitude(0.5) >> RTN(8, 'channel'), 6)")
    assert isinstance(other, Method)
    assert torch.equal(other(site)(), weight())


def test_what_is_left_open_is_filled_in() -> None:
    """A search may choose the form, its range among it."""
    text = "RoundInputs(RTN(8, 'channel'), Free(4, 8, integer=True), 'tensor', range=Free(choices=('minmax', 'mse')))"
    scheme = lc.parse(text)
    assert isinstance(scheme, Method)
    assert scheme.wants == Stats.RANGE | Stats.SAMPLE
    assert fix(scheme, {"bits": 5, "range": "mse"}) == lc.RoundInputs(lc.RTN(8, "channel"), 5, "tensor", range="mse")
    other = lc.parse("SmoothQuant(granularity='tensor', range=Free(choices=('minmax', 'mse')))")
    assert isinstance(other, Method)
    assert other.wants & Stats.SAMPLE


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("RoundInputs(RTN(8), bits=1)", "RoundInputs: inputs: bits should be a whole number from 2 to 16"),
        ("RoundInputs(RTN(8), granularity='channel')", "granularity should be"),
        ("RoundInputs(RTN(8), range='minmax')", "range='minmax' is that of a whole tensor, give granularity='tensor'"),
        ("RoundInputs(RTN(8), granularity='tensor', range='max')", "range should be one of 'dynamic', 'minmax', 'mse'"),
        ("RoundInputs(SmoothQuant())", "rounds inputs already"), ("RoundInputs(NeuronPrune(0.5))", "cuts channels"),
        ("Hadamard(RoundInputs(RTN(8)))", "has to come last"), ("SmoothQuant(range='minmax')", "SmoothQuant: range='minmax' is that of a whole"),
        ("SmoothQuant(activations=None, granularity='tensor')", "activations=None leaves inputs as they are"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(scheme: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        lc.parse(scheme)


@pytest.mark.parametrize(
    "scheme",
    [
        "RoundInputs(RTN(8)) >> RTN(4)",
        "RoundInputs(RTN(8)) + EoRA(2)",
        "RTN(4) + RoundInputs(RTN(8))",
        "LowRank(2, factors=RoundInputs(RTN(8, 'channel')))",
    ],
)
def test_a_part_that_rounds_is_refused_before_work(scheme: str) -> None:
    seen = []
    net = nn.Sequential(nn.Linear(64, 64))
    net.register_forward_hook(lambda *_: seen.append(0))
    with pytest.raises(SchemeError, match="0: .*it has to come last"):
        lc.compress(net, scheme, data=[random(8, 64)])
    assert len(seen) <= 2, "the model was looked at, not calibrated"
    assert installed(net) == {}


def test_convolutions_are_refused_before_work_with_the_way_out() -> None:
    net = convnet()
    for scheme, message in (
        ("RoundInputs(RTN(8, 'channel'))", "0 .*cannot be rounded token by token; with granularity='tensor' they can"),
        ("RoundInputs(AWQ(8, 'channel'), granularity='tensor')", "0 .*cannot be multiplied by a column scale"),
        ("SmoothQuant(granularity='tensor')", "0 .*cannot be multiplied by a column scale"),
    ):
        with pytest.raises(SchemeError, match=message):
            lc.compress(net, f"[('*', {scheme})]", data=[random(2, 3, 8, 8)])
    assert installed(net) == {}
