"""The types of hyper-parameters, as a class annotates them."""

import types
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from laconic.errors import SchemeError
from laconic.methods.free import Free


def check_values(what: str, cls: type, values: dict[str, Any]) -> None:
    """Raises SchemeError unless every value is of the type that the class annotates; a `Free` may stand for any."""
    hints = _hints(cls)
    for name, value in values.items():
        if name in hints and not isinstance(value, Free) and not _is_of(hints[name], value):
            raise SchemeError(f"{what}: {name} should be {_in_words(hints[name])}, got {value!r}")


def check_types(what: str, value: Any) -> None:
    """`check_values` for a dataclass and all dataclasses in its fields."""
    found = {f.name: getattr(value, f.name) for f in fields(value)}
    check_values(f"{what}: {type(value).__name__}", type(value), found)
    for inner in found.values():
        if is_dataclass(inner) and not isinstance(inner, type) and not isinstance(inner, Free):
            check_types(what, inner)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value has a type: those that hyper-parameters have are checked, anything else is let pass."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(one, value) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        return len(wanted) == len(value) and all(map(_is_of, wanted, value))
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and origin is None else True


def _in_words(hint: Any) -> str:
    """A type as a message names it: "int or None", "'dense' or 'ans'"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is types.NoneType:
        return "None"
    return str(hint) if get_origin(hint) is not None else getattr(hint, "__name__", str(hint))
