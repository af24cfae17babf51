"""Spreading one number over many sites: every site is seen once, then each gets a method of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from laconic.engine.unmeasured import completed
from laconic.methods.base import Method, Plus, Then
from laconic.model.sites import MEASURED, NONE, Site, Stats


class Allocation(ABC):
    """Sees each site of a scheme once, unchanged, with the statistics `wants`; then says which method each site gets.

    It may keep small summaries only: a site's tensors are gone when the next one comes.
    """

    wants: Stats = NONE
    notes: Sequence[str] = ()
    """What the user must hear of how the number was spread; complete after `resolve`."""

    @abstractmethod
    def observe(self, site: Site) -> None:
        """Note what matters of one site."""

    @abstractmethod
    def resolve(self) -> dict[str, Method]:
        """A method for the name of every site observed; these stand alone (their `allocation()` is None)."""


@dataclass
class _Composed(Allocation):
    whole: Then | Plus
    first: Allocation | None
    second: Allocation | None
    names: list[str]

    def __post_init__(self) -> None:
        self.wants = NONE
        for part in (self.first, self.second):
            self.wants |= part.wants if part is not None else NONE

    def observe(self, site: Site) -> None:
        self.names.append(site.name)
        for part in (self.first, self.second):
            if part is not None:
                part.observe(site)

    def resolve(self) -> dict[str, Method]:
        first = self.first.resolve() if self.first is not None else {}
        second = self.second.resolve() if self.second is not None else {}
        self.notes = [note for part in (self.first, self.second) if part is not None for note in part.notes]
        kind = type(self.whole)
        return {
            name: kind(first.get(name, self.whole.first), second.get(name, self.whole.second)) for name in self.names
        }


def composed(whole: Then | Plus, first: Method, second: Method) -> Allocation | None:
    """The allocation of a composition: both parts allocate on the sites' own values, then are composed again site by site."""
    parts = first.allocation(), second.allocation()
    return _Composed(whole, *parts, []) if any(part is not None for part in parts) else None


class Measured(Allocation):
    """An allocation that sees only sites of which it can know something.

    A site without the statistics it wants gets what the number comes to for it alone: the rate or sparsity asked for. Channels are seen
    anyway, since rows of several sites belong together.
    """

    def __init__(self, method: Method, inner: Allocation) -> None:
        self.method, self.inner, self.wants = method, inner, inner.wants
        self.seen = False
        self.alone: dict[str, Method] = {}

    def observe(self, site: Site) -> None:
        site = completed(site.having(notes=[]), self.wants)  # whoever solves the site says what is missing
        if site.unmeasured < 1 or self.wants & Stats.CHANNELS or not self.wants & MEASURED:
            self.seen = True
            self.inner.observe(site)
            return
        own = self.method.allocation()
        assert own is not None
        own.observe(site)
        self.alone |= own.resolve()

    def resolve(self) -> dict[str, Method]:
        found = self.inner.resolve() if self.seen or not self.alone else {}
        self.notes = list(self.inner.notes)
        return found | self.alone
