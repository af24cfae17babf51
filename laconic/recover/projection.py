"""The compression step: the weights nearest to given values, under one scheme, for a whole module in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.data.loaders import ready
from laconic.disk.tensors import is_finite
from laconic.engine.checks import Prefix, check_prefix
from laconic.engine.extras import Extras
from laconic.engine.gather import Kept, gather_whole
from laconic.engine.in_memory import InModule, at_rest
from laconic.engine.loop import compress
from laconic.engine.losses import Probe, probe_of
from laconic.engine.plan import Plan
from laconic.engine.resolve import resolve
from laconic.engine.walk import Stage, parameters_of, parts_of
from laconic.errors import CheckpointError, DataError
from laconic.host.ambient import undisturbed
from laconic.methods.base import Method
from laconic.model.batches import Batch
from laconic.model.blocks import InMemory, find_chain, open_chain
from laconic.model.judging import OutputLoss, check_function
from laconic.model.sites import MEASURED, Site, Slot, Stats, find_slots
from laconic.model.usage import in_sight
from laconic.scheme.text import Scheme, describe
from laconic.weights import Weight


@dataclass(frozen=True)
class Projection:
    """C of "minimise L(w) subject to w = D(Theta)": Theta = argmin ||w - D(Theta)||^2 over what a scheme allows.

    Whatever a scheme spreads over the network (one threshold, say) is found anew from the values given; so are masks,
    scales and tables. Statistics (curvature for a criterion, inputs for error feedback) are gathered once, from the
    values that the module had then, and kept: `surveyed`, what allocations see, and `gathered`, what methods see, in
    the stages in which the module's sites are compressed.
    Source: Carreira-Perpinan 2017, eq. 4; Condensa section 3.3. Cost: that of the scheme's methods.
    """

    scheme: str
    plan: Plan
    surveyed: list[Stage]
    gathered: list[Stage]
    extras: Extras = field(default_factory=Extras)
    coupling: Any = None
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    statistics: Prefix = "original"

    @property
    def chosen(self) -> dict[Slot, Method]:
        """The method of every site that is compressed."""
        return self.plan.methods

    @property
    def slots(self) -> list[Slot]:
        """What is compressed."""
        return list(self.plan.methods)

    @property
    def sites(self) -> dict[Slot, Site]:
        """What is known of every site, with the values it had when that was gathered."""
        return {
            slot: site
            for stage in self.gathered
            if isinstance(stage.statistics, Kept)
            for slot, site in stage.statistics.sites.items()
        }

    def compress(self, values: Mapping[Slot, Tensor]) -> dict[Slot, Weight]:
        """The weights nearest to `values`, tensors in their parameters' own shapes."""
        home = AsValues(self, values)
        with torch.no_grad():
            compress(home, self.plan)
        self.notes.extend(note for note in dict.fromkeys(home.notes) if note not in self.notes)
        return {slot: home.weights[slot] for slot in self.slots}

    def keep_side(self, weights: Mapping[Slot, Weight], values: Mapping[Slot, Tensor]) -> None:
        """Move weights to the nearest points with their masks, scales and tables as they are: `right_inverse`."""
        with torch.no_grad():
            for slot, weight in weights.items():
                weight.right_inverse(slot.view.matrix(values[slot]))


