"""AdaRound: its formulas on numbers worked by hand, its limits, the paper's claim in small, and which sites it trains."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.recover import AdaRound, Steps, Task, recover_task
from laconic.recover.adaround import RoundingLogits
from laconic.weights import Uniform, installed
from tests.recover.nets import seeded

SHAPE = (3, 8)


def grid(W: Tensor, bits: int = 3, **more: Any) -> Uniform:
    found = Uniform((W.shape[0], W.shape[1]), bits=bits, **{"group": 4, **more})
    found.fit(W)
    found.right_inverse(W)
    return found


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_formulas_by_hand() -> None:
    """s = 1, z = 0, w = 0.25, 1.5 and -1: below 0, 1 and -1 or -2, h the fraction; V = 0 is h = 1/2, where nothing is
    decided.
    """
    weight = Uniform((1, 3), bits=4, group="tensor", symmetric=True)
    weight.set_step(1.0)
    W = torch.tensor([[0.25, 1.5, -1.0]])
    weight.right_inverse(W)
    found = RoundingLogits(weight, W, warmup=0.2, beta=(20.0, 2.0))
    assert torch.allclose(found.up(), torch.tensor([[0.25, 0.5, 0.001]]), atol=1e-6)
    assert torch.allclose(found.logits[0, 0], torch.tensor((0.25 + 0.1) / 1.2).logit())  # h = 1.2 sigmoid(V) - 0.1
    assert found.logits[0, 1] == 0
    found.advance(0.1)
    assert found.beta == float("inf")  # warming up
    found.advance(0.6)
    assert found.beta == pytest.approx(2 + 18 * 0.5)
    found.advance(1.0)
    assert found.beta == 2
    assert found.undecided().item() == pytest.approx((1 - 0.5**2) + 1 + (1 - 0.998**2), abs=1e-5)
    assert torch.equal(found.eval()(W), torch.tensor([[0.0, 2.0, -1.0]]))


@pytest.mark.parametrize("more", [{}, {"symmetric": True}, {"zero": "float"}, {"group": "channel"}, {"second": (8, 2)}])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_it_begins_with_the_weights_themselves(bits: int, more: dict[str, Any]) -> None:
    """Soft weights are W where the grid reaches, and the grid's end beyond."""
    W = matrix()
    weight = grid(W, bits, **more)
    scale, zero = weight.expanded_sides()
    ends = [(end - zero) * scale for end in (weight.low, weight.high)]
    soft = RoundingLogits(weight, W)(W)
    assert torch.allclose(soft, W.clamp(*ends), atol=float(1.1e-3 * scale.max()))


@pytest.mark.parametrize("start", ["weight", "codes"])
def test_stored_is_what_is_seen_in_evaluation(start: Any) -> None:
    W, other = matrix(), matrix(seed=1)
    weight = grid(W)
    moved = grid(W)
    moved.right_inverse(other)  # codes far from W's, as error feedback leaves them
    found = RoundingLogits(moved, W, start)
    with torch.no_grad():
        found.logits.add_(matrix(seed=2))
    stored = found.stored(W)
    assert isinstance(stored, Uniform)
    assert torch.equal(stored.forward(), found.eval()(W))
    assert stored.codes.min() >= weight.low
    assert stored.codes.max() <= weight.high
    again = RoundingLogits(grid(other), other, start)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again.stored(W).forward(), stored.forward())


def test_from_codes_it_begins_with_these_codes() -> None:
    W = matrix()
    moved = grid(W)
    moved.right_inverse(W + 0.7 * matrix(seed=1))
    assert not torch.equal(moved.codes, grid(W).codes)
    found = RoundingLogits(moved, W, "codes")
    assert torch.equal(found.stored(W).forward(), moved.forward())


def layer_error(W: Tensor, found: Tensor, X: Tensor) -> float:
    return float(((W - found) @ X.t()).square().mean())


def trained(net: nn.Linear, X: Tensor, how: AdaRound, scheme: str) -> tuple[Tensor, Any]:
    data = list(X.split(16))
    task = Task(data[:-2], data[-2:], loss=lambda output, batch: (output - net(batch)).square().mean())
    compressed, found = recover_task(net, scheme, how, task)
    return installed(compressed)["weight"].forward(), found


def correlated(columns: int, factors: int = 3, count: int = 256) -> Tensor:
    """Inputs whose columns go together, where rounding each weight for itself is not best."""
    return matrix(count, factors, seed=6) @ matrix(factors, columns, seed=6) + 0.1 * matrix(count, columns, seed=7)


