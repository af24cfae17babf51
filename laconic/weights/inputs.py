"""How a layer's inputs are rounded while it runs: the value that says it, its stored form, and the formula."""

import math
import struct
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError

Granularity = Literal["token", "tensor"]
"""What has a step of its own: every token (row) of an input, or the input as a whole."""
_SMALLEST = 2.0**-126  # the smallest normal float32, which no step is below
_LARGEST = 2.0**127  # a float32, which no level is above
BITS_KEY, KEY = "input_bits", "inputs"
"""Where a spec says it: the bits alone of per-token, dynamic, symmetric inputs; an object for all others."""


@dataclass(frozen=True)
class Inputs:
    """How a layer rounds its input x whenever it runs, c being the column scale of a weight stored as W diag(1 / c),
    else 1:

        x' = x diag(c),  q = clamp(round(x' / d) + z, low, high),  the layer sees d (q - z) diag(1 / c)

    `bits`, 2 to 16. `granularity`: "token", d of every row of x [..., in] its own, or "tensor", one d for the whole
    input. `symmetric`: z = 0 and codes from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1; else codes from 0 to 2^bits - 1,
    and z is the code of 0. Dynamic, without a `scale`: d (and z) come from x itself, its largest magnitude
    (or its range, 0 included) being the last level. Static, with one: d = `scale`, a float32, and z = `zero`; what lies
    outside takes the last level. Per tensor only.
    Raises: SchemeError for anything else. Source: Jacob et al. 2018, section 2.1; Nagel et al. 2021, section 2.2; Xiao
    et al. 2022, table 2.
    """

    bits: int = 8
    granularity: Granularity = "token"
    symmetric: bool = True
    scale: float | None = None
    zero: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.granularity not in get_args(Granularity):
            raise SchemeError(f"inputs: granularity should be 'token' or 'tensor', got {self.granularity!r}")
        if type(self.symmetric) is not bool:
            raise SchemeError(f"inputs: symmetric should be True or False, got {self.symmetric!r}")
        if self.scale is not None:
            _check_scale(self.scale, self.codes[1])
            if self.granularity != "tensor":
                raise SchemeError("inputs: a static range is one of a whole tensor; tokens have ranges of their own")
        most = self.codes[1] if self.scale is not None and not self.symmetric else 0
        if type(self.zero) is not int or not 0 <= self.zero <= most:
            raise SchemeError(
                f"inputs: zero should be the code of 0, a whole number from 0 to {most}, got {self.zero!r}"
            )

    @classmethod
    def within(cls, low: float, high: float, bits: int = 8, symmetric: bool = True) -> Self:
        """Static inputs whose levels span `low` to `high` (float), 0 always among them; a range of nothing but 0 has
        the step 1.

        Raises: SchemeError for a range that is not finite.
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise SchemeError(f"inputs: a range should be two finite numbers, got {low} to {high}")
        first, last = cls(bits, "tensor", symmetric).codes
        step = max(-low, high) / last if symmetric else (high - low) / (last - first)
        scale = _as_float32(min(max(step, _SMALLEST), _LARGEST / (2 * last))) if step else 1.0
        return cls(bits, "tensor", symmetric, scale, 0 if symmetric else min(round(-low / scale), last))

    @property
    def codes(self) -> tuple[int, int]:
        """The first and the last code."""
        half = 2 ** (self.bits - 1) - 1
        return (-half, half) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def range(self) -> Literal["dynamic", "static"]:
        """Whether the range comes from every input itself or is stored."""
        return "dynamic" if self.scale is None else "static"

    def to_spec(self) -> dict[str, Any]:
        """The entries of a stored spec that say it; `inputs_of` reads them back."""
        if self == Inputs(self.bits):
            return {BITS_KEY: self.bits}
        told = {"bits": self.bits, "granularity": self.granularity, "symmetric": self.symmetric}
        return {KEY: told if self.scale is None else told | {"scale": self.scale, "zero": self.zero}}

    def __str__(self) -> str:
        if self == Inputs(self.bits):
            return f"inputs {self.bits} bits"
        zero = "" if self.symmetric else " with a zero point"
        return f"inputs {self.bits} bits per {self.granularity}, {self.range}{zero}"


def check_bits(bits: object, name: str = "inputs: bits") -> None:
    """Raises SchemeError unless the bits of inputs are a whole number from 2 to 16."""
    if type(bits) is not int or not 2 <= bits <= 16:
        raise SchemeError(f"{name} should be a whole number from 2 to 16, got {bits!r}")


def _check_scale(scale: object, last: int) -> None:
    """Raises SchemeError unless a step is a positive number that a float32 holds exactly, as it does the level of the
    last code.
    """
    sound = type(scale) is float and _SMALLEST <= scale <= _LARGEST / last and _as_float32(scale) == scale
    if not sound:
        raise SchemeError(f"inputs: scale should be a positive float32 (up to 2^127 / {last}), got {scale!r}")


def _as_float32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def asks_inputs(spec: dict[str, Any]) -> bool:
    """Whether a packed weight says how inputs are rounded."""
    return BITS_KEY in spec or KEY in spec


def inputs_of(spec: dict[str, Any]) -> Inputs | None:
    """What a spec says of inputs, None where it says nothing. Raises: CheckpointError for anything that
    `Inputs.to_spec` does not write.
    """
    if not asks_inputs(spec):
        return None
    try:
        if KEY not in spec:
            check_bits(spec[BITS_KEY], BITS_KEY)
            return Inputs(spec[BITS_KEY])
        told = spec[KEY]
        keys = {"bits", "granularity", "symmetric"}
        if BITS_KEY in spec or not isinstance(told, dict) or told.keys() not in (keys, keys | {"scale", "zero"}):
            raise SchemeError(
                f"inputs should be an object with {', '.join(sorted(keys))}, and scale and zero, got {told!r:.80}"
            )
        found = Inputs(**told)
        if "scale" in told and found.scale is None:
            raise SchemeError("inputs: scale should be a positive float32, got None")
        if BITS_KEY in found.to_spec():
            raise SchemeError(f"inputs per token, dynamic and symmetric are stored as {BITS_KEY}")
    except SchemeError as error:
        raise CheckpointError(f"{spec.get('kind')}: {error}") from error
    return found


def round_input(x: Tensor, inputs: Inputs, column_scale: Tensor | None = None) -> Tensor:
    """x [..., in] (per tensor, of any shape) rounded as `Inputs` says; `column_scale` [in] is its c, so that q is what
    an integer product with the stored codes would see.

    Computed in float32, returned in x's type. What is all zeros stays zero. A dynamic range that holds NaN or infinity
    makes NaN of all it is for; a static one takes infinity for its last level. Where c is 0 the weight's column is 0
    and so is the result. Gradients pass straight through to x, but not where a static range cuts it off. Cost:
    O(entries), a few passes over x.
    """
    values = x.detach().float()
    scale = None if column_scale is None else column_scale.detach().to(values)
    if scale is not None:
        values = values * scale
    step, zero = _grid(values, inputs)
    low, high = inputs.codes
    codes = (values / step).round() + zero if not inputs.symmetric else (values / step).round()
    kept = codes.clamp(low, high)
    levels = (kept - zero if not inputs.symmetric else kept) * step
    if scale is not None:
        levels = torch.where(scale == 0, 0.0, levels / scale)
    rounded = levels.to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    passed = x - x.detach()
    return rounded + (passed if inputs.scale is None else torch.where(codes == kept, passed, 0.0))


def _grid(values: Tensor, inputs: Inputs) -> tuple[Tensor | float, Tensor | float]:
    """The step d and the code z of zero for values [..., in]: numbers if they are stored, else tensors that broadcast
    over the values.
    """
    if inputs.scale is not None:
        return inputs.scale, inputs.zero
    if not values.numel():
        return 1.0, 0
    dims = (-1,) if inputs.granularity == "token" else tuple(range(values.dim()))
    low, high = inputs.codes
    if inputs.symmetric:
        step = values.abs().amax(dims, keepdim=True) / high
        return torch.where(step == 0, 1.0, step), 0
    least, most = values.amin(dims, keepdim=True).clamp(max=0), values.amax(dims, keepdim=True).clamp(min=0)
    step = (most - least) / (high - low)
    step = torch.where(step == 0, 1.0, step)
    return step, (-least / step).round().clamp(low, high)