class AsValues:
    """Values that are given, of sites of which everything is known already, as the place where weights live: nothing is
    run, nothing put.
    """

    def __init__(self, projection: Projection, values: Mapping[Slot, Tensor]) -> None:
        self.projection, self.values, self.seed = projection, values, projection.seed
        self.weights: dict[Slot, Weight] = {}
        self.notes: list[str] = []

    def surveyed(self, plan: Plan) -> Iterator[Stage]:
        return iter(self.projection.surveyed)

    def stages(self, plan: Plan) -> Iterator[Stage]:
        return iter(self.projection.gathered)

    def matrix(self, slot: Slot) -> Tensor:
        return slot.view.matrix(self.values[slot])

    def observed(self, slot: Slot, site: Site, wants: Stats) -> None:
        """Nothing: what is known of it is kept already."""

    def known(self, site: Site) -> Site:
        return self.projection.extras.given(site).having(channels=channels_of(self.projection.coupling, site))

    def settled(self, plan: Plan, allocate: Callable[[], tuple[Plan, list[str]]]) -> Plan:
        found, notes = allocate()
        self.notes += notes
        return found

    def record(self, slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> list[str]:
        return site.notes

    def put(self, slot: Slot, weight: Weight, record: list[str]) -> None:
        self.notes += record

    def commit(self, part: str, weights: dict[Slot, Weight], records: list[list[str]]) -> None:
        self.weights |= weights


@undisturbed()
def project_onto(
    model: nn.Module,
    scheme: Scheme,
    *,
    example: Batch | None = None,
    data: Sequence[Batch] = (),
    loss: OutputLoss | None = None,
    seed: int = 0,
    coupling: Any = None,
    statistics: Prefix = "original",
) -> Projection:
    """The projection of a module's present values: slots, methods, and the statistics the methods ask for, from `data`;
    their gradients are those of `loss(output, batch)`, by default of labels drawn from the model's own output.

    `statistics`: what the inputs that methods look at have passed through, "original" (the module as it is: one run of
    it) or "compressed" (whatever is compressed before a site, as where a module or a directory is compressed: every
    part is compressed in its turn for it, and put back). Structures need `example`, an input to trace the network with;
    `coupling` is what `surgery.couple` found for it before. Without one, rows of a network that cannot be traced are
    masked each for itself, which the notes say.
    Raises: SchemeError, DataError (statistics without data), CheckpointError (a parameter that is not finite),
    SurgeryError.
    """
    check_prefix(statistics)
    check_function("loss", loss)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise CheckpointError(f"{name}: holds NaN or infinity")
    plan = resolve(scheme, find_slots(model))
    measured = {slot: need & MEASURED for slot, need in plan.wanted.items()}
    if any(measured.values()) and not data:
        raise DataError(f"{describe(scheme)}: needs data for its statistics")
    notes: list[str] = []
    if plan.structures and coupling is None:
        if example is None:
            raise DataError(f"{describe(scheme)}: structures need an example input to trace the network with")
        from laconic.surgery import couple_or_mask

        coupling = couple_or_mask(model, example)
        notes += [] if coupling.groups else coupling.refused[:1]
    batches = ready(data, model) if any(measured.values()) else []
    told = describe(scheme)
    if statistics == "compressed" and any(measured.values()):
        home = _gathered_in(model, plan, batches, probe_of(loss), seed, coupling)
        return Projection(
            told,
            plan,
            home.surveyed_stages,
            home.walked_stages,
            home.extras,
            coupling,
            [*notes, *home.notes],
            seed,
            statistics,
        )
    known = gather_whole(model, measured, batches, probe_of(loss), seed)
    present = parameters_of(model, list(measured))
    kept = Kept({slot: known.describe(slot, slot.view.matrix(present[slot].detach()), seed) for slot in present})
    gathered = [
        Stage(part, slots, kept) for part, slots in parts_of(model, list(present), _chain(model, plan, batches))
    ]
    return Projection(told, plan, [Stage("model", list(present), kept)], gathered, Extras(), coupling, notes, seed)


def _chain(model: nn.Module, plan: Plan, batches: list[Batch]) -> str | None:
    """The chain of blocks within which, one by one, joint methods look for sites that are fed alike; None where it
    makes no difference.
    """
    path = find_chain(model)
    if not batches or not any(method.joint for method in plan.methods.values()):
        return None
    with at_rest(model), in_sight(model):
        return path if open_chain(InMemory(model), path, batches[0])[0] is not None else None


def _gathered_in(
    model: nn.Module, plan: Plan, batches: list[Batch], probe: Probe, seed: int, coupling: Any
) -> InModule:
    """What is known of the sites of a module where each has been seen behind what is compressed before it; the module
    is as it was.
    """
    with at_rest(model), in_sight(model):
        home = InModule(
            model,
            batches,
            seed=seed,
            statistics="compressed",
            probe=probe,
            channels=coupling.channels if coupling is not None else {},
            keep=True,
        )
        with home:
            compress(home, plan)
            home.undo()
    return home


def channels_of(coupling: Any, site: Site) -> Tensor | None:
    """The rows of a site that are one channel of the network, [out] int64; None where nobody asked."""
    return None if coupling is None else coupling.channels.get(site.name)


def compressed_slots(model: nn.Module, scheme: Scheme) -> list[Slot]:
    """The sites of a module that a scheme compresses. Raises: SchemeError."""
    return list(resolve(scheme, find_slots(model)).methods)


def reads_data(model: nn.Module, scheme: Scheme) -> bool:
    """Whether a scheme asks for statistics that the model has to be run for. Raises: SchemeError."""
    return resolve(scheme, find_slots(model)).reads_data
