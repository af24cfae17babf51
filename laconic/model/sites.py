"""Every compressible tensor of a model, found by structure: where it lives, how it is seen as a matrix, and what is
known of its input."""

import enum
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from laconic.errors import CheckpointError
from laconic.model.roles import Role, head_modules, router_parameters
from laconic.model.usage import Use, Uses, is_marked, uses_on_meta
from laconic.weights import View
from laconic.weights.install import installations


class Stats(enum.Flag):
    """What a method needs to know of a site, beyond its values."""

    HESSIAN = enum.auto()
    """X^T X / n of the site's input X [tokens, in], per group."""
    SQUARES = enum.auto()
    """Its diagonal only: the mean square of every input column."""
    MEAN = enum.auto()
    """The mean |x| of every input column."""
    MAX = enum.auto()
    """The largest |x| of every input column."""
    FISHER = enum.auto()
    """E[(dL / dW)^2] over sequences, entry by entry."""
    OUTPUT_FISHER = enum.auto()
    """E[(dL / dy)^2] over tokens, per row of W: how much the loss minds an error of that output."""
    CENTRE = enum.auto()
    """The mean x of every input column, with its sign."""
    RANGE = enum.auto()
    """The smallest and the largest x of every input column, with their signs, 0 included."""
    SAMPLE = enum.auto()
    """Some rows of the inputs, drawn evenly from all that came."""
    USES = enum.auto()
    """How often each row of an embedding was looked up."""
    CHANNELS = enum.auto()
    """Which rows are one channel of the network, across sites; known to modules in memory only (`surgery.couple`)."""


NONE = Stats(0)
INPUTS = Stats.HESSIAN | Stats.SQUARES | Stats.MEAN | Stats.MAX | Stats.CENTRE | Stats.RANGE | Stats.SAMPLE | Stats.USES
GRADIENTS = Stats.FISHER | Stats.OUTPUT_FISHER
MEASURED = INPUTS | GRADIENTS  # what a model has to be run for


@dataclass(frozen=True)
class Slot:
    """Where a compressible tensor lives. `users` are the (module path, parameter name) pairs that share it: more than
    one for a tie.

    `groups` row groups have inputs of their own (grouped convolutions, packed experts). `role` says what it is for (see
    `roles`).
    """

    name: str
    users: tuple[tuple[str, str], ...]
    view: View
    groups: int = 1
    role: Role = "body"

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.matrix_shape

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def block(self) -> int:
        """The first number in the site's name, which in a chain of blocks is the block's; -1 outside."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), -1)

    @property
    def names(self) -> tuple[str, ...]:
        """The names a plan can address the site by: one per user."""
        return tuple(site_name(path, parameter) for path, parameter in self.users)

    @property
    def parameter(self) -> str:
        """The dotted name of the parameter, as in a state dict."""
        return ".".join(part for part in self.users[0] if part)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The dotted names of the parameter: one per user."""
        return tuple(".".join(part for part in user if part) for user in self.users)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that use the tensor."""
        return [model.get_submodule(path) for path, _ in self.users]


@dataclass(frozen=True)
class Site:
    """What a method sees: W [out, in] and the statistics it asked for. Methods may not change W; `notes` collects what
    the user must hear.

    `hessian` [groups, in, in], `squares`, `magnitude` (mean |x|), `peak` (largest |x|), `centre` (mean x), `low` and
    `high` (smallest and largest x, 0 included) [groups, in], `sample` [rows, in] of the inputs of all groups, `tokens`
    [groups], `fisher` [out, in], `output_fisher` and `uses` (look-ups) [out]; None where not asked for. `input`: sites
    that read one tensor have the same number; None where no input was summed. `mask` [out, in] says which entries an
    earlier method kept; `values_dtype` is the type pruning keeps values in (float32 when another method encodes them
    afterwards). `dims` is the parameter's own shape (four numbers for a 2-D convolution); empty where only the matrix
    is known. `channels` [out] int64: rows of any site with the same number are one channel of the network and are cut
    together; -1 may not be cut. `role` is that of the slot. `unseen` says why nothing is known of its inputs, if so,
    and `unmeasured` of which share of its entries (see `unmeasured.completed`).
    """

    name: str
    W: Tensor
    groups: int = 1
    hessian: Tensor | None = None
    squares: Tensor | None = None
    magnitude: Tensor | None = None
    peak: Tensor | None = None
    centre: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    sample: Tensor | None = None
    uses: Tensor | None = None
    tokens: Tensor | None = None
    fisher: Tensor | None = None
    output_fisher: Tensor | None = None
    input: int | None = None
    mask: Tensor | None = None
    values_dtype: str = "bfloat16"
    dims: tuple[int, ...] = ()
    channels: Tensor | None = None
    role: Role = "body"
    unseen: str = "no calibration input reached it"
    unmeasured: float = 0.0
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def having(self, **changes: object) -> "Site":
        """A site that differs in some fields and shares the list of notes."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def generator(self) -> torch.Generator:
        """A private generator that depends on the run's seed and this site's name only."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @property
    def importance(self) -> Tensor | None:
        """How much an error in a column counts, [out or 1, in]: the mean square of its input; None when nothing is
        known."""
        squares = self.squares
        if self.hessian is not None:
            squares = self.hessian.diagonal(dim1=1, dim2=2)
        if squares is None:
            return None
        return squares.repeat_interleave(self.W.shape[0] // self.groups, 0) if self.groups > 1 else squares


def site_name(path: str, parameter: str) -> str:
    """A site's name: its module's path, with the parameter's name unless that is "weight"."""
    return path if parameter == "weight" and path else f"{path}.{parameter}".lstrip(".")


