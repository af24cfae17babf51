"""How a tensor of a module is seen as a matrix, and how a Weight takes its place."""

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.errors import SchemeError
from laconic.weights.base import Weight
from laconic.weights.demands import Demands, check_demands, set_demands


@dataclass(frozen=True)
class View:
    """A parameter of `shape` seen as W [out, in]: the first `lead` dimensions are rows, the others columns.

    `transposed` swaps the last two dimensions first, for layers that compute x W (GPT-2's Conv1D, some packed experts).
    `dims`, if given, is what the parameter is reshaped to before: the matrices a flat parameter holds below one
    another, say.
    """

    shape: tuple[int, ...]
    lead: int = 1
    transposed: bool = False
    dims: tuple[int, ...] | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        dims = self._turned
        return math.prod(dims[: self.lead]), math.prod(dims[self.lead :])

    @property
    def laid(self) -> tuple[int, ...]:
        """The dimensions in which the parameter is read."""
        return self.shape if self.dims is None else self.dims

    @property
    def _turned(self) -> tuple[int, ...]:
        return (*self.laid[:-2], self.laid[-1], self.laid[-2]) if self.transposed else self.laid

    def turned(self, parameter: Tensor) -> Tensor:
        """The parameter with its outputs before its inputs; of more than two dimensions where it holds several matrices
        or a kernel."""
        laid = parameter if self.dims is None else parameter.reshape(self.dims)
        return laid.transpose(-1, -2) if self.transposed else laid

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter as [out, in]; no copy where strides allow."""
        return self.turned(parameter).reshape(self.matrix_shape)

    def restore(self, W: Tensor) -> Tensor:
        """The inverse of `matrix`: the parameter, in its own shape, of W [out, in]."""
        turned = W.reshape(self._turned)
        laid = turned.transpose(-1, -2) if self.transposed else turned
        return laid if self.dims is None else laid.reshape(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """The view as plain values; the shape is the parameter's own."""
        found: dict[str, Any] = {"lead": self.lead, "transposed": self.transposed}
        return found if self.dims is None else found | {"dims": list(self.dims)}


class Installed(nn.Module):
    """The parametrization that puts a Weight in a parameter's place, in that parameter's own shape and type (which
    follows the module's)."""

    like: Tensor

    def __init__(self, weight: Weight, view: View, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.view = weight, view
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self) -> Tensor:
        kind = self.like.device.type
        if torch.is_autocast_enabled(kind):  # which would round the factors of a weight before they are multiplied
            with torch.autocast(kind, enabled=False):
                return self.view.restore(self.weight()).to(self.like.dtype)
        return self.view.restore(self.weight()).to(self.like.dtype)

    def right_inverse(self, value: Tensor) -> tuple[()]:
        return self.weight.right_inverse(self.view.matrix(value))


def install(module: nn.Module, name: str, weight: Weight, view: View) -> None:
    """Let `weight` take the place of `module.name`: reading decodes it, assigning projects onto its set. Its codes are
    not touched.

    With `inputs` the module rounds its inputs from now on, with an `output_bias` it adds that; without, it does not any
    more. A tie is installed by calling this once per user with the same Weight object. A Weight that is installed
    already is replaced. Raises: SchemeError where the module can do no such thing, or the parameter has another
    parametrization.
    """
    check_demands(module, weight, f"{type(module).__name__}.{name}")
    installed = Installed(weight, view, getattr(module, name).dtype)
    chain = module.parametrizations[name] if parametrize.is_parametrized(module, name) else None  # type: ignore[index]
    if isinstance(chain, parametrize.ParametrizationList):
        if len(chain) > 1 or not isinstance(chain[0], Installed):
            raise SchemeError(
                f"{type(module).__name__}.{name}: has a parametrization of its own; remove it before a Weight "
                "takes its place"
            )
        chain[0] = installed
        set_demands(module, weight)
        return
    # torch projects the present value at registration; the codes are solved already, so that one call must do nothing
    installed.right_inverse = lambda value: ()  # type: ignore[method-assign]
    parametrize.register_parametrization(module, name, installed, unsafe=True)
    del installed.right_inverse
    set_demands(module, weight)


def installed(module: nn.Module) -> dict[str, Weight]:
    """Every Weight installed below `module`, by the dotted name of the parameter it replaces; a tie appears under each
    of its names."""
    return {name: chain.weight for name, (_, chain) in installations(module).items()}


def installations(module: nn.Module) -> dict[str, tuple[nn.Module, Installed]]:
    """The module that holds each parameter of `installed`, and what stands in its place."""
    found: dict[str, tuple[nn.Module, Installed]] = {}
    for prefix, child in module.named_modules():
        if isinstance(getattr(child, "parametrizations", None), nn.ModuleDict):
            for name, chain in child.parametrizations.items():
                if isinstance(chain, nn.ModuleList) and isinstance(chain[0], Installed):
                    found[f"{prefix}.{name}" if prefix else name] = child, chain[0]
    return found


def bake(module: nn.Module) -> None:
    """Replace every installed Weight below `module` by the dense parameter it decodes to; ties stay one parameter.

    What is computed stays the same: a layer that rounds its inputs goes on doing so, and an output bias goes into the
    layer's own bias where it has one to itself (up to the rounding of that sum) and is added as before where not. The
    parameters require a gradient, as those of any module do: torch chooses products by that flag even where no gradient
    is taken, and a frozen LSTM's decoder ran at 3/4 of its speed.
    """
    dense: dict[int, nn.Parameter] = {}
    biases = Counter(
        id(child._parameters["bias"]) for child in module.modules() if child._parameters.get("bias") is not None
    )
    for child in list(module.modules()):
        if not isinstance(getattr(child, "parametrizations", None), nn.ModuleDict):
            continue
        own_class(child)
        chains: Any = child.parametrizations
        for name, chain in list(chains.items()):
            if isinstance(chain[0], Installed):
                with torch.no_grad():
                    key = id(chain[0].weight)
                    if key not in dense:
                        dense[key] = nn.Parameter(getattr(child, name).detach().contiguous())
                    demands = Demands.of(chain[0].weight)
                parametrize.remove_parametrizations(child, name)
                setattr(child, name, dense[key])
                # what two layers share would take up both their biases
                alone = biases[id(child._parameters.get("bias"))] == 1
                set_demands(child, _into_own_bias(child, demands) if alone else demands)


def _into_own_bias(layer: nn.Module, demands: Demands | None) -> Demands | None:
    """What is left to be done when the layer runs, after its own bias has taken up the output bias."""
    own = getattr(layer, "bias", None)
    if demands is None or demands.bias is None or not isinstance(own, nn.Parameter):
        return demands
    with torch.no_grad():
        own.add_(demands.bias.to(own))
    return Demands(demands.inputs, demands.column_scale) if demands.inputs is not None else None


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: a deep copy shares the one torch made, and removal would take the
    original's property."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def baked(module: nn.Module) -> nn.Module:
    """A copy in which every installed Weight is the dense parameter it decodes to."""
    decoded = copy.deepcopy(module)
    bake(decoded)
    return decoded
