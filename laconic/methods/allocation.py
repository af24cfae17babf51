"""Spreading one number over many sites: every site is seen once, then each gets a method of its own."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from laconic.model.sites import MEASURED, NONE, Site, Stats
from laconic.model.unmeasured import completed

if TYPE_CHECKING:  # the module of methods builds on this one: a method says how it spreads its number
    from laconic.methods.base import Method


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
    def resolve(self) -> "dict[str, Method]":
        """A method for the name of every site observed; these stand alone (their `allocation()` is None)."""


class _Composed(Allocation):
    """The allocations of two parts, whose methods are composed again site by site."""

    def __init__(
        self,
        compose: "Callable[[Method, Method], Method]",
        methods: "tuple[Method, Method]",
        parts: tuple[Allocation | None, Allocation | None],
    ) -> None:
        self.compose, self.methods, self.parts = compose, methods, parts
        self.names: list[str] = []
        self.wants = NONE
        for part in parts:
            self.wants |= part.wants if part is not None else NONE

    def observe(self, site: Site) -> None:
        self.names.append(site.name)
        for part in self.parts:
            if part is not None:
                part.observe(site)

    def resolve(self) -> "dict[str, Method]":
        first, second = ({} if part is None else part.resolve() for part in self.parts)
        self.notes = [note for part in self.parts if part is not None for note in part.notes]
        usual_first, usual_second = self.methods
        return {name: self.compose(first.get(name, usual_first), second.get(name, usual_second)) for name in self.names}


def composed(compose: "Callable[[Method, Method], Method]", first: "Method", second: "Method") -> Allocation | None:
    """The allocation of a composition: both parts allocate on the sites' own values, then `compose` joins their methods
    site by site.
    """
    parts = first.allocation(), second.allocation()
    return None if parts == (None, None) else _Composed(compose, (first, second), parts)


class Measured(Allocation):
    """An allocation that sees only sites of which it can know something.

    A site without the statistics it wants gets what the number comes to for it alone: the rate or sparsity asked for.
    Channels are seen anyway, since rows of several sites belong together.
    """

    def __init__(self, method: "Method", inner: Allocation) -> None:
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

    def resolve(self) -> "dict[str, Method]":
        found = self.inner.resolve() if self.seen or not self.alone else {}
        self.notes = list(self.inner.notes)
        return found | self.alone
