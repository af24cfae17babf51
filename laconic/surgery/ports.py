"""Where a channel passes through a module: which of its tensors hold the channel, and how it is cut out of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Conv = nn.modules.conv._ConvNd
Norm = nn.modules.batchnorm._NormBase  # batch norms and instance norms


@dataclass(frozen=True, eq=False)
class Port:
    """One side of a module: "out", "in", "through" (norms, grouped convolutions), or "parameter:dimension" of a tensor
    it holds itself.

    `ids` [n] int64: the channel of every index; -1 stays. Indices of grouped modules are groups, not entries.
    """

    path: str
    side: str
    ids: Tensor


@dataclass(frozen=True)
class Parts:
    """The tensors a port indexes, as (name, dimension) pairs, and the counts that follow its size."""

    tensors: tuple[tuple[str, int], ...]
    counts: tuple[str, ...] = ()


def sides(module: nn.Module) -> tuple[str, ...]:
    """The sides on which a module can be cut; none for a module that is not known."""
    if (isinstance(module, Conv) and module.groups > 1) or isinstance(module, Norm | nn.GroupNorm):
        return ("through",)
    if isinstance(module, nn.PReLU):
        return ("through",) if module.num_parameters > 1 else ()
    return ("out", "in") if isinstance(module, nn.Linear | Conv | Conv1D) else ()


def parts(module: nn.Module, side: str) -> Parts:
    """What a cut on that side changes."""
    if ":" in side:
        name, dimension = side.split(":")
        return Parts(((name, int(dimension)),))
    if isinstance(module, Norm):
        return Parts((("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0)), ("num_features",))
    if isinstance(module, nn.GroupNorm):
        return Parts((("weight", 0), ("bias", 0)), ("num_groups", "num_channels"))
    if isinstance(module, nn.PReLU):
        return Parts((("weight", 0),), ("num_parameters",))
    if isinstance(module, Conv) and module.groups > 1:
        return Parts((("weight", 0), ("bias", 0)), ("in_channels", "out_channels", "groups"))
    # these hold [in, out, ...]
    flipped = isinstance(module, Conv1D) or (isinstance(module, Conv) and module.transposed)
    out, into = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    if isinstance(module, Conv):
        out, into = "out_channels", "in_channels"
    if side == "out":
        return Parts((("weight", int(flipped)), ("bias", 0)), (out,))
    return Parts((("weight", int(not flipped)),), (into,))


def extent(module: nn.Module, side: str) -> int:
    """How many indices a port has: entries, or groups of a grouped module."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, Norm):
        return module.num_features
    if isinstance(module, Conv) and module.groups > 1:
        return module.groups
    name, dimension = parts(module, side).tensors[0]
    return getattr(module, name).shape[dimension]


def held(module: nn.Module, side: str) -> Iterator[tuple[str, int, Tensor, int]]:
    """(name, dimension, tensor, entries per index) of every tensor the port indexes."""
    n = extent(module, side)
    for name, dimension in parts(module, side).tensors:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            yield name, dimension, tensor, tensor.shape[dimension] // n


def spread(indices: Tensor, block: int) -> Tensor:
    """The entries [n x block] that belong to some indices [n], when each index has `block` entries."""
    return (indices[:, None] * block + torch.arange(block)).flatten()


def produces(module: nn.Module, side: str) -> bool:
    """Whether the rows of the module's weight decide what the channel says."""
    return side == "out" or (side == "through" and isinstance(module, Conv))


def speaks(module: nn.Module, side: str) -> Tensor:
    """[n] bool: the indices for which any entry of the weight is not zero."""
    _, dimension, weight, block = next(held(module, side))
    rows = weight.detach().transpose(0, dimension).reshape(weight.shape[dimension] // block, -1)
    return (rows != 0).any(1).cpu()


@torch.no_grad()
def hush(module: nn.Module, side: str, indices: Tensor) -> None:
    """Set to zero what else than its weight rows makes the channels `indices` [n] speak: biases, and scale, shift and
    mean of norms."""
    for name, dimension, tensor, block in held(module, side):
        if name != "running_var" and not (name == "weight" and produces(module, side)):
            tensor.index_fill_(dimension, spread(indices, block).to(tensor.device), 0)


Made = dict[tuple[int, int, bytes], Tensor]
"""Cut tensors by what they were cut from, so that a tie stays one parameter."""


@torch.no_grad()
def cut(module: nn.Module, side: str, keep: Tensor, made: Made) -> None:
    """Keep only some indices `keep` [n] of a port, in order; tensors are replaced, counts follow."""
    before = extent(module, side)
    changed = parts(module, side)
    for name, dimension, tensor, block in list(held(module, side)):
        key = (id(tensor), dimension, keep.numpy().tobytes())
        if key not in made:
            slim = tensor.detach().index_select(dimension, spread(keep, block).to(tensor.device))
            made[key] = nn.Parameter(slim, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else slim
            made[(id(made[key]), -1, b"")] = tensor  # what was cut stays alive, so that no other tensor gets its id
        setattr(module, name, made[key])
    for name in changed.counts:
        setattr(module, name, getattr(module, name) // before * len(keep))
