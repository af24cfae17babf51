"""Compressing a model: gather statistics, allocate, solve, put, commit. One loop, wherever the weights live."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from laconic.engine.plan import Plan
from laconic.engine.solve import Told, solve_stage
from laconic.engine.walk import Stage
from laconic.methods.base import Method
from laconic.model.sites import Site, Slot, Stats
from laconic.weights import Weight


class Home(Protocol[Told]):
    """Where a model's weights live while they are compressed: in a directory, in a module, or as values that are
    given.
    """

    seed: int
    """The run's: whatever is drawn, is drawn from it and a site's name."""

    def surveyed(self, plan: Plan) -> Iterator[Stage]:
        """The sites that an allocation has to see or whose gradients a method reads, with what is known of them in the
        original model.
        """

    def stages(self, plan: Plan) -> Iterator[Stage]:
        """All sites of the plan, some at a time, in the order in which they are compressed, with the statistics their
        methods read.
        """

    def matrix(self, slot: Slot) -> Tensor:
        """The values of a site [out, in], not compressed yet; those of a stage that was just asked for are in
        memory.
        """

    def observed(self, slot: Slot, site: Site, wants: Stats) -> None:
        """The survey saw a site: what `wants` names of its gradients is kept for `known`."""

    def known(self, site: Site) -> Site:
        """The site with what is known of it beside its stage's statistics: the survey's gradients, the network's
        channels.
        """

    def settled(self, plan: Plan, allocate: Callable[[], tuple[Plan, list[str]]]) -> Plan:
        """The plan and what has to be said of it, as `allocate` finds them; or as an interrupted run did."""

    def record(self, slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> Told:
        """What is told of a site and its weight, found in so many seconds. Raises: SchemeError where its layers cannot
        do what that asks for.
        """

    def put(self, slot: Slot, weight: Weight, record: Told) -> None:
        """A weight is found: it stands in the site's place for everything that is run from now on, if that is to see
        it.
        """

    def commit(self, part: str, weights: dict[Slot, Weight], records: list[Told]) -> None:
        """A part is finished, and nothing more will be asked of it: a block, or what lies before or after them."""


def compress(home: Home[Told], plan: Plan) -> Plan:
    """Carry a plan out; returns it as it was settled, with every site's own method.

    Raises: SchemeError with the name of a site, DataError where its statistics are not finite.

    Memory: a part of the model and its statistics, as far as the home holds no more. Cost: that of the plan's methods,
    and of the runs of the model that its stages take.
    """
    plan = home.settled(plan, partial(allocate, home, plan))
    weights: dict[Slot, Weight] = {}
    records: list[Told] = []
    for stage in home.stages(plan):
        for slot, weight, record in solve_stage(stage, plan.methods, home, home.seed):
            home.put(slot, weight, record)
            weights[slot] = weight
            records.append(record)
            del weight  # which the dictionary drops when it is committed
        if stage.complete and (weights or stage.slots):
            home.commit(stage.part, weights, records)
            weights, records = {}, []
    return plan


def allocate(home: Home[Told], plan: Plan) -> tuple[Plan, list[str]]:
    """Let every allocation see its sites, then give each site its own method; and what the allocations have to say."""
    spread = plan.allocations()
    if not spread and not any(plan.surveyed.values()):
        return plan, []
    for stage in home.surveyed(plan):
        for slot in stage.slots:
            if stage.statistics is None:
                continue
            method = plan.methods[slot]
            site = home.known(stage.statistics.describe(slot, home.matrix(slot), home.seed))
            with torch.no_grad():
                if method in spread:
                    spread[method].observe(site)
            home.observed(slot, site, method.wants)
            stage.statistics.forget(slot)
    resolved = {method: allocation.resolve() for method, allocation in spread.items()}
    notes = [note for allocation in spread.values() for note in allocation.notes]
    own = {slot: resolved[method][slot.name] for slot, method in plan.methods.items() if method in resolved}
    return plan.having(own), notes
