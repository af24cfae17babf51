"""What a Weight asks of the layer that multiplies with it while it runs: to round its inputs (`input_bits`), to add to its outputs."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laconic.errors import SchemeError
from laconic.weights.base import Weight, check_parts
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
    """What is left of a Weight beside its matrix when it is decoded into a dense parameter: how inputs are rounded (`bits`, or None for not at
    all; `column_scale` [in]), and what is added to outputs (`bias` [out], or None)."""

    column_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, bits: int | None, column_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("column_scale", column_scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, weight: Weight) -> Self | None:
        """What a weight asks for, with copies of its column scale and bias in float32; None if that is nothing."""
        scale = _column_scale(weight) if weight.input_bits is not None else None
        bias = weight.output_bias()
        if weight.input_bits is None and bias is None:
            return None
        return cls(
            weight.input_bits, *(None if side is None else side.detach().float().clone() for side in (scale, bias))
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Both move with the module but stay float32: the scale decides which numbers are rounded, whatever type they come in."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if (kept := exact[name]) is not None and moved is not None:
                self._buffers[name] = kept.to(moved.device)
        return self

    def told(self) -> str:
        """What the layer does, in words."""
        return " and ".join(
            ["rounds its inputs"] * (self.bits is not None) + ["adds a bias to its outputs"] * (self.bias is not None)
        )

    def extra_repr(self) -> str:
        inputs = [f"{self.bits} bits"] if self.bits is not None else []
        return ", ".join([*inputs, *(["bias"] if self.bias is not None else [])])


class RoundInputs:
    """The forward pre-hook that rounds a layer's input, as a Rounding or an installed Weight (as it is at that moment) says."""

    def __init__(self, source: Weight | Rounding) -> None:
        self.source = source

    def __call__(
        self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (self._rounded(given[0]), *given[1:]), named
        name = next(iter(named))
        return given, named | {name: self._rounded(named[name])}

    def _rounded(self, x: Tensor) -> Tensor:
        given = isinstance(self.source, Rounding)
        bits = self.source.bits if isinstance(self.source, Rounding) else self.source.input_bits
        assert bits is not None
        return round_input(x, bits, self.source.column_scale if given else _column_scale(self.source))  # type: ignore[arg-type]


class AddBias:
    """The forward hook that adds to a layer's output what a Rounding or an installed Weight (as it is at that moment) says, in the output's type."""

    def __init__(self, source: Weight | Rounding) -> None:
        self.source = source

    def __call__(self, layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = self.source.bias if isinstance(self.source, Rounding) else self.source.output_bias()
        assert bias is not None
        spatial = (
            layer.weight.dim() - 2 if isinstance(layer, nn.modules.conv._ConvNd) else 0
        )  # their channels come before the places
        return output + bias.to(output).view(-1, *(1,) * spatial)


def _column_scale(weight: Weight) -> Tensor | None:
    return (
        weight.column_scale.forward().flatten()
        if isinstance(weight, Scaled) and weight.column_scale is not None
        else None
    )


_CHILD = "input_rounding"  # holds the column scale, so that it moves and is copied with the layer


def rounding_of(module: nn.Module) -> Weight | Rounding | None:
    """What the module rounds its inputs by and adds to its outputs, or None."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return next((hook.source for hook in hooks if isinstance(hook, RoundInputs | AddBias)), None)


def set_rounding(module: nn.Module, source: Weight | Rounding | None) -> None:
    """Let the module do with inputs and outputs what `source` says, instead of what it did before; None (or a Weight that asks for nothing)
    ends it."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, RoundInputs):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, after in list(module._forward_hooks.items()):
        if isinstance(after, AddBias):
            del module._forward_hooks[key]
    module._modules.pop(_CHILD, None)
    if source is None:
        return
    if isinstance(source, Rounding):
        module.add_module(_CHILD, source)
    if (source.bits if isinstance(source, Rounding) else source.input_bits) is not None:
        module.register_forward_pre_hook(RoundInputs(source), with_kwargs=True)
    if (source.bias if isinstance(source, Rounding) else source.output_bias()) is not None:
        module.register_forward_hook(AddBias(source))


def why_not(module: nn.Module) -> str | None:
    """Why the inputs of a module cannot be rounded when it is called; None if they can."""
    if isinstance(module, nn.Embedding):
        return "a look-up has no inputs to round"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its inputs cannot be rounded: it is a part of multi-head attention and never called by itself"
    if isinstance(module, nn.Linear | Conv1D):
        return None
    return f"the inputs of {type(module).__name__} cannot be rounded; linear layers only"


def why_no_bias(module: nn.Module) -> str | None:
    """Why nothing can be added to the outputs of a module when it is called; None if it can."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) or (
        isinstance(module, nn.Linear | Conv1D) and why_not(module) is None
    ):
        return None
    return f"{type(module).__name__} has no place for an output bias; linear and convolutional layers have"


def check_rounding(module: nn.Module, weight: Weight, name: str) -> None:
    """Raises SchemeError, with the site's name, where what a weight asks for cannot be carried out by its module."""
    try:
        check_parts(weight)
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from error
    if weight.input_bits is not None and (reason := why_not(module)) is not None:
        raise SchemeError(
            f"{name}: {reason}; give it a rule of its own in the plan, with a method that rounds no inputs, or Keep()"
        )
    if weight.output_bias() is not None and (reason := why_no_bias(module)) is not None:
        raise SchemeError(f"{name}: {reason}; give it a rule of its own in the plan, with a method without one")
