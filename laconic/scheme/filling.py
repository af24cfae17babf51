"""The free values of a scheme: named, and filled in."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from laconic.errors import SchemeError
from laconic.methods.free import Free, free_within
from laconic.model.sites import Slot
from laconic.scheme.text import Scheme


def free_of(scheme: Scheme, slots: Sequence[Slot]) -> dict[str, Free]:
    """The variables of a scheme by name, in order of appearance; a function is asked for every slot."""
    names = _Names()
    for method in methods_of(scheme, slots):
        for parameter, free in free_within(method):
            names.key(parameter, free)
    return names.known


def fix(scheme: Scheme, values: Mapping[str, Any], slots: Sequence[Slot] = ()) -> Scheme:
    """The scheme with a value in the place of every Free; a function becomes one that fixes what the inner one returns.

    `values` by the names that `free_of` gives. A function that holds several different Frees of one hyper-parameter
    needs the `slots` that `free_of` was given: its variables are numbered in their order. Raises: SchemeError for a
    name without a value, a value that no Free of the scheme is called by, and a value outside the bounds.
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


def methods_of(scheme: Any, slots: Sequence[Slot]) -> list[Any]:
    """The methods a scheme names; a function is asked for every slot. Raises: SchemeError for a rule that is none."""
    if is_dataclass(scheme):
        return [scheme]
    if callable(scheme):
        return [scheme(slot) for slot in slots]
    for rule in scheme:
        if not (isinstance(rule, tuple) and len(rule) == 2):
            raise SchemeError(f"a rule is a pair (pattern or predicate, method), got {rule!r}")
    return [method for _, method in scheme]


class _Names:
    """The variables met so far: equal Frees under one name are one, different ones get "name", "name_2", ... in order
    of appearance."""

    def __init__(self) -> None:
        self.known: dict[str, Free] = {}

    def key(self, parameter: str, free: Free) -> str:
        base, number = free.name or parameter, 1
        key = base
        while self.known.setdefault(key, free) != free:
            number += 1
            key = f"{base}_{number}"
        return key


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


def _fixing(scheme: Any, values: Mapping[str, Any], names: _Names) -> Callable[[Slot], Any]:
    @functools.wraps(scheme)  # keeps its name and its text
    def fixed(slot: Slot) -> Any:
        return _fixed(scheme(slot), values, names)

    return fixed