def test_it_is_nearly_the_best_of_all_roundings_of_a_small_layer() -> None:
    """2 x 6 weights: all 2^6 ways to round a row up and down are tried. With one factor nearest rounding has about 20
    times the least error.
    """
    net = seeded(lambda: nn.Linear(6, 2, bias=False), 1)
    X, W = correlated(6, factors=1), net.weight.detach()
    how = AdaRound(steps=300, samples=14, checks=1, learn=Steps("adam", lr=0.1, lr_end=0.01, clip=None))
    found, _ = trained(net, X, how, "RTN(2, 'channel')")
    weight = grid(W, 2, group="channel")
    scale, zero = weight.expanded_sides()
    below = (W / scale + zero).floor().clamp(weight.low, weight.high - 1)
    best = 0.0
    for row in range(2):
        every = [below[row] + torch.tensor(ups) for ups in itertools.product((0, 1), repeat=6)]
        best += min(layer_error(W[row : row + 1], ((q - zero[row]) * scale[row])[None], X) for q in every) / 2
    nearest = layer_error(W, weight.forward(), X)
    assert nearest > 5 * best
    assert best * (1 - 1e-5) <= layer_error(W, found, X) <= best + 0.1 * (nearest - best)


def test_it_beats_nearest_rounding_in_a_layers_outputs() -> None:
    net = seeded(lambda: nn.Linear(32, 24, bias=False))
    X = correlated(32)
    how = AdaRound(steps=150, samples=14, checks=2)
    found, told = trained(net, X, how, "RTN(2, 16)")
    W = net.weight.detach()
    nearest = grid(W, 2, group=16).forward()
    assert layer_error(W, found, X) < 0.5 * layer_error(W, nearest, X)
    assert told.loss < 0.5 * told.curve[0]["validation_loss"]
    scale, _ = grid(W, 2, group=16).expanded_sides()
    assert float(((found - nearest).abs() / scale).max()) <= 1 + 1e-4  # up or down, never further


def test_a_large_penalty_decides_everything_and_none_leaves_it_open() -> None:
    net = seeded(lambda: nn.Linear(16, 8, bias=False))
    X, W = correlated(16), net.weight.detach()
    held: list[RoundingLogits] = []

    class Watched(AdaRound):
        def relaxation(self, *given: Any) -> Any:
            held.append(super().relaxation(*given))  # type: ignore[arg-type]
            return held[-1]

    for lam in (0.0, 100.0):
        trained(net, X, Watched(steps=200, samples=14, lam=lam, learn=Steps("adam", lr=0.1, lr_end=0.1)), "RTN(2, 8)")
    for found in held:
        found.beta = 2.0
    undecided = [found.undecided().item() / W.numel() for found in held]
    assert undecided[1] < 0.01
    assert undecided[0] > 0.1


def test_a_grid_that_is_gptqs_is_kept() -> None:
    net = seeded(lambda: nn.Linear(16, 8, bias=False))
    X = correlated(16)
    task = Task(list(X.split(16))[:-2], list(X.split(16))[-2:], loss=lambda y, x: (y - net(x)).square().mean())
    for start in ("weight", "codes"):
        how = AdaRound(steps=40, samples=14, checks=1, start=start)  # type: ignore[arg-type]
        direct, _ = recover_task(net, "GPTQ(bits=2, group=8)", AdaRound(steps=1, samples=2), task)
        found, told = recover_task(net, "GPTQ(bits=2, group=8)", how, task)
        one, other = installed(direct)["weight"], installed(found)["weight"]
        assert isinstance(one, Uniform)
        assert isinstance(other, Uniform)
        assert torch.equal(one.scale.forward(), other.scale.forward())
        assert told.loss <= told.curve[0]["validation_loss"]


def test_what_has_no_grid_is_left_and_said() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    data = list(matrix(96, 16).split(16))
    task = Task(data[:4], data[4:], loss=lambda y, x: (y - net(x)).square().mean())
    _, found = recover_task(net, "[('0', RTN(2, 'channel')), ('*', KMeans(2))]", AdaRound(steps=20, samples=4), task)
    assert any(note.startswith("2: as compression left it") and "AdaRound" in note for note in found.notes)
    with pytest.raises(SchemeError, match="found nothing in this model that it trains"):
        recover_task(net, "KMeans(2)", AdaRound(steps=20, samples=4), task)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"lam": -1}, "lam"), ({"warmup": 1.0}, "warmup"), ({"beta": (2, 20)}, "beta"), ({"start": "gptq"}, "start"),
     ({"samples": 1}, "samples"), ({"held": 0}, "held"), ({"target": "both"}, "target"), ({"per": "model"}, "per"),
     ({"learn": Steps(distill=0.5)}, "distill")],
)  # fmt: skip
def test_wrong_hyper_parameters_are_named(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(SchemeError, match=word):
        AdaRound(**wrong)
