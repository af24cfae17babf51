"""The compression step: the weights nearest to given values, under one scheme, for a whole module in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.tensors import is_finite
from laconic.engine.plan import Plan
from laconic.engine.resolve import resolve
from laconic.engine.solve import fed_alike, solve_sites
from laconic.engine.statistics import Statistics
from laconic.engine.walk import Loss, default_loss, parameters_of, survey_whole
from laconic.errors import CheckpointError, DataError
from laconic.host.ambient import undisturbed
from laconic.methods.base import Method
from laconic.methods.fitting import fitted
from laconic.model.batches import Batch, to_device
from laconic.model.calling import call, in_evaluation
from laconic.model.sites import GRADIENTS, MEASURED, Site, Slot, Stats, find_slots
from laconic.model.unmeasured import completed
from laconic.model.usage import in_sight
from laconic.scheme.text import Scheme, describe
from laconic.weights import Weight


@dataclass(frozen=True)
class Projection:
    """C of "minimise L(w) subject to w = D(Theta)": Theta = argmin ||w - D(Theta)||^2 over what a scheme allows.

    Whatever a scheme spreads over the network (one threshold, say) is found anew from the values given; so are masks, scales and tables.
    Statistics of the original model (curvature for a criterion, inputs for error feedback) are gathered once and kept.
    Source: Carreira-Perpinan 2017, eq. 4; Condensa section 3.3. Cost: that of the scheme's methods.
    """

    scheme: str
    plan: Plan
    sites: dict[Slot, Site]
    coupling: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> dict[Slot, Method]:
        """The method of every site that is compressed."""
        return self.plan.methods

    @property
    def slots(self) -> list[Slot]:
        """What is compressed."""
        return list(self.sites)

    def compress(self, values: Mapping[Slot, Tensor]) -> dict[Slot, Weight]:
        """The weights nearest to `values`, tensors in their parameters' own shapes."""
        with torch.no_grad():
            sites = {slot: site.having(W=slot.view.matrix(values[slot]), notes=[]) for slot, site in self.sites.items()}
            sites = {slot: completed(site, self.chosen[slot].wants) for slot, site in sites.items()}
            methods = dict(self.chosen)
            for method, allocation in self.plan.allocations().items():
                for slot, site in sites.items():
                    if self.chosen[slot] == method:
                        allocation.observe(site)
                found = allocation.resolve()
                self.notes.extend(note for note in allocation.notes if note not in self.notes)
                methods |= {slot: found[slot.name] for slot in sites if self.chosen[slot] == method}
            methods = {slot: fitted(method, slot.shape) for slot, method in methods.items()}
            weights: dict[Slot, Weight] = {}
            for slots in fed_alike(methods, {slot: site.input for slot, site in sites.items()}):
                solved = solve_sites(methods[slots[0]], [sites[slot] for slot in slots])
                weights |= zip(slots, solved, strict=True)
            for site in sites.values():
                self.notes.extend(note for note in site.notes if note not in self.notes)
        return {slot: weights[slot] for slot in sites}

    def keep_side(self, weights: Mapping[Slot, Weight], values: Mapping[Slot, Tensor]) -> None:
        """Move weights to the nearest points with their masks, scales and tables as they are: `right_inverse`."""
        with torch.no_grad():
            for slot, weight in weights.items():
                weight.right_inverse(slot.view.matrix(values[slot]))


@undisturbed()
def project_onto(
    model: nn.Module, scheme: Scheme, *, example: Batch | None = None, data: Sequence[Batch] = (), loss: Loss | None = None, seed: int = 0,
    coupling: Any = None,
) -> Projection:  # fmt: skip
    """The projection of a module's present values: slots, methods, and the statistics the methods ask for, from `data`.

    Structures need `example`, an input to trace the network with; `coupling` is what `surgery.couple` found for it before. Without one, rows of
    a network that cannot be traced are masked each for itself, which the notes say.
    Raises: SchemeError, DataError (statistics without data), CheckpointError (a parameter that is not finite), SurgeryError.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise CheckpointError(f"{name}: holds NaN or infinity")
    plan = resolve(scheme, find_slots(model))
    wanted = plan.wanted
    measured = {slot: need & MEASURED for slot, need in wanted.items()}
    if any(measured.values()) and not data:
        raise DataError(f"{describe(scheme)}: needs data for its statistics")
    statistics = _gather(model, measured, data, loss or default_loss, seed)
    sites = {
        slot: statistics.describe(slot, slot.view.matrix(p.detach()), seed)
        for slot, p in parameters_of(model, list(plan.methods)).items()
    }
    notes: list[str] = []
    if plan.structures:
        if coupling is None:
            if example is None:
                raise DataError(f"{describe(scheme)}: structures need an example input to trace the network with")
            from laconic.surgery import couple_or_mask

            coupling = couple_or_mask(model, example)
            notes += [] if coupling.groups else coupling.refused[:1]
        sites = {slot: site.having(channels=coupling.channels.get(slot.name)) for slot, site in sites.items()}
    return Projection(describe(scheme), plan, sites, coupling, notes)


def reads_data(model: nn.Module, scheme: Scheme) -> bool:
    """Whether a scheme asks for statistics that the model has to be run for. Raises: SchemeError."""
    return resolve(scheme, find_slots(model)).reads_data


def compressed_slots(model: nn.Module, scheme: Scheme) -> list[Slot]:
    """The sites of a module that a scheme compresses. Raises: SchemeError."""
    return list(resolve(scheme, find_slots(model)).methods)


def _gather(model: nn.Module, needs: dict[Slot, Stats], data: Iterable[Batch], loss: Loss, seed: int) -> Statistics:
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
                    _detached(batch) for batch in data
                ]  # a gradient is asked of them, which the user's own must not carry
                statistics = survey_whole(model, batches, slots, needs, device, seed=seed, loss=loss).statistics
                assert statistics is not None
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


def _detached(value: Any) -> Any:
    """Tensors anywhere inside dicts, lists and tuples, as tensors of their own that share the values."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_detached(item) for item in value)
    return value
