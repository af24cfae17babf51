"""The walk over a model: forwards, part by part, each part's statistics from inputs that passed what was compressed
before, or the original.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.engine.shelf import Shelf
from laconic.engine.statistics import Statistics
from laconic.model.batches import Batch, to_device
from laconic.model.blocks import BlockModel, Calls
from laconic.model.calling import call
from laconic.model.sites import INPUTS, NONE, Site, Slot, Stats

Needs = dict[Slot, Stats]


class Known(Protocol):
    """What is known of the sites of a stage."""

    def describe(self, slot: Slot, W: Tensor, seed: int) -> Site:
        """The site with these values [out, in] and all that is known of it."""

    def input_of(self, slot: Slot) -> int | None:
        """The number of the tensor that a site is fed, the same for sites that are fed the same one; None where nobody
        looked.
        """

    def forget(self, slot: Slot) -> None:
        """The site was described; its statistics may go."""


@dataclass
class Stage:
    """Some sites whose statistics are ready; compress them in place before asking for the next stage.

    `part` names what is in memory. `complete` says that nothing more will be asked of the part: it can be written, for
    whatever comes next can be computed without it. A block's last stage has no slots, only this message.
    """

    part: str
    slots: list[Slot]
    statistics: Known | None
    complete: bool = True


def parameters_of(model: nn.Module, slots: Sequence[Slot]) -> dict[Slot, nn.Parameter]:
    """The parameters now in the slots' places."""
    return {slot: getattr(model.get_submodule(slot.users[0][0]), slot.users[0][1]) for slot in slots}


def inside(slot: Slot, part: str) -> bool:
    """Whether a slot's first user lies below the module path `part`."""
    return slot.users[0][0] == part or slot.users[0][0].startswith(part + ".")


def walk(
    model: BlockModel,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    *,
    true_sequential: bool = False,
    shelf: Shelf | None = None,
    done: Sequence[str] = (),
) -> Iterator[Stage]:
    """Stages in the order of the model's computation: what lies before the chain, block after block, what lies after.

    Every stage's statistics come from inputs that passed through everything compressed before it, as far as whoever is
    asking has put it in its place; where nothing is put, they are those of the original. `true_sequential` makes a
    stage of each set of sites within a block that share an input. Parts named in `done` are compressed already: nothing
    is yielded for them, and their successors' inputs come from the shelf, or are computed again. Without any need of
    statistics the model is not run at all.
    """
    shelf = shelf or Shelf()
    outside = [slot for slot in slots if not inside(slot, model.path)]
    early = [slot for slot in outside if slot.role == "embedding" and (len(slot.users) == 1 or not needs[slot])]
    run = any(needs[slot] & INPUTS for slot in slots)
    yield from _alone(model, batches, [slot for slot in early if slot.name not in done], needs)
    before = (
        _before(model, batches, [slot for slot in outside if slot not in early and needs[slot] & INPUTS]) if run else []
    )
    yield from _around(model, before, needs, lambda batch, _: model.front(batch), batches, [], done)
    calls = model.capture(batches) if run else []
    reach = _reach(model, slots, needs, before)
    at, hidden = 0, [c.hidden for c in calls]
    for i in range(len(model)):
        part = model.block_path(i)
        within = [slot for slot in slots if inside(slot, part)]
        if part in done or not within:
            continue
        if run and i <= reach:
            at, hidden = i, _until(model, i, at, hidden, calls, shelf)
        with model.residency.hold(part):
            yield from _block(model, i, part, hidden, calls, within, needs, true_sequential)
            if i < reach:
                at, hidden = i + 1, forward(model, i, hidden, calls)
                shelf.put(f"hidden-{i + 1}", hidden)
            yield Stage(part, [], None)
            for k in range(i + 1):
                shelf.drop(f"hidden-{k}")
    late = [slot for slot in outside if slot not in early and slot not in before]
    yield from _alone(
        model, batches, [slot for slot in late if not needs[slot] & INPUTS and slot.name not in done], needs
    )
    behind = [slot for slot in late if needs[slot] & INPUTS]
    if any(part not in done for part, _ in units(model.model, behind)):
        hidden = _until(model, len(model), at, hidden, calls, shelf)
    yield from _around(model, behind, needs, lambda batch, h: model.tail(h, batch), batches, hidden, done)


