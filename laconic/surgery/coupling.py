"""Channels as values: which rows are one, what holds them, which are dead, and how they are taken out."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.errors import SurgeryError
from laconic.surgery.ports import Made, Port, cut, extent, produces, speaks

Count = tuple[str, str, int]
"""An attribute that follows the number of channels: (module path, name, per channel)."""


@dataclass(frozen=True)
class Group:
    """Channels that pass through the same layers. `ids`: the first and the one past the last; `layers`: those whose
    rows make the channels.

    `kind` is the first layer with the numbers in its path left out: equal across blocks. `heads`: each channel is a
    group of attention heads. `by_input`: a channel that no layer reads may be cut too.
    """

    kind: str
    layers: tuple[str, ...]
    ids: tuple[int, int]
    heads: bool = False
    by_input: bool = True
    counts: tuple[Count, ...] = ()

    def __len__(self) -> int:
        return self.ids[1] - self.ids[0]

    def among(self, ids: Tensor) -> Tensor:
        """[n] bool: which of some channels are this group's."""
        return (ids >= self.ids[0]) & (ids < self.ids[1])


@dataclass(frozen=True, eq=False)
class Coupling:
    """The channels of a network that may be cut.

    `channels`: site name -> int64 [out]: rows with the same number, in any site, are one channel; -1 stays. `ports`:
    all that holds them. `refused`: what cannot be cut and why, a line per group of layers.
    """

    channels: dict[str, Tensor]
    groups: tuple[Group, ...]
    ports: tuple[Port, ...]
    refused: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.groups[-1].ids[1] if self.groups else 0


def remove(model: nn.Module, coupling: Coupling, dead: Tensor) -> None:
    """Cut the channels `dead` [n] out of every port that holds them. At least one index of each port must stay."""
    made: Made = {}
    for port in coupling.ports:
        keep = (~torch.isin(port.ids, dead)).nonzero().flatten()
        if len(keep) < len(port.ids):
            cut(model.get_submodule(port.path), port.side, keep, made)
    for group in coupling.groups:
        left = len(group) - int(group.among(dead).sum())
        for path, name, each in group.counts:
            setattr(model.get_submodule(path), name, each * left)


def dead_channels(model: nn.Module, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """[n] bool, twice: channels of which every producing row is zero, and channels that no layer reads."""
    said, made = (torch.zeros(len(coupling), dtype=torch.bool) for _ in range(2))
    heard, read = (torch.zeros(len(coupling), dtype=torch.bool) for _ in range(2))
    for port in coupling.ports:
        module = model.get_submodule(port.path)
        out = produces(module, port.side)
        if not out and port.side != "in":
            continue
        _check(module, port)
        live, held_ids = speaks(module, port.side), port.ids >= 0
        (made if out else read)[port.ids[held_ids]] = True
        (said if out else heard)[port.ids[held_ids & live]] = True
    allowed = torch.zeros(len(coupling), dtype=torch.bool)
    for group in coupling.groups:
        allowed[slice(*group.ids)] = group.by_input
    return made & ~said, read & ~heard & allowed


def _check(module: nn.Module, port: Port) -> None:
    if extent(module, port.side) != len(port.ids):
        raise SurgeryError(
            f"{port.path}: has {extent(module, port.side)} channels on its side {port.side!r}, the coupling "
            f"{len(port.ids)}"
        )