def find_slots(model: nn.Module, uses: Mapping[str, Use] | None = None) -> list[Slot]:
    """The compressible tensors of a model in module order, tensors on the meta device included; ties are found by
    identity.

    Sure by their modules: Linear, Conv1d, Conv2d, Conv3d, GPT-2's Conv1D, Embedding and EmbeddingBag weights, those of
    recurrent layers (a gate's rows below the other's), the input projections of MultiheadAttention, experts of
    transformers whose class says how they multiply, and routers. Any other parameter of two dimensions or more is a
    site only if a product shows which matrix it is: `uses` by parameter name, as seen in a run (`uses_of`) or as
    stored; None: as a run of a transformers model on the meta device shows. A parametrized tensor is not a slot.
    """
    sure, open_ones = _by_module(model)
    if uses is None:
        uses = uses_on_meta(model, open_ones).found() if open_ones and hasattr(model, "config") else {}
    heads, routers = head_modules(model), router_parameters(model)
    found: dict[int, Slot] = {}
    for path, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            name = f"{path}.{parameter}".lstrip(".")
            use = uses.get(name) if name in open_ones else sure.get(name)
            if use is None:
                continue
            role: Role = "body"
            if use.looked_up:
                role = "embedding"
            elif module in heads:
                role = "head"
            elif (path, parameter) in routers:
                role = "router"
            if id(tensor) in found:
                first = found[id(tensor)]
                found[id(tensor)] = replace(
                    first, users=(*first.users, (path, parameter)), role="embedding" if use.looked_up else first.role
                )
            else:
                found[id(tensor)] = Slot(site_name(path, parameter), ((path, parameter),), use.view, use.groups, role)
    return list(found.values())


def uses_of(model: nn.Module, run: Callable[[], object]) -> Uses:
    """What products show, while `run()` runs the model once, of the parameters whose modules do not say it."""
    open_ones = _by_module(model)[1]
    uses = Uses(open_ones)
    with torch.no_grad(), uses if open_ones else nullcontext():
        run()
    return uses