def _before(model: BlockModel, batches: Sequence[Batch], slots: list[Slot]) -> list[Slot]:
    """Those of the slots whose products lie before the chain: patch embeddings, a vision tower. What a tie uses behind
    it too is not.
    """
    single = [slot for slot in slots if len(slot.users) == 1]
    if not single or not batches:
        return []
    with model.residency.hold("", head=False):
        probe = Statistics(parameters_of(model.model, single), dict.fromkeys(single, NONE))
        with torch.no_grad(), probe.watch():
            model.front(batches[0])
    return [slot for slot in single if slot in probe.order]


def _around(
    model: BlockModel,
    slots: list[Slot],
    needs: Needs,
    run: Callable[[Batch, Tensor], Any],
    batches: Sequence[Batch],
    hidden: list[Tensor],
    done: Sequence[str],
) -> Iterator[Stage]:
    """Stages of sites outside the chain that need statistics: one run of what lies outside per unit, as in
    `walk_whole`.
    """
    todo = [(part, group) for part, group in units(model.model, slots) if part not in done]
    if not todo:
        return
    with model.residency.hold(""):
        for part, group in todo:
            statistics = Statistics(parameters_of(model.model, group), needs)
            with torch.no_grad(), statistics.watch():
                for k, batch in enumerate(batches):
                    run(batch, hidden[k] if hidden else torch.empty(0))
            yield Stage(part, group, statistics)


def _reach(model: BlockModel, slots: Sequence[Slot], needs: Needs, before: Sequence[Slot]) -> int:
    """The last block (or, for what comes after the chain, their number) whose sites need statistics: nothing has to run
    beyond its input.
    """
    wanting = [slot for slot in slots if needs[slot] & INPUTS and slot not in before]
    last = [i for i in range(len(model)) if any(inside(slot, model.block_path(i)) for slot in wanting)]
    after = any(
        not inside(slot, model.path) and not (slot.role == "embedding" and len(slot.users) == 1) for slot in wanting
    )
    return len(model) if after else max(last, default=0)


def _alone(model: BlockModel, batches: Sequence[Batch], slots: list[Slot], needs: Needs) -> Iterator[Stage]:
    """Sites outside the chain whose inputs need not be summed, each alone in memory: embeddings and heads are the
    largest tensors there are.

    Where look-ups are to be counted, what lies before the chain is run for them.
    """
    for slot in slots:
        counted = bool(needs[slot] & Stats.USES)
        with model.residency.hold("", head=False) if counted else model.residency.hold(slot.users[0][0]):
            statistics = Statistics(parameters_of(model.model, [slot]), needs)
            if counted:
                with statistics.watch():
                    model.look_up(batches)
            yield Stage(slot.name, [slot], statistics)


def _until(model: BlockModel, i: int, at: int, hidden: list[Tensor], calls: list[Calls], shelf: Shelf) -> list[Tensor]:
    """The hidden states before block `i`: those before block `at`, or later ones on the shelf, run through the blocks
    between as they are now.

    A finished block is the compressed one, so an input that was lost is computed again to the same values.
    """
    for k in range(i, at, -1):
        if f"hidden-{k}" in shelf:
            at, hidden = k, shelf.get(f"hidden-{k}")
            break
    for k in range(at, i):
        with model.residency.hold(model.block_path(k)):
            hidden = forward(model, k, hidden, calls)
    return hidden


