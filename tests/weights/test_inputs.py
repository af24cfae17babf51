"""Inputs as a value: its formula for every form, its stored form, and what is refused."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import Dense, Inputs, View, bake, install, unpack
from laconic.weights.base import pack
from laconic.weights.demands import demands_of
from laconic.weights.inputs import inputs_of, round_input

FORMS = [
    Inputs(4), Inputs(4, symmetric=False), Inputs(4, "tensor"), Inputs(4, "tensor", False), Inputs.within(-1, 3, 4), Inputs.within(-1, 3, 4, False),
    Inputs.within(0, 3, 4, False), Inputs.within(-3, 0, 4, False),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x: Tensor, inputs: Inputs) -> Tensor:
    """One number after the other, in Python."""
    low, high = inputs.codes
    out = torch.empty_like(x)
    rows = x.reshape(-1, x.shape[-1]) if inputs.granularity == "token" else x.reshape(1, -1)
    for row, place in zip(rows, out.view(rows.shape), strict=True):
        least, most = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step, zero = inputs.scale, inputs.zero
        if step is None:
            step = max(-least, most) / high if inputs.symmetric else (most - least) / (high - low)
            zero = 0 if inputs.symmetric else round(-least / step)
        for i, value in enumerate(row.tolist()):
            place[i] = (min(max(round(value / step) + zero, low), high) - zero) * step
    return out


@pytest.mark.parametrize("inputs", FORMS, ids=str)
def test_the_formula(inputs: Inputs) -> None:
    x = random(3, 5, 8)
    torch.testing.assert_close(round_input(x, inputs), by_definition(x, inputs))
    assert torch.equal(round_input(torch.zeros(3, 4), inputs), torch.zeros(3, 4)), "0 is a level, whatever the form"


def test_codes_by_hand() -> None:
    """4 bits from -1 to 2 in steps of 0.2: 0 is code 5."""
    inputs = Inputs.within(-1, 2, 4, False)
    assert (inputs.scale, inputs.zero, inputs.codes) == (float(torch.tensor(0.2)), 5, (0, 15))
    x = torch.tensor([-7.0, -1.0, -0.31, 0.0, 0.09, 0.11, 2.0, 9.0])
    expected = torch.tensor([-1.0, -1.0, -0.4, 0.0, 0.0, 0.2, 2.0, 2.0])
    torch.testing.assert_close(round_input(x, inputs), expected)
    assert Inputs.within(0.5, 2).scale == Inputs.within(-2, 1).scale == float(torch.tensor(2 / 127))


@pytest.mark.parametrize("inputs", FORMS, ids=str)
def test_what_has_a_step_of_its_own(inputs: Inputs) -> None:
    """Per token, or with a stored range, nothing depends on what else is in the batch."""
    x = random(2, 5, 8) * torch.tensor([3.0, 1.0]).view(2, 1, 1)
    alone = round_input(x[1:], inputs)
    assert torch.equal(round_input(x, inputs)[1:], alone) == (inputs.granularity == "token" or inputs.range == "static")
    assert round_input(x[:0], inputs).shape == (0, 5, 8)
    assert round_input(x.bfloat16(), inputs).dtype == torch.bfloat16


def test_what_is_not_finite() -> None:
    x = torch.tensor([[1.0, torch.inf], [1.0, 2.0]])
    assert round_input(x, Inputs(8, "tensor")).isnan().all()
    assert round_input(x, Inputs.within(-2, 2)).isfinite().all(), "a stored range cuts it off"
    assert round_input(torch.tensor([torch.nan, 1.0]), Inputs.within(-2, 2)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("inputs", FORMS, ids=str)
def test_gradients_pass_where_nothing_is_cut_off(inputs: Inputs) -> None:
    x = torch.tensor([[-9.0, -0.5, 0.0, 0.5, 9.0]], requires_grad=True)
    rounded = round_input(x, inputs)
    rounded.sum().backward()
    inside = [True] * 5
    if inputs.scale is not None:
        low, high = ((code - inputs.zero) * inputs.scale for code in inputs.codes)
        inside = [low - inputs.scale / 2 <= value <= high + inputs.scale / 2 for value in x.flatten().tolist()]
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [float(one) for one in inside]
    assert torch.equal(rounded.detach(), round_input(x.detach(), inputs))


@pytest.mark.parametrize("inputs", FORMS, ids=str)
def test_it_is_stored_and_read_back(inputs: Inputs) -> None:
    weight = Dense((4, 8), dtype="float32")
    weight.right_inverse(random(4, 8))
    weight.inputs = inputs
    spec, tensors = pack(weight)
    again = unpack(json.loads(json.dumps(spec)), tensors)
    assert again.inputs == inputs
    assert ("input_bits" in spec) == (inputs == Inputs(4)), "the form that was there before keeps its key"


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1}, {"bits": 17}, {"bits": 8.0}, {"bits": True}, {"granularity": "channel"}, {"granularity": None}, {"symmetric": 1},
        {"scale": 0.1}, {"granularity": "tensor", "scale": 0.0}, {"granularity": "tensor", "scale": -1.0}, {"granularity": "tensor", "scale": 1},
        {"granularity": "tensor", "scale": math.nan}, {"granularity": "tensor", "scale": math.inf}, {"granularity": "tensor", "scale": 0.1},
        {"granularity": "tensor", "scale": 1e-45}, {"granularity": "tensor", "scale": 1e39}, {"zero": 1}, {"zero": -1}, {"zero": 1.0},
        {"granularity": "tensor", "scale": 0.5, "zero": 1}, {"granularity": "tensor", "scale": 0.5, "zero": 256, "symmetric": False},
        {"granularity": "tensor", "scale": 0.5, "zero": True, "symmetric": False}, {"granularity": "tensor", "scale": 2.0**125, "bits": 16},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_none(arguments: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match="inputs: "):
        Inputs(**arguments)
    told = {"bits": 8, "granularity": "tensor", "symmetric": True, "scale": 0.5, "zero": 0} | arguments
    with pytest.raises(CheckpointError, match="dense: "):
        inputs_of({"kind": "dense", "inputs": told})


@pytest.mark.parametrize(
    "spec",
    [
        {"input_bits": None}, {"input_bits": 1}, {"inputs": None}, {"inputs": 8}, {"inputs": {}}, {"inputs": []}, {"inputs": {"bits": 8}},
        {"inputs": {"bits": 8, "granularity": "tensor", "symmetric": True, "scale": 0.5}},
        {"inputs": {"bits": 8, "granularity": "tensor", "symmetric": True, "more": 0}},
        {"inputs": {"bits": 8, "granularity": "token", "symmetric": True}},
        {"inputs": {"bits": 8, "granularity": ["token"], "symmetric": False}},
        {"input_bits": 8, "inputs": {"bits": 8, "granularity": "tensor", "symmetric": True}},
    ],
    ids=str,
)  # fmt: skip
def test_specs_that_nobody_wrote(spec: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="dense: input"):
        inputs_of({"kind": "dense"} | spec)
    assert inputs_of({"kind": "dense"}) is None


@pytest.mark.parametrize("ends", [(0.0, math.inf), (math.nan, 1.0), (-math.inf, 0.0)])
def test_ranges_that_are_none(ends: tuple[float, float]) -> None:
    with pytest.raises(SchemeError, match="two finite numbers"):
        Inputs.within(*ends)


def test_extreme_ranges() -> None:
    assert Inputs.within(0, 0).scale == 1.0
    tiny, huge = Inputs.within(0, 1e-44, 8, False), Inputs.within(-3e38, 3e38, 2, False)
    assert round_input(torch.tensor([1e-44]), tiny).isfinite().all()
    assert round_input(torch.tensor([3e38, -3e38]), huge).isfinite().all()


def test_a_weight_says_it_with_an_inputs_only() -> None:
    weight = Dense((4, 8), dtype="float32")
    weight.inputs = 8  # type: ignore[assignment]
    with pytest.raises(SchemeError, match="dense: inputs should be an Inputs or None, got 8"):
        pack(weight)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding="valid", groups=2), (2, 4, 9, 9)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 2, 5, 5, 5)),
    "reflected": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "one picture": (lambda: nn.Conv2d(4, 8, 3), (4, 9, 9)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("inputs", FORMS[2:], ids=str)
def test_a_convolution_sees_rounded_inputs(case: str, inputs: Inputs) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = CONVOLUTIONS[case][0]().requires_grad_(False)
    plain, x = copy.deepcopy(layer), random(*CONVOLUTIONS[case][1])
    view = View(tuple(layer.weight.shape))
    weight = Dense(view.matrix_shape, dtype="float32")
    weight.right_inverse(view.matrix(layer.weight))
    weight.inputs = inputs
    install(layer, "weight", weight, view)
    expected = plain(round_input(x, inputs))
    torch.testing.assert_close(layer(x), expected)
    bake(layer)
    assert demands_of(layer) is not None
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(expected, plain(x))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_a_convolution_has_no_tokens(form: Inputs) -> None:
    weight = Dense((8, 36), dtype="float32")
    weight.inputs = form
    with pytest.raises(
        SchemeError, match="Conv2d cannot be rounded token by token; with granularity='tensor' they can"
    ):
        install(nn.Conv2d(4, 8, 3), "weight", weight, View((8, 4, 3, 3)))
