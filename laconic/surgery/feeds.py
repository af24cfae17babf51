"""Which channels feed which columns, one by one: found by walking from a reader's input to the cuts before it, measured
by gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.model.batches import Batch
from laconic.model.calling import call
from laconic.model.sites import Slot
from laconic.surgery.cuts import Cuts, Feeder, GraphEnd, Leaf
from laconic.surgery.verify import flat

_EXACT = 1e-3  # relative error of what gradients say: they pass softmaxes and sums over tokens
_LEAST = 1e-30  # what is smaller counts as zero, such as a sigmoid far below: 1 / x should be a float32


@dataclass(frozen=True, eq=False)
class Feed:
    """A source and the sites it feeds: channel `index[j]` feeds column j of each of them (of convolutions: input
    channel j).
    """

    source: Feeder
    readers: tuple[Slot, ...]
    index: Tensor


@dataclass(frozen=True, eq=False)
class Refused:
    """A source that feeds some sites but cannot be scaled, and why."""

    source: Feeder
    readers: tuple[Slot, ...]
    reason: str


@torch.enable_grad()
def feeds(network: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[list[Feed], list[Refused]]:
    """Every source whose influence ends in sites that it feeds channel by channel, in the order of the forward pass;
    and those that feed some sites so, and something else too.

    What sources give is followed through whatever the model computes; decisions that depend on it (which expert a
    router picks) are not seen here. `network`: dense, without trainable parameters. Cost: one pass, and two backward
    passes of a stretch between cuts per `follow`.
    """
    cuts = Cuts(network, generator)
    with cuts.watching():
        outputs = list(flat(call(network, batch)))
    ends = [*cuts.ends, *(GraphEnd("the model's output", tensor) for tensor in outputs)]
    fed: dict[Feeder, dict[Slot, list[Tensor]]] = {}
    leaks: dict[Feeder, list[str]] = {}
    for end in ends:
        leaves = [leaf for leaf in cuts.behind(end.tensor) if leaf.source is not None]
        found = follow(end, [leaf for leaf in leaves if _together(leaf, end)])
        for leaf in leaves:
            source = leaf.source
            assert source is not None
            if leaf in found and end.slot is not None:
                fed.setdefault(source, {}).setdefault(end.slot, []).append(found[leaf])
            elif end.name not in leaks.setdefault(source, []):
                leaks[source].append(end.name)
    calls = {slot: sum(end.slot is slot for end in ends) for found in fed.values() for slot in found}
    good, refused = [], []
    for source in dict.fromkeys(leaf.source for leaf in cuts.leaves.values()):
        if source is None or source not in fed:
            continue
        readers = fed[source]
        index, reason = _index(readers)
        if leaks.get(source):
            own = {path for slot in readers for path, _ in slot.users}
            reason = _leak(
                leaks[source],
                [path for path in cuts.readers.get(source, []) if path not in own and source.slot is None],
            )
        elif mixed := [slot.name for slot, indices in readers.items() if len(indices) < calls[slot]]:
            reason = f"{mixed[0]} reads something else, too"
        if reason:
            refused.append(Refused(source, tuple(readers), reason))
        else:
            good.append(Feed(source, tuple(readers), index))
    return good, refused


def _together(leaf: Leaf, end: GraphEnd) -> bool:
    """Whether a leaf's channels can be an end's columns: rows of an expert are read by the same expert of as many."""
    source = leaf.source
    if end.slot is None or source is None:
        return False
    packed = source.slot is not None and source.slot.view.lead == 2
    return not packed or (source.slot is not None and source.slot.groups == end.slot.groups and leaf.group == end.group)


def _index(readers: dict[Slot, list[Tensor]]) -> tuple[Tensor, str]:
    """What all readers agree on: which channel feeds each column; and what is wrong with that."""
    indices = [index for found in readers.values() for index in found]
    if len({len(index) for index in indices}) > 1:
        return indices[0], "its readers have different numbers of columns"
    index = torch.stack(indices).amax(0)
    if any(bool(((other >= 0) & (other != index)).any()) for other in indices):
        return index, "its readers see its channels in different places"
    unknown = int((index < 0).sum())
    return index, f"{unknown} columns of its readers are zero on this example; try a larger one" if unknown else ""


def _leak(ends: list[str], others: list[str]) -> str:
    """What else a source feeds than sites: where that influence ends, and the modules that read it and do not hold
    these sites.
    """
    read = f" (read by {', '.join(others)})" if others else ""
    return f"its output also reaches {ends[0]}{', ...' if len(ends) > 1 else ''}{read}"


def follow(end: GraphEnd, leaves: Sequence[Leaf]) -> dict[Leaf, Tensor]:
    """For each leaf that feeds the end's input x [..., in] channel by channel: which of its channels y_c feeds which
    column, -1 where x is zero.

    Channel c feeds column j alone when J^T (k u) = k J^T u for numbers k of the columns, and x_j is homogeneous of
    degree one in it, for which Euler has <J^T u, y_c> = n over the n places where x_j is not zero, with u = 1 / x
    there. Columns that share a channel (grouped queries) are told apart in halves. Cost: two backward passes from end
    to leaf for each of the halvings needed, 2 log2(in) when there is nothing.
    """
    x = end.tensor.movedim(end.axis, -1)
    if not leaves or not bool(torch.isfinite(x).all()):
        return {}
    some = x.detach().abs() > _LEAST
    u = torch.where(some, 1 / x.detach(), 0.0)
    size = some.reshape(-1, x.shape[-1]).sum(0)
    found = {leaf: torch.full((len(size),), -1) for leaf in leaves}
    blocks = [(0, len(size))]
    while blocks and found:
        start, stop = blocks.pop()
        number = torch.zeros(len(size))
        number[start:stop] = torch.arange(1, stop - start + 1)
        values = [leaf.value for leaf in found]
        once = torch.autograd.grad(x, values, u * (number > 0), retain_graph=True, allow_unused=True)
        twice = torch.autograd.grad(x, values, u * number, retain_graph=True, allow_unused=True)
        missing = set()
        for leaf, g, h in zip(found, once, twice, strict=True):
            if g is not None and h is not None:
                _match(found[leaf], leaf, g=g, h=h, size=size, start=start, stop=stop)
            if bool(((found[leaf] < 0) & (size > 0))[start:stop].any()):
                missing.add(leaf)
        if stop - start == 1:
            found = {leaf: index for leaf, index in found.items() if leaf not in missing}
        elif missing:
            middle = (start + stop) // 2
            blocks += [(middle, stop), (start, middle)]
    return found


def _match(index: Tensor, leaf: Leaf, g: Tensor, h: Tensor, size: Tensor, start: int, stop: int) -> None:
    """Note in `index` the columns of a block that a channel was found for."""
    g, h, y = (tensor.detach().movedim(leaf.axis, -1).flatten(0, -2).double() for tensor in (g, h, leaf.value))
    energy = g.square().sum(0)
    number = ((g * h).sum(0) / energy.clamp_min(1e-300)).round()
    exact = (h - number * g).square().sum(0) <= (_EXACT * number).square() * energy
    column = (number.long() + start - 1).clamp(start, stop - 1)
    whole = ((y * g).sum(0) - size[column]).abs() <= _EXACT * size[column]
    good = (exact & whole & (energy > 0) & (number >= 1) & (number <= stop - start)).nonzero().flatten()
    good = good[index[column[good]] < 0]
    index[column[good]] = good