@torch.no_grad()
def forward(model: BlockModel, i: int, hidden: list[Tensor], calls: list[Calls]) -> list[Tensor]:
    """What block `i`, as it is now, makes of every batch's hidden state; on the CPU."""
    return [model.run(i, h, c).cpu() for h, c in zip(hidden, calls, strict=True)]


def _block(
    model: BlockModel,
    i: int,
    part: str,
    hidden: list[Tensor],
    calls: list[Calls],
    slots: list[Slot],
    needs: Needs,
    true_sequential: bool,
) -> Iterator[Stage]:
    if not slots:
        return
    groups = [slots]
    if true_sequential and any(needs[slot] & INPUTS for slot in slots):
        groups = _by_input(model, i, hidden[:1], calls[:1], slots)
    for group in groups:
        statistics = Statistics(parameters_of(model.model, group), needs)
        if any(needs[slot] & INPUTS for slot in group):
            with statistics.watch():
                forward(model, i, hidden, calls)
        yield Stage(part, group, statistics, complete=False)


def _by_input(
    model: BlockModel, i: int, hidden: list[Tensor], calls: list[Calls], slots: list[Slot]
) -> list[list[Slot]]:
    """The slots in the order they are first used, those fed by one tensor together; slots never used come last."""
    probe = Statistics(parameters_of(model.model, slots), dict.fromkeys(slots, Stats.SQUARES))
    with probe.watch():
        forward(model, i, hidden, calls)
    groups: list[list[Slot]] = []
    for slot in probe.order:
        if groups and probe.grams.get(groups[-1][0]) is probe.grams.get(slot):
            groups[-1].append(slot)
        else:
            groups.append([slot])
    unused = [slot for slot in slots if slot not in probe.order]
    return groups + ([unused] if unused else [])


def walk_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    device: torch.device,
    *,
    together: bool = False,
    done: Sequence[str] = (),
) -> Iterator[Stage]:
    """`walk` for a model that is no chain of blocks: the whole model runs once per unit, a unit being an element of its
    containers.

    `together`: one stage of all sites and one run, for statistics that do not depend on what is compressed before.
    """
    if together:
        if slots and "model" not in done:
            yield Stage("model", list(slots), _seen_whole(model, batches, list(slots), needs, device))
        return
    for part, group in units(model, slots):
        if part not in done:
            yield Stage(part, group, _seen_whole(model, batches, group, needs, device))


@torch.no_grad()
def _seen_whole(
    model: nn.Module, batches: Sequence[Batch], slots: list[Slot], needs: Needs, device: torch.device
) -> Statistics:
    """What is seen of some sites while the whole model runs, if anything is asked for."""
    statistics = Statistics(parameters_of(model, slots), needs)
    if any(needs[slot] & INPUTS for slot in slots):
        with statistics.watch():
            for batch in batches:
                call(model, to_device(batch, device))
    return statistics


def units(model: nn.Module, slots: Sequence[Slot]) -> list[tuple[str, list[Slot]]]:
    """Slots in module order, grouped by the innermost element of a Sequential or ModuleList that holds them."""
    containers = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        path = slot.users[0][0]
        inner = max((c for c in containers if path.startswith(c + ".") or c == ""), key=len, default=None)
        if inner is None:
            part = path
        else:
            part = ".".join(path.split(".")[: (len(inner.split(".")) if inner else 0) + 1])
        found.setdefault(part, []).append(slot)
    return list(found.items())


def parts_of(model: nn.Module, slots: Sequence[Slot], chain: str | None) -> list[tuple[str, list[Slot]]]:
    """Slots by the stage in which statistics of the original are seen: a block of the chain, a unit outside of it; all
    where there is no chain.
    """
    if chain is None:
        return [("model", list(slots))]
    blocks = [f"{chain}.{name}" for name, _ in model.get_submodule(chain).named_children()]
    within = [(block, [slot for slot in slots if inside(slot, block)]) for block in blocks]
    outside = [slot for slot in slots if not inside(slot, chain)]
    return [(block, found) for block, found in within if found] + units(model, outside)
