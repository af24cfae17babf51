"""What a Weight asks of the layer that multiplies with it, beside its matrix: to round its inputs, to add to its
outputs.
"""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.weights.base import COLUMN_SCALE, Weight, check_parts
from laconic.weights.inputs import Inputs, round_input

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Demands(nn.Module):
    """What is left of a Weight beside its matrix when it is decoded into a dense parameter: how inputs are rounded
    (`inputs`, or None for not at all; `column_scale` [in]), and what is added to outputs (`bias` [out], or None).
    """

    column_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, inputs: Inputs | None, column_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("column_scale", column_scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, weight: Weight) -> Self | None:
        """What a weight asks for, with copies of its column scale and bias in float32; None if that is nothing."""
        scale = column_scale_of(weight) if weight.inputs is not None else None
        bias = weight.output_bias()
        if weight.inputs is None and bias is None:
            return None
        return cls(weight.inputs, *(None if side is None else side.detach().float().clone() for side in (scale, bias)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Both move with the module but stay float32: the scale decides which numbers are rounded, whatever type they
        come in.
        """
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if (kept := exact[name]) is not None and moved is not None:
                self._buffers[name] = kept.to(moved.device)
        return self

    def told(self) -> str:
        """What the layer does, in words."""
        return " and ".join(
            ["rounds its inputs"] * (self.inputs is not None) + ["adds a bias to its outputs"] * (self.bias is not None)
        )

    def extra_repr(self) -> str:
        inputs = [str(self.inputs)] if self.inputs is not None else []
        return ", ".join([*inputs, *(["bias"] if self.bias is not None else [])])


class InputHook:
    """The forward pre-hook that rounds a layer's input, as a Demands or an installed Weight (as it is at that moment)
    says.
    """

    def __init__(self, source: Weight | Demands) -> None:
        self.source = source

    def __call__(
        self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (self._rounded(given[0]), *given[1:]), named
        name = next(iter(named))
        return given, named | {name: self._rounded(named[name])}

    def _rounded(self, x: Tensor) -> Tensor:
        if self.source.inputs is None:
            return x
        scale = self.source.column_scale if isinstance(self.source, Demands) else column_scale_of(self.source)
        return round_input(x, self.source.inputs, scale)


class OutputHook:
    """The forward hook that adds to a layer's output what a Demands or an installed Weight (as it is at that moment)
    says, in the output's type.
    """

    def __init__(self, source: Weight | Demands) -> None:
        self.source = source

    def __call__(self, layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = _bias(self.source)
        if bias is None:
            return output
        # their channels come before the places
        places = layer.weight.dim() - 2 if isinstance(layer, Convolution) else 0
        return output + bias.to(output).view(-1, *(1,) * places)


def _bias(source: Weight | Demands) -> Tensor | None:
    return source.bias if isinstance(source, Demands) else source.output_bias()


def column_scale_of(weight: Weight) -> Tensor | None:
    """The factors [in] that a weight's columns were divided by, which the layer's inputs are multiplied by before they
    are rounded.
    """
    scale = weight.parts().get(COLUMN_SCALE)
    return None if scale is None else scale.forward().flatten()


_CHILD = "laconic_demands"  # holds column scale and bias, so that they move and are copied with the layer


def demands_of(module: nn.Module) -> Weight | Demands | None:
    """What the module rounds its inputs by and adds to its outputs, or None."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return next((hook.source for hook in hooks if isinstance(hook, InputHook | OutputHook)), None)


def set_demands(module: nn.Module, source: Weight | Demands | None) -> None:
    """Let the module do with inputs and outputs what `source` says, instead of what it did before; None (or a Weight
    that asks for nothing) ends it.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, InputHook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, after in list(module._forward_hooks.items()):
        if isinstance(after, OutputHook):
            del module._forward_hooks[key]
    module._modules.pop(_CHILD, None)
    if source is None:
        return
    if isinstance(source, Demands):
        module.add_module(_CHILD, source)
    if source.inputs is not None:
        module.register_forward_pre_hook(InputHook(source), with_kwargs=True)
    if _bias(source) is not None:
        module.register_forward_hook(OutputHook(source))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes y = x W on the last dimension of what it is called with. GPT-2's Conv1D is known by its
    sizes, `nx` and `nf`.
    """
    like_gpt2 = type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")
    return isinstance(module, nn.Linear) or like_gpt2


def why_not(module: nn.Module, inputs: Inputs, scaled: bool = False) -> str | None:
    """Why the inputs of a module cannot be rounded so when it is called; None if they can. `scaled`: first multiplied
    by a column scale.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a look-up has no inputs to round"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its inputs cannot be rounded: it is a part of multi-head attention and never called by itself"
    if _is_linear(module):
        return None
    kind = type(module).__name__
    if not isinstance(module, Convolution):
        return f"the inputs of {kind} cannot be rounded; those of linear and convolutional layers can"
    if inputs.granularity != "tensor":
        return f"the inputs of {kind} cannot be rounded token by token; with granularity='tensor' they can"
    if scaled:
        return (
            f"the inputs of {kind} cannot be multiplied by a column scale: each of them is multiplied by many columns"
        )
    return None


def why_no_bias(module: nn.Module) -> str | None:
    """Why nothing can be added to the outputs of a module when it is called; None if it can."""
    part = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if isinstance(module, Convolution) or (_is_linear(module) and not part):
        return None
    return f"{type(module).__name__} has no place for an output bias; linear and convolutional layers have"


def check_demands(module: nn.Module, weight: Weight, name: str) -> None:
    """Raises SchemeError, with the site's name, where what a weight asks for cannot be carried out by its module."""
    try:
        check_parts(weight)
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from error
    scaled = COLUMN_SCALE in weight.parts()
    if weight.inputs is not None and (reason := why_not(module, weight.inputs, scaled)) is not None:
        raise SchemeError(
            f"{name}: {reason}; give it a rule of its own in the plan, with a method that rounds no inputs, or Keep()"
        )
    if weight.output_bias() is not None and (reason := why_no_bias(module)) is not None:
        raise SchemeError(f"{name}: {reason}; give it a rule of its own in the plan, with a method without one")
