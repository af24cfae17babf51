"""A value as the text that makes it, for the classes whose text is stored beside a model and compared when a run is
resumed.
"""

from dataclasses import fields
from typing import Any

QUIET = {"quiet": True}
"""The metadata of a field whose default is left out of the text, so that texts from before there was the field stay
equal.
"""


class Usual(float):
    """A default that is told from the same number when somebody gives it."""


def given(value: Any) -> list[str]:
    """The fields of a dataclass that are not at their defaults; a `Usual` default counts as given if it is another
    object.
    """
    return [f.name for f in fields(value) if not _same(getattr(value, f.name), f.default)]


def written(value: Any, names: list[str] | None = None) -> str:
    """The expression that makes a dataclass: the fields named, or all of them but quiet ones at their defaults."""
    if names is None:
        chosen = given(value)
        names = [f.name for f in fields(value) if f.name in chosen or not f.metadata.get("quiet")]
    return f"{type(value).__name__}({', '.join(f'{name}={getattr(value, name)!r}' for name in names)})"


def _same(value: Any, default: Any) -> bool:
    return value is default if isinstance(default, Usual) else bool(value == default)
