"""SmoothQuant: its formula, the two ends of alpha, scales that sites share, and smoother inputs on a trained model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import laconic as lc
from laconic.data.text import evaluation_windows
from laconic.disk.load import load_tokenizer
from laconic.engine.solve import matrix_of
from laconic.engine.statistics import Statistics
from laconic.engine.walk import parameters_of
from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.rtn import RTN
from laconic.methods.smoothquant import SmoothQuant
from laconic.model.sites import Site, Stats, find_slots
from laconic.weights import Scaled, Uniform, Weight
from laconic.weights.inputs import Inputs, round_input
from laconic.weights.install import installed
from tests.conftest import make_site


def scale_of(weight: Weight) -> Tensor:
    """The s that weights are multiplied by and inputs divided by, as it is stored."""
    assert isinstance(weight, Scaled)
    assert weight.column_scale is not None
    return 1 / weight.column_scale().flatten()


def test_the_scale_is_the_papers_formula() -> None:
    """s_j = sqrt(max |X_j| / max |W_j|), the maxima over the rows of both sites; these are powers of two, which bfloat16 holds."""
    peak = torch.tensor([[4.0, 1.0, 256.0]])
    first = Site("a", torch.tensor([[1.0, -0.5, 0.25], [0.5, 0.25, -1.0]]), peak=peak)
    second = Site("b", torch.tensor([[0.25, -1.0, 0.5]]), peak=peak)
    weights = SmoothQuant(bits=8).together([first, second])
    for weight in weights:
        assert torch.equal(scale_of(weight), torch.tensor([2.0, 1.0, 16.0]))
    assert torch.allclose(weights[0](), first.W, atol=2 * 16 / 255 / 2)
    assert [weight.inputs for weight in weights] == [Inputs(8)] * 2


def test_alpha_says_who_bears_the_outliers() -> None:
    """0: every column of weights comes to one size and inputs keep theirs relative to them; 1: every input comes to one size."""
    site = make_site()
    assert site.peak is not None
    largest, peak = site.W.abs().amax(0), site.peak[0]
    assert torch.allclose(largest * scale_of(SmoothQuant(alpha=0)(site)), torch.ones(64), rtol=2**-8)
    assert torch.allclose(peak / scale_of(SmoothQuant(alpha=1)(site)), torch.ones(64), rtol=2**-8)
    even = scale_of(SmoothQuant(alpha=0.5)(site))
    assert torch.allclose(peak / even, largest * even, rtol=2**-7), "half way, both come to the same size"


def test_the_grid_is_symmetric_a_row_at_a_time_and_exact_to_half_a_step() -> None:
    site = make_site()
    weight = SmoothQuant(bits=8)(site)
    assert isinstance(weight, Scaled)
    assert isinstance(weight.weight, Uniform)
    assert weight.weight.symmetric
    assert weight.weight.group == "channel"
    step = weight.weight.scale().t() / scale_of(weight)
    assert ((weight() - site.W).abs() <= 0.505 * step + 1e-7).all()
    assert weight.bits() == (8 * 48 * 64 + 16 * 48) + 16 * 64 == SmoothQuant(bits=8).expected_bits((48, 64))


def test_four_bits_of_the_weights_alone() -> None:
    weight = SmoothQuant(bits=4, activations=None, group=16)(make_site())
    assert weight.inputs is None
    assert weight.bits() == 4 * 48 * 64 + 16 * 48 * 4 + 16 * 64


def test_with_large_inputs_the_rounded_layer_is_closer_than_without_smoothing() -> None:
    """The paper's figure 2: two inputs fifty times the others leave them a few of the 256 levels; smoothed, all are rounded finely."""
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    X[:, [3, 40]] *= 50
    weight = SmoothQuant()(Site("x", W, peak=X.abs().amax(0, keepdim=True)))
    plain = RTN(bits=8, group="channel", symmetric=True)(Site("x", W))
    assert isinstance(weight, Scaled)
    assert weight.column_scale is not None
    smoothed = round_input(X, Inputs(8), weight.column_scale().flatten()) @ weight().T
    rounded = round_input(X, Inputs(8)) @ plain().T
    exact = X @ W.T
    assert (smoothed - exact).square().sum() < 0.1 * (rounded - exact).square().sum()


