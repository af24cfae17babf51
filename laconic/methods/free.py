"""Hyper-parameters left open: a scheme with `Free` values is a family of schemes, of which a search names the best."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from laconic.errors import SchemeError

if TYPE_CHECKING:
    from laconic.model.sites import Slot
    from laconic.scheme.text import Scheme


@dataclass(frozen=True, repr=False)
class Free:
    """A hyper-parameter that a search chooses: a number of the open interval (low, high), an integer of low ... high, or one of `choices`.

    Stands in any hyper-parameter's place, as in `FilterPrune(sparsity=Free(0, 1)) >> Cast("float16")`. `log` asks for a search on the
    logarithm. The variable is called `name`, or as the hyper-parameter. Equal Frees of one hyper-parameter are one variable.
    Raises: SchemeError for bounds that are reversed, equal or not finite, and for choices that are none or repeat.
    Source: Condensa sections 3.1 and 6 (sparsity, and other hyper-parameters as future work).
    """

    low: float | None = None
    high: float | None = None
    integer: bool = False
    log: bool = False
    choices: tuple[Any, ...] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if (
                not isinstance(self.choices, tuple)
                or not self.choices
                or any(c in self.choices[:i] for i, c in enumerate(self.choices))
            ):
                raise SchemeError(
                    f"Free: choices should be a tuple of one or more different values, got {self.choices!r}"
                )
            if self.low is not None or self.high is not None or self.integer or self.log:
                raise SchemeError(f"Free: give choices or bounds, not both, got {self!r}")
            return
        low, high = self.low, self.high
        if not (_is_finite(low) and _is_finite(high)) or low is None or high is None or low >= high:
            raise SchemeError(
                f"Free: the bounds should be two finite numbers, the lower one first, got {low!r} and {high!r}"
            )
        if self.log and low <= 0:
            raise SchemeError(f"Free: a logarithm needs bounds above 0, got {low!r}")
        if self.integer and not (isinstance(low, int) and isinstance(high, int)):
            raise SchemeError(f"Free: integers need integers as bounds, got {low!r} and {high!r}")

    def __repr__(self) -> str:
        if self.choices is not None:
            parts = [f"choices={self.choices!r}"]
        else:
            parts = [repr(self.low), repr(self.high)] + [
                f"{flag}=True" for flag in ("integer", "log") if getattr(self, flag)
            ]
        return f"Free({', '.join(parts + ([f'name={self.name!r}'] if self.name is not None else []))})"

    def accept(self, value: Any) -> Any:
        """The value as a plain int, float or choice; the bounds themselves are accepted. Raises: SchemeError for one outside."""
        if self.choices is not None:
            if value not in self.choices:
                raise SchemeError(f"{self!r}: {value!r} is none of the choices")
            return self.choices[self.choices.index(value)]
        assert self.low is not None
        assert self.high is not None
        number = float(value) if isinstance(value, Real) else math.nan
        if not self.low <= number <= self.high or (self.integer and number != int(number)):
            raise SchemeError(
                f"{self!r}: expected {'an integer' if self.integer else 'a number'} between the bounds, got {value!r}"
            )
        return int(number) if self.integer else number


def _is_finite(bound: Any) -> bool:
    return isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)


class _Names:
    """The variables met so far: equal Frees under one name are one, different ones get "name", "name_2", ... in order of appearance."""

    def __init__(self) -> None:
        self.known: dict[str, Free] = {}

    def key(self, parameter: str, free: Free) -> str:
        base, number = free.name or parameter, 1
        key = base
        while self.known.setdefault(key, free) != free:
            number += 1
            key = f"{base}_{number}"
        return key


def free_within(value: Any) -> list[tuple[str, Free]]:
    """Every (hyper-parameter, Free) of a method and of the methods within it, in the order of the arguments."""
    if not is_dataclass(value) or isinstance(value, Free | type):
        return []
    found: list[tuple[str, Free]] = []
    for f in fields(value):
        inner = getattr(value, f.name)
        found += [(f.name, inner)] if isinstance(inner, Free) else free_within(inner)
    return found


def free_of(scheme: "Scheme", slots: Sequence["Slot"]) -> dict[str, Free]:
    """The variables of a scheme by name, in order of appearance; a function is asked for every slot."""
    names = _Names()
    for method in methods_of(scheme, slots):
        for parameter, free in free_within(method):
            names.key(parameter, free)
    return names.known


def fix(scheme: "Scheme", values: Mapping[str, Any], slots: Sequence["Slot"] = ()) -> "Scheme":
    """The scheme with a value in the place of every Free; a function becomes one that fixes what the inner one returns.

    `values` by the names that `free_of` gives. A function that holds several different Frees of one hyper-parameter needs the `slots` that
    `free_of` was given: its variables are numbered in their order. Raises: SchemeError for a name without a value, a value that no Free of
    the scheme is called by, and a value outside the bounds.
    """
    names = _Names()
    names.known.update(free_of(scheme, slots))
    if is_dataclass(scheme) or not callable(scheme):
        _check_names(names.known, values)
    if is_dataclass(scheme):
        return _fixed(scheme, values, names)
    if callable(scheme):
        return _fixing(scheme, values, names)
    return [(test, _fixed(method, values, names)) for test, method in scheme]


def methods_of(scheme: Any, slots: Sequence["Slot"]) -> list[Any]:
    """The methods a scheme names; a function is asked for every slot. Raises: SchemeError for a rule that is none."""
    if is_dataclass(scheme):
        return [scheme]
    if callable(scheme):
        return [scheme(slot) for slot in slots]
    for rule in scheme:
        if not (isinstance(rule, tuple) and len(rule) == 2):
            raise SchemeError(f"a rule is a pair (pattern or predicate, method), got {rule!r}")
    return [method for _, method in scheme]


def _check_names(known: Mapping[str, Free], values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in known:
            raise SchemeError(f"fix: nothing of the scheme is called {name!r}; free: {', '.join(known) or 'nothing'}")


def _fixed(value: Any, values: Mapping[str, Any], names: _Names) -> Any:
    """A method with values; those without a Free are returned as they are."""
    if not free_within(value):
        return value
    changes = {}
    for f in fields(value):
        inner = getattr(value, f.name)
        if isinstance(inner, Free):
            key = names.key(f.name, inner)
            if key not in values:
                raise SchemeError(f"fix: {key!r} of {value!r} has no value; given: {', '.join(values) or 'none'}")
            changes[f.name] = inner.accept(values[key])
        else:
            changes[f.name] = _fixed(inner, values, names)
    return replace(value, **changes)


def _fixing(scheme: Any, values: Mapping[str, Any], names: _Names) -> Callable[["Slot"], Any]:
    @functools.wraps(scheme)  # keeps its name and its text
    def fixed(slot: "Slot") -> Any:
        return _fixed(scheme(slot), values, names)

    return fixed
