"""Statistics of a model that is run: in stages, one part after the other, or of all sites in one run, kept for whoever
asks again.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from laconic.engine.losses import Probe, default_probe
from laconic.engine.shelf import Shelf
from laconic.engine.statistics import Statistics
from laconic.engine.survey import survey, survey_whole
from laconic.engine.walk import Known, Needs, Stage, parameters_of, walk, walk_whole
from laconic.model.batches import Batch, mapped, to_device
from laconic.model.blocks import BlockModel, Residency
from laconic.model.calling import call, in_evaluation
from laconic.model.sites import GRADIENTS, NONE, Site, Slot
from laconic.model.usage import in_sight


def data_free_stages(residence: Residency, slots: Sequence[Slot]) -> Iterator[Stage]:
    """Every site alone in memory, without statistics: what an allocation sees that needs no data."""
    for slot in slots:
        with residence.hold(slot.users[0][0]):
            yield Stage(slot.name, [slot], Statistics(parameters_of(residence.model, [slot]), {slot: NONE}))


def survey_stages(
    blocks: BlockModel | None,
    residence: Residency,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    seed: int,
    shelf: Shelf,
    probe: Probe = default_probe,
) -> Iterator[Stage]:
    """The stages of a survey of a chain, or of a whole model that has none."""
    if blocks is not None:
        yield from survey(blocks, batches, slots, needs, seed=seed, shelf=shelf, probe=probe)
        return
    with residence.hold(""):
        yield survey_whole(residence.model, batches, slots, needs, residence.device, seed=seed, probe=probe)


def walk_stages(
    blocks: BlockModel | None, residence: Residency, batches: Sequence[Batch], slots: Sequence[Slot], needs: Needs, *,
    original: bool, true_sequential: bool, shelf: Shelf, done: Sequence[str],
) -> Iterator[Stage]:  # fmt: skip
    """The stages of the compression of a chain, or of a whole model that has none.

    `original`: whoever asks puts nothing in the place of what he compressed, so that a chain's later blocks see the
    original's hidden states anyway; a whole model is then one stage, of one run.
    """
    if blocks is not None:
        yield from walk(blocks, batches, slots, needs, true_sequential=true_sequential, shelf=shelf, done=done)
        return
    with residence.hold(""):
        yield from walk_whole(residence.model, batches, slots, needs, residence.device, together=original, done=done)


def gather_whole(model: nn.Module, needs: Needs, data: Iterable[Batch], probe: Probe, seed: int) -> Statistics:
    """All statistics of a module in memory, gradients included, from one run of it as it is; its modes, flags and
    gradients are put back.

    Memory: that of every site's statistics at once.
    """
    device = next(model.parameters()).device
    slots = list(needs)
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        with in_evaluation(model), in_sight(model):
            if any(need & GRADIENTS for need in needs.values()):
                for parameter in flags:
                    parameter.requires_grad_(parameter.is_floating_point())
                    parameter.grad = None
                batches = [
                    mapped(batch, Tensor.detach) for batch in data
                ]  # of which a gradient is asked, not of the user's own
                statistics = survey_whole(model, batches, slots, needs, device, seed=seed, probe=probe).statistics
                assert isinstance(statistics, Statistics)
                return statistics
            model.requires_grad_(False)
            statistics = Statistics(parameters_of(model, slots), needs)
            if any(needs.values()):
                with torch.no_grad(), statistics.watch():
                    for batch in data:
                        call(model, to_device(batch, device))
            return statistics
    finally:
        for parameter, (flag, grad) in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


class Kept:
    """What is known of some sites, gathered before: it stays when it was asked for, and holds for other values of the
    sites too.
    """

    def __init__(self, sites: dict[Slot, Site] | None = None) -> None:
        self.sites = sites if sites is not None else {}

    def describe(self, slot: Slot, W: Tensor, seed: int) -> Site:
        site = self.sites[slot]
        return site.having(W=W, notes=list(site.notes))

    def input_of(self, slot: Slot) -> int | None:
        return self.sites[slot].input

    def forget(self, slot: Slot) -> None:
        """Nothing: it is asked for again."""


class Recorded(Kept):
    """Passes on what is known of some sites and keeps it."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known

    def describe(self, slot: Slot, W: Tensor, seed: int) -> Site:
        self.sites[slot] = self.known.describe(slot, W, seed)
        return super().describe(slot, W, seed)

    def input_of(self, slot: Slot) -> int | None:
        return self.known.input_of(slot)

    def forget(self, slot: Slot) -> None:
        self.known.forget(slot)


def recorded(stages: Iterable[Stage], kept: list[Stage]) -> Iterator[Stage]:
    """The stages as they come; what is known of their sites goes to `kept`, to be asked for again."""
    for stage in stages:
        if stage.statistics is None or not stage.slots:
            yield stage
            continue
        recording = Recorded(stage.statistics)
        yield Stage(stage.part, stage.slots, recording, stage.complete)
        kept.append(Stage(stage.part, stage.slots, Kept(recording.sites)))
