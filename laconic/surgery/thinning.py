"""Silent channels, and networks without them."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.errors import SurgeryError
from laconic.model.batches import Batch
from laconic.model.sites import find_slots
from laconic.surgery.channels import couple
from laconic.surgery.coupling import Coupling, dead_channels, remove
from laconic.surgery.ports import hush
from laconic.surgery.verify import FAILURES, answers, apart, few, first_line, laboratory
from laconic.weights.install import baked


@dataclass(frozen=True)
class Thinned:
    """A layer's rows and columns before and after thinning."""

    layer: str
    before: tuple[int, int]
    after: tuple[int, int]


def silence(model: nn.Module, coupling: Coupling) -> int:
    """Make every channel silent whose producing weight rows are all zero, in place; returns how many there are.

    Set to zero: the biases of its layers, scale, shift and running mean of the norms it passes, and parameters of their
    own along it. Installed Weights are read, not written. Raises: SurgeryError when the model is not the coupling's.
    """
    dead, _ = dead_channels(model, coupling)
    for port in coupling.ports:
        indices = (dead[port.ids] & (port.ids >= 0)).nonzero().flatten()
        if port.side != "in" and len(indices):
            hush(model.get_submodule(port.path), port.side, indices)
    return int(dead.sum())


def thin(model: nn.Module, example: Batch, coupling: Coupling | None = None, *, tolerance: float = 1e-5) -> nn.Module:
    """A copy of a model, dense and in evaluation mode, from which every dead channel is removed.

    A channel is dead when all rows that make it are zero (it is then silenced), or when every layer that reads it has
    zeros in its columns. One channel stays in each layer. On the first samples of `example`, max |masked - thinned| <=
    tolerance x max |masked| in float32, where masked is the silenced copy. The model itself is not touched.
    Raises: SurgeryError when no graph can be traced, when the model is not the coupling's, or when the outputs differ;
    it then names the layers. Source: Condensa, section 3.4. Cost: two copies and two passes, beside `couple` when no
    coupling is given.
    """
    coupling = coupling if coupling is not None else couple(model, example)
    slim = baked(model).eval()
    silence(slim, coupling)
    silent, unread = dead_channels(slim, coupling)
    dead = _spare(coupling, (silent | unread).nonzero().flatten())
    batch, masked = few(example), laboratory(slim)
    expected = answers(masked, batch)
    remove(slim, coupling, dead)
    if trouble := _trouble(laboratory(slim), batch, expected, tolerance):
        layers = _culprits(masked, batch, coupling=coupling, dead=dead, expected=expected, tolerance=tolerance)
        raise SurgeryError(f"{layers}: the thinned network is not the masked one: {trouble}")
    return slim


def report(model: nn.Module, thinned: nn.Module) -> list[Thinned]:
    """What thinning did: every layer that lost rows or columns, in module order."""
    whole, slim = ({slot.name: slot.shape for slot in find_slots(baked(network))} for network in (model, thinned))
    return [
        Thinned(name, before, slim[name]) for name, before in whole.items() if name in slim and slim[name] != before
    ]


def _spare(coupling: Coupling, dead: Tensor) -> Tensor:
    """Dead channels, without one in each layer that would have none left."""
    for port in coupling.ports:
        if bool(torch.isin(port.ids, dead).all()):
            dead = dead[dead != int(port.ids.min())]
    return dead


def _trouble(slim: nn.Module, batch: Batch, expected: list[Tensor], tolerance: float) -> str:
    try:
        distance = apart(expected, answers(slim, batch))
    except FAILURES as error:
        return f"its forward pass breaks: {first_line(error)}"
    return "" if distance <= tolerance else f"outputs differ by {distance:.1e} of their size, more than {tolerance:.1e}"


def _culprits(
    masked: nn.Module, batch: Batch, coupling: Coupling, dead: Tensor, expected: list[Tensor], tolerance: float
) -> str:
    """The layers of which the channels alone cannot be cut; all that were cut when each alone can."""
    cut = [group for group in coupling.groups if bool(group.among(dead).any())]
    wrong = []
    for group in cut:
        alone = Coupling({}, (group,), coupling.ports)
        subject = copy.deepcopy(masked)
        remove(subject, alone, dead[group.among(dead)])
        if _trouble(subject, batch, expected, tolerance):
            wrong.append(group)
    return ", ".join(layer for group in wrong or cut for layer in group.layers)
