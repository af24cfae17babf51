"""From sites to weights: sites solved one by one or together, the record of each, and the weight in the parameter's
place.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from laconic.disk.verify import checksum
from laconic.engine.walk import Stage
from laconic.errors import SchemeError
from laconic.host.told import SiteRecord
from laconic.methods.base import Method
from laconic.methods.fitting import fitted
from laconic.model.sites import Site, Slot
from laconic.model.unmeasured import completed
from laconic.solvers.output_error import output_error
from laconic.weights import Weight
from laconic.weights.demands import Demands, check_demands, set_demands

Told_co = TypeVar("Told_co", covariant=True)
Told = TypeVar("Told")
"""What is told of a site: the report's record, or less."""


def fed_alike(methods: Mapping[Slot, Method], inputs: Mapping[Slot, int | None]) -> list[list[Slot]]:
    """The sites of `inputs` in their order, those together that a joint method treats as one: fed one tensor, under
    equal methods.
    """
    found: dict[object, list[Slot]] = {}
    for slot, number in inputs.items():
        together = methods[slot].joint and number is not None
        found.setdefault((methods[slot], number) if together else slot, []).append(slot)
    return list(found.values())


def solve_sites(method: Method, sites: Sequence[Site]) -> list[Weight]:
    """The weights a method finds for sites that it treats together. Raises: SchemeError with the sites' names."""
    try:
        with torch.no_grad():
            return method.together(sites)
    except SchemeError as error:
        names = [site.name for site in sites]
        named = any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", str(error)) for name in names)
        raise error if named else SchemeError(f"{', '.join(names)}: {error}") from error


class Place(Protocol[Told_co]):
    """What `solve_stage` asks of where weights live (`loop.Home`)."""

    def matrix(self, slot: Slot) -> Tensor: ...
    def known(self, site: Site) -> Site: ...
    def record(self, slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> Told_co: ...


def solve_stage(
    stage: Stage, methods: Mapping[Slot, Method], home: Place[Told], seed: int
) -> Iterator[tuple[Slot, Weight, Told]]:
    """The weight of every site of a stage, and the record of it.

    Raises: SchemeError with the name of a site, DataError where its statistics are not finite.
    """
    statistics = stage.statistics
    if statistics is None:
        return
    methods = {slot: fitted(methods[slot], slot.shape) for slot in stage.slots}
    for slots in fed_alike(methods, {slot: statistics.input_of(slot) for slot in stage.slots}):
        started = time.perf_counter()
        described = [home.known(statistics.describe(slot, home.matrix(slot), seed)) for slot in slots]
        sites = [completed(site, methods[slot].wants) for slot, site in zip(slots, described, strict=True)]
        del described
        for slot in slots:
            statistics.forget(slot)
        weights = solve_sites(methods[slots[0]], sites)
        seconds, entries = time.perf_counter() - started, sum(slot.entries for slot in slots)
        records = [
            home.record(slot, methods[slot], site, weight, seconds * slot.entries / entries)
            for slot, site, weight in zip(slots, sites, weights, strict=True)
        ]
        # a tensor of the block that is left behind keeps its Hessian, or the pages of its whole file, in memory
        del sites
        for slot, record in zip(slots, records, strict=True):
            yield slot, weights.pop(0), record


def record_of(slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> SiteRecord:
    """What the report says of a site and its weight; `seconds` is what finding it took."""
    bits = weight.bits()
    packed = site.tokens if site.groups > 1 and slot.view.lead > 1 else None
    return SiteRecord(
        name=slot.name,
        aliases=list(slot.names[1:]),
        parameter=slot.parameter,
        shape=list(slot.shape),
        role=slot.role,
        method=repr(method),
        kind=weight.words(),
        bits=bits,
        bits_per_weight=bits / slot.entries,
        error=output_error(site, weight),
        weight_error=output_error(site.having(hessian=None, squares=None), weight),
        checksum=checksum(weight, slot.name),
        notes=site.notes,
        expert_tokens=packed.tolist() if packed is not None else None,
        unmeasured=site.unmeasured or None,
        seconds=seconds,
        **(weight.inputs.to_spec() if weight.inputs is not None else {}),
    )


def check_layers(model: nn.Module, slot: Slot, weight: Weight) -> None:
    """Raises SchemeError where a layer of a site cannot do with inputs and outputs what the weight asks for."""
    for layer in slot.layers(model):
        check_demands(layer, weight, slot.name)


def matrix_of(model: nn.Module, slot: Slot) -> Tensor:
    """The site's present values as [out, in]."""
    path, name = slot.users[0]
    tensor: Tensor = getattr(model.get_submodule(path), name)
    return slot.view.matrix(tensor.detach())


def put_back(model: nn.Module, slot: Slot, weight: Weight) -> None:
    """Let the rest of the model see the decoded weight in the parameter's place, and its layers round their inputs if
    it asks for it.
    """
    for layer in slot.layers(model):
        set_demands(layer, Demands.of(weight))
    path, name = slot.users[0]
    parameter: Tensor = getattr(model.get_submodule(path), name)
    with torch.no_grad():
        parameter.copy_(slot.view.restore(weight.forward()))
