"""Rounding of a layer's inputs while it runs: what a Weight with `input_bits` asks of the module that multiplies with it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laconic.errors import SchemeError
from laconic.weights.base import Weight, check_input_bits
from laconic.weights.compose import Scaled


def round_input(x: Tensor, bits: int, column_scale: Tensor | None = None) -> Tensor:
    """x [..., in] with every token (row) on a symmetric grid of its own, found from the token itself:

        x' = x diag(c),  d = max|x'| / (2^(bits - 1) - 1),  q = round(x' / d),  result = d q diag(1 / c)

    c [in] is the column scale of a weight stored as W diag(1 / c), so that q is what an integer product with the stored codes would see.
    Computed in float32, returned in x's type. A token of zeros stays zero, one with NaN or infinity becomes NaN; where c is 0 the weight's
    column is 0 and so is the result. Gradients pass straight through to x.
    Source: Xiao et al. 2022 (SmoothQuant), section 2 (eq. 1, per-token, dynamic) and eq. 3. Cost: O(entries), a few passes over x.
    """
    values = x.detach().float()
    scale = None if column_scale is None else column_scale.detach().to(values)
    if scale is not None:
        values = values * scale
    step = values.abs().amax(-1, keepdim=True) / _levels(bits)
    step = torch.where(step == 0, 1.0, step)
    values = (values / step).round().clamp(-_levels(bits), _levels(bits)) * step
    if scale is not None:
        values = torch.where(scale == 0, 0.0, values / scale)
    rounded = values.to(x.dtype)
    return rounded + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else rounded


def _levels(bits: int) -> int:
    return int(2 ** (bits - 1)) - 1


class Rounding(nn.Module):
    """How the inputs of a layer with a dense parameter are rounded: all that is left of a Weight's `input_bits` when it is decoded."""

    column_scale: Tensor | None

    def __init__(self, bits: int, column_scale: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("column_scale", column_scale, persistent=False)

    @classmethod
    def of(cls, weight: Weight) -> Self | None:
        """What a weight asks for, with a copy of its column scale in float32; None if it takes inputs as they are."""
        if weight.input_bits is None:
            return None
        scale = _column_scale(weight)
        return cls(weight.input_bits, None if scale is None else scale.detach().float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The scale moves with the module but stays float32: it decides which numbers are rounded, whatever type they come in."""
        exact = self.column_scale
        super()._apply(fn, recurse)
        if exact is not None and self.column_scale is not None:
            self.column_scale = exact.to(self.column_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class RoundInputs:
    """The forward pre-hook that rounds a layer's input, as a Rounding or an installed Weight (as it is at that moment) says."""

    def __init__(self, source: Weight | Rounding) -> None:
        self.source = source

    def __call__(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (self._rounded(given[0]), *given[1:]), named
        name = next(iter(named))
        return given, named | {name: self._rounded(named[name])}

    def _rounded(self, x: Tensor) -> Tensor:
        if isinstance(self.source, Rounding):
            return round_input(x, self.source.bits, self.source.column_scale)
        assert self.source.input_bits is not None
        return round_input(x, self.source.input_bits, _column_scale(self.source))


def _column_scale(weight: Weight) -> Tensor | None:
    return weight.column_scale.forward().flatten() if isinstance(weight, Scaled) and weight.column_scale is not None else None


_CHILD = "input_rounding"  # holds the column scale, so that it moves and is copied with the layer


def rounding_of(module: nn.Module) -> Weight | Rounding | None:
    """What the module rounds its inputs by, or None."""
    return next((hook.source for hook in module._forward_pre_hooks.values() if isinstance(hook, RoundInputs)), None)


def set_rounding(module: nn.Module, source: Weight | Rounding | None) -> None:
    """Let the module round its inputs as `source` says, instead of what it did before; None (or a Weight without `input_bits`) ends it."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, RoundInputs):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    module._modules.pop(_CHILD, None)
    if source is None or (isinstance(source, Weight) and source.input_bits is None):
        return
    if isinstance(source, Rounding):
        module.add_module(_CHILD, source)
    module.register_forward_pre_hook(RoundInputs(source), with_kwargs=True)


def why_not(module: nn.Module) -> str | None:
    """Why the inputs of a module cannot be rounded when it is called; None if they can."""
    if isinstance(module, nn.Embedding):
        return "a look-up has no inputs to round"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its inputs cannot be rounded: it is a part of multi-head attention and never called by itself"
    if isinstance(module, nn.Linear | Conv1D):
        return None
    return f"the inputs of {type(module).__name__} cannot be rounded; linear layers only"


def check_rounding(module: nn.Module, weight: Weight, name: str) -> None:
    """Raises SchemeError, with the site's name, where a weight's `input_bits` cannot be carried out by its module."""
    try:
        check_input_bits(weight)
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from error
    if weight.input_bits is not None and (reason := why_not(module)) is not None:
        raise SchemeError(f"{name}: {reason}; leave input_bits out there")
