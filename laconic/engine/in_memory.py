"""A module in memory as the place where weights live while they are compressed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from laconic.engine.checks import Prefix
from laconic.engine.extras import Extras
from laconic.engine.gather import data_free_stages, recorded, survey_stages, walk_stages
from laconic.engine.losses import Probe
from laconic.engine.plan import Plan
from laconic.engine.shelf import Shelf
from laconic.engine.solve import check_layers, matrix_of, put_back, record_of
from laconic.engine.walk import Stage, parameters_of
from laconic.host.progress import Progress
from laconic.host.told import SiteRecord
from laconic.methods.base import Method
from laconic.model.batches import Batch
from laconic.model.blocks import InMemory, find_chain, open_chain
from laconic.model.calling import in_evaluation
from laconic.model.sites import INPUTS, Site, Slot, Stats
from laconic.weights import Weight
from laconic.weights.demands import demands_of, set_demands


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; every module's mode and every parameter's flag are put
    back.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with in_evaluation(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class InModule:
    """A module whose matrices are compressed; `weights` and `records` are what was found so far.

    With `statistics="compressed"` its parameters take the decoded values meanwhile, and its layers round their inputs
    as the weights ask; `undo`, inside the context, puts everything back, and so does leaving it by an error. The module
    has to be `at_rest`. `surveyed_stages` and `walked_stages` keep what was known of the sites, for whoever asks again
    (`keep=True`); `channels`: the rows of every site that are one channel of the network, by the site's name.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        seed: int,
        statistics: Prefix,
        probe: Probe,
        true_sequential: bool = False,
        channels: Mapping[str, Tensor] | None = None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.batches, self.seed, self.probe, self.progress = model, batches, seed, probe, progress
        self.original, self.true_sequential = statistics == "original", true_sequential
        self.channels, self.keep = channels or {}, keep
        self.residence = InMemory(model)
        self.blocks, why = open_chain(self.residence, find_chain(model), batches[0] if batches else None)
        self.notes: list[str] = []
        if why:
            self._say(f"{why}; the whole model is run for every unit")
        self.extras, self._undo, self._seen_next = Extras(), ExitStack(), False
        self.surveyed_stages: list[Stage] = []
        self.walked_stages: list[Stage] = []
        self.weights: dict[Slot, Weight] = {}
        self.records: list[SiteRecord] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.undo()
        self._undo.pop_all()  # what was put stays, and the copies of what was there go

    def undo(self) -> None:
        """The module as it was."""
        self._undo.close()

    def _say(self, note: str) -> None:
        self.notes.append(note)
        if self.progress is not None:
            self.progress.say(note)

    def surveyed(self, plan: Plan) -> Iterator[Stage]:
        needs = plan.surveyed
        if any(needs.values()):
            stages = survey_stages(
                self.blocks, self.residence, self.batches, list(needs), needs, self.seed, Shelf(), self.probe
            )
        else:
            stages = data_free_stages(self.residence, list(needs))
        return recorded(stages, self.surveyed_stages) if self.keep else stages

    def stages(self, plan: Plan) -> Iterator[Stage]:
        needs = plan.needs
        self._seen_next = not self.original and any(wanted & INPUTS for wanted in needs.values())
        if self.progress is not None:
            self.progress.start("compressing", sum(slot.entries * slot.columns for slot in needs))
        stages = walk_stages(
            self.blocks, self.residence, self.batches, list(needs), needs,
            original=self.original, true_sequential=self.true_sequential, shelf=Shelf(), done=[],
        )  # fmt: skip
        return recorded(stages, self.walked_stages) if self.keep else stages

    def matrix(self, slot: Slot) -> Tensor:
        return matrix_of(self.model, slot)

    def observed(self, slot: Slot, site: Site, wants: Stats) -> None:
        self.extras.put(site, wants)

    def known(self, site: Site) -> Site:
        return self.extras.given(site).having(channels=self.channels.get(site.name))

    def settled(self, plan: Plan, allocate: Callable[[], tuple[Plan, list[str]]]) -> Plan:
        found, notes = allocate()
        self.notes += notes
        return found

    def record(self, slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> SiteRecord:
        check_layers(self.model, slot, weight)
        original = parameters_of(self.model, [slot])[slot].nbytes
        return replace(record_of(slot, method, site, weight, seconds), original_bytes=original)

    def put(self, slot: Slot, weight: Weight, record: SiteRecord) -> None:
        if self._seen_next:
            parameter = parameters_of(self.model, [slot])[slot].detach()
            self._undo.callback(parameter.copy_, parameter.clone())
            for layer in slot.layers(self.model):
                self._undo.callback(set_demands, layer, demands_of(layer))
            put_back(self.model, slot, weight)
        if self.progress is not None:
            self.progress.advance(slot.entries * slot.columns, slot.name)
            self.progress.site(record)

    def commit(self, part: str, weights: dict[Slot, Weight], records: list[SiteRecord]) -> None:
        self.weights |= weights
        self.records += records
