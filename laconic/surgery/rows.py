"""Channels of a network that no graph can be traced through: every row for itself, as masks."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from laconic.errors import SurgeryError
from laconic.model.batches import Batch
from laconic.model.calling import call
from laconic.model.sites import Slot, find_slots
from laconic.surgery.channels import couple
from laconic.surgery.coupling import Coupling
from laconic.surgery.trace import MASKS_ONLY
from laconic.surgery.verify import FAILURES, few, first_line, flat, laboratory

_SAME = (
    "TBackward",
    "TransposeBackward",
    "PermuteBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "ReshapeAliasBackward",
    "CloneBackward",
)


def couple_or_mask(model: nn.Module, example: Batch) -> Coupling:
    """`couple`, or, where no graph can be traced, `masks` with the reason as the first line of `refused`.

    Raises: SurgeryError when torch-pruning is missing, and as `masks` does.
    """
    try:
        return couple(model, example)
    except SurgeryError as error:
        if importlib.util.find_spec("torch_pruning") is None:
            raise
        coupling = masks(model, example)
        why = str(error).removesuffix(f"; {MASKS_ONLY}")
        coupling.refused.insert(0, f"no channel can be cut out, rows are only set to zero, each for itself ({why})")
        return coupling


def masks(model: nn.Module, example: Batch) -> Coupling:
    """Every row of a linear layer or convolution as a channel of its own, which can be zeroed and not cut: there are no
    groups and no ports.

    Rows of layers that the output is computed from with no other layer in between stay (-1), as do those of layers the
    output does not depend on, of embeddings, and of recurrent and attention layers. Which these are is read from the
    autograd graph of one pass over the first samples of `example`, so branches that depend on the data are those it
    takes. Model and global random state stay as they are.
    Raises: SurgeryError when the output cannot be traced back to any weight. Cost: one copy, one pass.
    """
    network, batch = laboratory(model), few(example)
    slots = find_slots(network)
    owners = {id(network.get_submodule(path).get_parameter(name)): slot for slot in slots for path, name in slot.users}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            ends = [tensor.grad_fn for tensor in flat(call(network, batch)) if tensor.grad_fn is not None]
    except FAILURES as error:
        raise SurgeryError(
            f"{type(model).__name__}: its forward pass breaks on the example: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not ends:
        raise SurgeryError(
            f"{type(model).__name__}: no tensor of its output can be traced back to its weights, so its last layers "
            "are not known"
        )
    last, reached = _sites(ends, owners, through=False), _sites(ends, owners, through=True)
    channels: dict[str, torch.Tensor] = {}
    refused, first = [], 0
    for slot in slots:
        why = _stays(slot, slot in last, slot in reached)
        if why:
            channels[slot.name] = torch.full((slot.rows,), -1)
            refused.append(f"{slot.name}: {why}")
        else:
            channels[slot.name] = torch.arange(first, first + slot.rows)
            first += slot.rows
    return Coupling(channels, (), (), refused)


def _stays(slot: Slot, last: bool, reached: bool) -> str:
    """Why the rows of a site may not be zeroed; nothing if they may."""
    if slot.role == "embedding" or slot.users[0][1] != "weight":
        return "its rows are no neurons or filters"
    if not reached:
        return "the output does not depend on it on the example"
    return "its rows reach the model's output" if last else ""


def _sites(ends: Iterable[Any], owners: dict[int, Slot], *, through: bool) -> set[Slot]:
    """The sites whose weights are met on the way back from some autograd nodes; beyond the first of each way only if
    `through`.
    """
    found: set[Slot] = set()
    seen: set[Any] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        before = [parent for parent, _ in node.next_functions if parent is not None]
        own = {slot for slot in (_owner(parent, owners) for parent in before) if slot is not None}
        found |= own
        if through or not own:
            todo += before
    return found


def _owner(node: Any, owners: dict[int, Slot]) -> Slot | None:
    """The site whose weight a node hands on, as it is, turned or reshaped."""
    while type(node).__name__.startswith(_SAME):
        ((node, _),) = node.next_functions
    parameter = getattr(node, "variable", None)
    return owners.get(id(parameter)) if parameter is not None else None