def test_columns_that_nothing_uses_are_left_alone() -> None:
    site = make_site()
    assert site.peak is not None
    peak, W = site.peak.clone(), site.W.clone()
    peak[0, 3], W[:, 4], peak[0, 5], W[:, 5] = 0, 0, 0, 0
    weight = SmoothQuant()(site.having(peak=peak, W=W))
    assert torch.equal(scale_of(weight)[3:6], torch.ones(3))
    assert torch.isfinite(weight()).all()
    assert not weight()[:, 4:6].any()


def test_an_input_that_overflowed_is_not_smoothed() -> None:
    site = make_site()
    assert site.peak is not None
    peak = site.peak.clone()
    peak[0, 0], peak[0, 1] = torch.inf, torch.nan
    weight = SmoothQuant()(site.having(peak=peak))
    assert torch.equal(scale_of(weight)[:2], torch.ones(2))
    assert torch.isfinite(weight()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.5}, "alpha is a share"), ({"alpha": float("nan")}, "alpha is a share"), ({"activations": 1}, "activations.*2 to 16"),
     ({"activations": True}, "activations")],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        SmoothQuant(**arguments)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(SchemeError, match="block.0.layer: SmoothQuant needs the largest magnitude"):
        SmoothQuant()(make_site().having(peak=None))
    with pytest.raises(SchemeError, match="scales whole columns"):
        lc.parse("SparseGPT(0.5) >> SmoothQuant()")
    with pytest.raises(SchemeError, match="not known in a rotated basis"):
        lc.parse("Hadamard(SmoothQuant())")
    twice = lc.parse("SmoothQuant() >> RTN(bits=4)")
    assert isinstance(twice, Method)
    with pytest.raises(SchemeError, match="has to come last"):
        twice(make_site())
    with pytest.raises(SchemeError, match="0: .*has to come last"):
        lc.compress(nn.Sequential(nn.Linear(64, 64)), "SmoothQuant() + EoRA(rank=2)", data=[torch.randn(64, 64)])


class Gated(nn.Module):
    """Two layers that read one input, and one that reads their product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu() * self.up(x))


def test_layers_that_read_one_input_divide_it_alike_and_the_module_runs_in_8_bits() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, X = nn.Sequential(Gated()), torch.randn(128, 32)
    X[:, 5] *= 60
    with torch.no_grad():
        exact = net(X)
    net, report = lc.compress(net, "SmoothQuant()", data=[X])
    weights = installed(net)
    gate, up, down = (weights[f"0.{name}.weight"] for name in ("gate", "up", "down"))
    assert torch.equal(scale_of(gate), scale_of(up))
    assert scale_of(down).shape == (48,)
    assert [weight.inputs for weight in (gate, up, down)] == [Inputs(8)] * 3
    assert [site["name"] for site in report.sites] == ["0.gate", "0.up", "0.down"]
    with torch.no_grad():
        rounded = net(X)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).square().sum() < 1e-3 * exact.square().sum()


@pytest.fixture(scope="module")
def two_blocks(shared: Path) -> tuple[nn.Module, Tensor]:
    """The first two blocks of the language model with its head, and windows it is calibrated with."""
    folder = shared / "models" / "books-llama-7m"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers = model.model.layers[:2]
    text = (shared / "data" / "books-train.txt").read_text()[:100_000]
    return model, evaluation_windows(text, load_tokenizer(folder), 128, 128 * 16, "books").tokens


@pytest.mark.shared
def test_a_language_models_inputs_become_smoother(two_blocks: tuple[nn.Module, Tensor]) -> None:
    """Largest / mean |x| over all columns falls at all of the eight inputs (measured: to 0.45 to 0.86 of what it was)."""
    model, tokens = two_blocks
    slots = [slot for slot in find_slots(model) if slot.role == "body"]
    statistics = Statistics(parameters_of(model, slots), dict.fromkeys(slots, Stats.MEAN | Stats.MAX))
    with torch.no_grad(), statistics.watch():
        model(input_ids=tokens, use_cache=False)
    inputs: dict[int | None, list[Site]] = {}
    for slot in slots:
        site = statistics.describe(slot, matrix_of(model, slot), 0)
        inputs.setdefault(site.input, []).append(site)
    assert len(inputs) == 2 * 4
    ratios = []
    for sites in inputs.values():
        s, (peak, magnitude) = scale_of(SmoothQuant().together(sites)[0]), (sites[0].peak, sites[0].magnitude)
        assert peak is not None
        assert magnitude is not None
        before, after = (float((peak / c).max() / (magnitude / c).mean()) for c in (torch.ones_like(s), s))
        ratios.append(after / before)
    assert max(ratios) < 0.92
    assert sum(ratios) / 8 < 0.75
