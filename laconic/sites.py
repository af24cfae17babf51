"""Every compressible tensor of a model, found by structure: where it lives, how it is seen as a matrix, and what is known of its input."""

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from laconic.roles import Role, head_modules, router_parameters
from laconic.weights import View


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
    OUTPUT = enum.auto()
    """E[(dL / dy)^2] over tokens, per row of W: how much the loss minds an error of that output."""
    CENTRE = enum.auto()
    """The mean x of every input column, with its sign."""
    USES = enum.auto()
    """How often each row of an embedding was looked up."""
    CHANNELS = enum.auto()
    """Which rows are one channel of the network, across sites; known to modules in memory only (`surgery.couple`)."""


NONE = Stats(0)
INPUTS = Stats.HESSIAN | Stats.SQUARES | Stats.MEAN | Stats.MAX | Stats.CENTRE | Stats.USES
GRADIENTS = Stats.FISHER | Stats.OUTPUT
MEASURED = INPUTS | GRADIENTS  # what a model has to be run for


@dataclass(frozen=True)
class Slot:
    """Where a compressible tensor lives. `users` are the (module path, parameter name) pairs that share it: more than one for a tie.

    `groups` row groups have inputs of their own (grouped convolutions, packed experts). `role` says what it is for (see `roles`).
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

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that use the tensor."""
        return [model.get_submodule(path) for path, _ in self.users]


@dataclass(frozen=True)
class Site:
    """What a method sees: W [out, in] and the statistics it asked for. Methods may not change W; `notes` collects what the user must hear.

    `hessian` [groups, in, in], `squares`, `magnitude` (mean |x|), `peak` (largest |x|) and `centre` (mean x) [groups, in], `tokens` [groups],
    `fisher` [out, in], `output` and `uses` (look-ups) [out]; None where not asked for. `input`: sites that read one tensor have the
    same number; None where no input was summed.
    `mask` [out, in] says which entries an earlier method kept; `values_dtype` is the type pruning keeps values in (float32 when another method
    encodes them afterwards). `dims` is the parameter's own shape (four numbers for a 2-D convolution);
    empty where only the matrix is known. `channels` [out] int64: rows of any site with the same number are one channel of the network and
    are cut together; -1 may not be cut. `role` is that of the slot. `unseen` says why nothing is known of its inputs, if so, and `unmeasured`
    of which share of its entries (see `unmeasured.completed`).
    """

    name: str
    W: Tensor
    groups: int = 1
    hessian: Tensor | None = None
    squares: Tensor | None = None
    magnitude: Tensor | None = None
    peak: Tensor | None = None
    centre: Tensor | None = None
    uses: Tensor | None = None
    tokens: Tensor | None = None
    fisher: Tensor | None = None
    output: Tensor | None = None
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
        """How much an error in a column counts, [out or 1, in]: the mean square of its input; None when nothing is known."""
        squares = self.squares
        if self.hessian is not None:
            squares = self.hessian.diagonal(dim1=1, dim2=2)
        if squares is None:
            return None
        return squares.repeat_interleave(self.W.shape[0] // self.groups, 0) if self.groups > 1 else squares


def site_name(path: str, parameter: str) -> str:
    """A site's name: its module's path, with the parameter's name unless that is "weight"."""
    return path if parameter == "weight" and path else f"{path}.{parameter}".lstrip(".")


def find_slots(model: nn.Module) -> list[Slot]:
    """The compressible tensors of a model in module order, tensors on the meta device included; ties are found by identity.

    Linear, Conv1d, Conv2d, GPT-2's Conv1D and Embedding weights, those of recurrent layers (a gate's rows below the other's) and the input
    projections of MultiheadAttention, and packed experts: three-dimensional parameters held by any other module. A parametrized tensor is
    not a slot.
    """
    heads, routers = head_modules(model), router_parameters(model)
    found: dict[int, Slot] = {}
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            user = (path, parameter)
            seen = _see(module, parameter, tensor)
            if seen is None and user in routers and tensor.is_floating_point():
                seen = View(tuple(tensor.shape)), 1
            if seen is None:
                continue
            view, groups = seen
            if id(tensor) in found:
                first = found[id(tensor)]
                tied_role: Role = "embedding" if isinstance(module, nn.Embedding) else first.role
                found[id(tensor)] = replace(first, users=(*first.users, user), role=tied_role)
                continue
            role: Role = "embedding" if isinstance(module, nn.Embedding) else "head" if module in heads else "router" if user in routers else "body"
            found[id(tensor)] = Slot(site_name(path, parameter), (user,), view, groups, role)
    return list(found.values())


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every distinct parameter: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _see(module: nn.Module, parameter: str, tensor: Tensor) -> tuple[View, int] | None:
    """The matrix view and number of groups of a compressible parameter, or None."""
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if isinstance(module, nn.Linear | nn.Embedding):
        return (View(shape), 1) if parameter == "weight" else None
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return (View(shape), module.groups) if parameter == "weight" else None
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (View(shape), 1) if parameter.startswith("weight_") else None
    if isinstance(module, nn.MultiheadAttention):
        return (View(shape), 1) if parameter.endswith("proj_weight") else None
    if isinstance(module, Conv1D):
        return (View(shape, transposed=True), 1) if parameter == "weight" else None
    if tensor.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd | nn.modules.conv._ConvTransposeNd) and min(shape[1:]) > 1:
        transposed = bool(getattr(module, "is_transposed", False))  # transformers marks experts that compute x W this way
        return View(shape, lead=2, transposed=transposed), shape[0]
    return None


def uncompressed(model: nn.Module, slots: Sequence[Slot]) -> list[tuple[str, tuple[int, ...], int, str]]:
    """What no method is offered: (name, shape, entries, reason in words) of every parameter of two dimensions or more that is no site.

    Ties appear once. Cost: a walk over the modules.
    """
    sites = {user for slot in slots for user in slot.users}
    taken = {id(getattr(model.get_submodule(path), name)) for path, name in sites}
    found: list[tuple[str, tuple[int, ...], int, str]] = []
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.dim() < 2 or id(tensor) in taken:
                continue
            taken.add(id(tensor))
            found.append((f"{path}.{name}".lstrip("."), tuple(tensor.shape), tensor.numel(), _why_not(module, tensor)))
    return found


def _why_not(module: nn.Module, tensor: Tensor) -> str:
    """Why a parameter is no site, in words."""
    if isinstance(module, parametrize.ParametrizationList):
        return "a parametrization's own tensor"
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')} values"
    if type(module).__module__.startswith("torch."):
        return f"of a layer that is not supported, {type(module).__name__}"
    return f"a parameter of {type(module).__name__} that is not known to multiply anything"