def views_of(model: nn.Module, slots: Iterable[Slot]) -> dict[str, Any]:
    """The manifest's field "views": those that only use could tell, by parameter name; empty where there are none."""
    open_ones = _by_module(model)[1]
    views = {name: slot.view.as_dict() for slot in slots for name in slot.parameters if name in open_ones}
    return {"views": views} if views else {}


def views_in(model: nn.Module) -> dict[str, Any]:
    """`views_of` a module whose Weights are installed."""
    known = (
        nn.Linear
        | nn.Embedding
        | nn.EmbeddingBag
        | nn.modules.conv._ConvNd
        | nn.RNNBase
        | nn.RNNCellBase
        | nn.MultiheadAttention
        | Conv1D
    )
    views = {
        name: chain.view.as_dict()
        for name, (module, chain) in installations(model).items()
        if not isinstance(module, known) and not is_marked(module)
    }
    return {"views": views} if views else {}


def stored_uses(model: nn.Module, views: Any, weights: Iterable[str]) -> dict[str, Use]:
    """The uses of a stored model's parameters: by its manifest's `views`, or, where it is older than they are, by shape
    as it was written then.

    Raises: CheckpointError for a view that does not fit the parameter.
    """
    if not isinstance(views, Mapping):
        raise CheckpointError(f"the manifest's views should be an object, got {views!r:.80}")
    open_ones, found = _by_module(model)[1], {}
    for name in weights:
        if name not in open_ones:
            continue
        shape = tuple(open_ones[name].shape)
        if name in views:
            found[name] = Use(_stored_view(name, shape, views[name]))
        elif len(shape) == 3:
            found[name] = Use(View(shape, lead=2), shape[0])
    return found


def _stored_view(name: str, shape: tuple[int, ...], stored: Any) -> View:
    lead, transposed, dims = (
        (stored.get(key) for key in ("lead", "transposed", "dims")) if isinstance(stored, dict) else (None, None, None)
    )
    laid = shape if dims is None else dims
    sized = (
        isinstance(laid, list | tuple)
        and all(type(n) is int and n > 0 for n in laid)
        and math.prod(laid) == math.prod(shape)
    )
    if sized and isinstance(lead, int) and isinstance(transposed, bool) and 0 < lead < len(laid):
        return View(shape, lead, transposed, None if dims is None else tuple(laid))
    raise CheckpointError(f"{name}: the manifest's view {stored!r} does not fit a parameter of shape {list(shape)}")


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every distinct parameter: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _by_module(model: nn.Module) -> tuple[dict[str, Use], dict[str, Tensor]]:
    """The parameters whose modules say which matrices they are, and the others that may be one, by name."""
    routers = router_parameters(model)
    sure: dict[str, Use] = {}
    open_ones: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            if not tensor.is_floating_point() or tensor.dim() < 2:
                continue
            name = f"{path}.{parameter}".lstrip(".")
            use = _see(module, parameter, tensor)
            if use is None and (path, parameter) in routers:
                use = Use(View(tuple(tensor.shape)))
            if use is not None:
                sure[name] = use
            elif not type(module).__module__.startswith("torch.nn.modules"):
                open_ones[name] = tensor
    return sure, open_ones


def _see(module: nn.Module, parameter: str, tensor: Tensor) -> Use | None:
    """The matrix that a parameter of a known module is, or None."""
    shape = tuple(tensor.shape)
    if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
        return Use(View(shape), looked_up=not isinstance(module, nn.Linear)) if parameter == "weight" else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Use(View(shape), module.groups) if parameter == "weight" else None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Use(View(shape)) if parameter.startswith("weight_") else None
    if isinstance(module, nn.MultiheadAttention):
        return Use(View(shape)) if parameter.endswith("proj_weight") else None
    if isinstance(module, Conv1D):
        return Use(View(shape, transposed=True)) if parameter == "weight" else None
    if is_marked(module) and tensor.dim() == 3:
        return Use(View(shape, lead=2, transposed=bool(module.is_transposed)), shape[0])
    return None
