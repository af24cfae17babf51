"""Relaxations: what training moves, and that what is judged is what is stored."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.weights import Codebook, Dense, Inputs, LowRank, Permuted, Scaled, Sparse, Sum, Uniform, Weight
from laconic.weights.relax import Relaxation, StraightThrough, Tuned, float_states

SHAPE = (6, 8)


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def fitted(weight: Any, W: Tensor) -> Any:
    weight.fit(W)
    weight.right_inverse(W)
    return weight


def book(W: Tensor) -> Codebook:
    found = Codebook(SHAPE, bits=2, row_scale=True)
    found.set_tables(torch.tensor([-1.0, -0.3, 0.3, 1.0]).reshape(1, 4, 1))
    found.right_inverse(W)
    return found


def scaled(W: Tensor) -> Scaled:
    column = Dense((1, 8))
    column.right_inverse(torch.linspace(0.5, 2, 8)[None])
    return fitted(Scaled(Uniform(SHAPE, bits=3, group=4), column_scale=column), W)


def sparse(W: Tensor) -> Sparse:
    return fitted(Sparse(Dense(SHAPE), pattern="2:4"), W)


WEIGHTS = {
    "uniform": lambda W: fitted(Uniform(SHAPE, bits=3, group=4), W),
    "float zeros": lambda W: fitted(Uniform(SHAPE, bits=3, group=4, zero="float"), W),
    "two levels": lambda W: fitted(Uniform(SHAPE, bits=3, group=4, second=(8, 2)), W),
    "codebook": book,
    "sparse": sparse,
    "low rank": lambda W: LowRank.of(W[:, :2].clone(), W[:2].clone()),
    "scaled": scaled,
    "permuted": lambda W: Permuted(fitted(Uniform(SHAPE, bits=3, group=4), W), torch.arange(8).flip(0)),
    "sum": lambda W: Sum(fitted(Uniform(SHAPE, bits=2), W), LowRank.of(W[:, :1].clone(), W[:1].clone())),
}


def codes_of(weight: Weight) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in weight.named_buffers()}


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_states_are_trained_and_codes_stay(make: Any) -> None:
    W = matrix()
    start = make(W)
    before, decoded = codes_of(start), start.forward().detach().clone()
    relaxation, w = Tuned(start), nn.Parameter(W.clone())
    states = relaxation.trained(w)
    assert set(states) == set(float_states(start))
    assert torch.equal(relaxation(w), decoded)
    sizes = [(state, float(state.detach().square().mean().sqrt())) for state in states.values()]
    optimizer = torch.optim.Adam([{"params": [state], "lr": 0.003 * size} for state, size in sizes])
    errors = []
    target = 1.1 * W
    for _ in range(60):
        optimizer.zero_grad()
        error = (relaxation.train()(w) - target).square().mean()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < errors[0]
    assert w.grad is None
    stored = relaxation.stored(w)
    assert torch.equal(relaxation.eval()(w), stored.forward())
    assert torch.equal(start.forward(), decoded)  # what it started from is another weight
    assert all(torch.equal(found, before[name]) for name, found in codes_of(stored).items())
    spec, tensors = stored.pack()
    assert torch.equal(type(stored).unpack(spec, tensors).forward(), stored.forward())
    if not isinstance(stored, LowRank | Sum):
        again = copy.deepcopy(stored)  # its projection uses the trained scales, not those of before
        again.right_inverse(stored.forward().detach())
        assert torch.allclose(again.forward(), stored.forward(), atol=1e-6)


def test_what_training_may_not_move() -> None:
    W = matrix()
    assert set(float_states(WEIGHTS["uniform"](W))) == {"scale.values"}
    assert set(float_states(WEIGHTS["float zeros"](W))) == {"scale.values", "zero.values"}
    rounding = scaled(W)
    assert set(float_states(rounding)) == {"weight.scale.values", "column_scale.values"}
    rounding.inputs = Inputs(8)
    assert set(float_states(rounding)) == {"weight.scale.values"}


def test_other_relaxations_train_w() -> None:
    W = matrix()
    w = nn.Parameter(W)
    assert StraightThrough(WEIGHTS["uniform"](W)).trained(w) == {"w": w}


def test_a_weight_without_float_states_is_refused() -> None:
    weight = WEIGHTS["uniform"](matrix())
    scale = weight.scale.values.detach()
    del weight.scale.values
    weight.scale.register_buffer("values", scale)
    with pytest.raises(SchemeError, match="no scales, tables or other float states"):
        Tuned(weight)


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_its_state_dict_says_all_that_is_stored(make: Any) -> None:
    W, w = matrix(), nn.Parameter(matrix())
    one, other = Tuned(make(W)), Tuned(make(matrix(1)))
    with torch.no_grad():
        for state in one.parameters():
            state.mul_(1.25)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.stored(w).forward(), other.stored(w).forward())
    assert torch.equal(one(w), other(w))


def test_it_is_what_a_module_trains() -> None:
    """Its states are parameters of whatever holds it: any optimizer finds them, and casting the module leaves them
    exact.
    """
    holder = nn.Module()
    holder.relaxation = Tuned(WEIGHTS["uniform"](matrix()))
    assert [tuple(p.shape) for p in holder.parameters()] == [(2, 6)]
    holder.to(torch.bfloat16)
    relaxation: Relaxation = holder.relaxation
    assert all(p.dtype == torch.float32 for p in relaxation.parameters())
