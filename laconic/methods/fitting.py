"""Tiles that do not divide a matrix: the nearest configuration of a method that can treat its shape, and how it differs
in words.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from laconic.errors import SchemeError
from laconic.methods.base import Method

SMALLEST = 8
"""The smallest group a fallback leaves: a 16-bit scale and a zero point over 8 codes are as many bits again as the
codes themselves.
"""

Shape = tuple[int, int]


def fitted(method: Method, *shapes: Shape) -> Method:
    """The method itself where it can treat matrices [out, in] of the shapes; else with tiles that divide them, also in
    the methods within it.

    A `group` of columns becomes the largest divisor of it that divides the columns, or "channel" when that is below 8;
    `rows` that share a table the largest such divisor of the rows, or the whole matrix when that is below 8. A vector
    `dimension` becomes its largest divisor that divides the columns, with as many bits per weight, rounded up to whole
    bits a code; "n:m" the largest common divisor of it that does, at the same density (every 1:2 is a 2:4 too). What
    cannot be mended so is returned as it is: `expected_bits` then says why.
    """
    if treats(method, shapes):
        return method
    changes: dict[str, Any] = {}
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if isinstance(value, Method):
            changes[f.name] = fitted(
                value, *(inner for shape in shapes for inner in method.inner_shapes(f.name, shape))
            )
    changes |= _tiles(method, [columns for _, columns in shapes], [rows for rows, _ in shapes])
    changes = {name: value for name, value in changes.items() if value != getattr(method, name)}
    return replace(method, **changes) if changes else method  # type: ignore[type-var]


def treats(method: Method, shapes: Sequence[Shape]) -> bool:
    """Whether a method can treat matrices of all the shapes."""
    try:
        for shape in shapes:
            method.expected_bits(shape)
    except SchemeError:
        return False
    return True


def difference(asked: Method, got: Method) -> str:
    """How a fitted method differs from the one asked for: "group 32 instead of 64"; empty where they are equal."""
    found = []
    for f in fields(asked):  # type: ignore[arg-type]
        before, after = getattr(asked, f.name), getattr(got, f.name)
        if isinstance(before, Method):
            found.append(difference(before, after))
        elif before != after:
            found.append(f"{f.name} {after} instead of {before}")
    return ", ".join(text for text in found if text)


def _tiles(method: Any, columns: list[int], rows: list[int]) -> dict[str, Any]:
    """The values of a method's own tile sizes that divide every one of the columns (or rows)."""
    changes: dict[str, Any] = {}
    if group := _size(method, "group"):
        changes["group"] = _divisor(group, columns) or "channel"
    if height := _size(method, "rows"):
        changes["rows"] = _divisor(height, rows)
    dimension, bits = _size(method, "dimension"), _size(method, "bits")
    if dimension and bits:
        changes["dimension"] = math.gcd(dimension, *columns)
        changes["bits"] = max(1, math.ceil(bits * changes["dimension"] / dimension))
    kept, colon, of = str(getattr(method, "pattern", "")).partition(":")
    if colon and kept.isdigit() and of.isdigit() and int(of) > 0 and any(n % int(of) for n in columns):
        changes["pattern"] = _smaller_pattern(int(kept), int(of), columns)
    return changes


def _size(method: Any, name: str) -> int | None:
    """A hyper-parameter that is a size, or None for one that is not there or is no positive number."""
    value = getattr(method, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _divisor(size: int, lengths: list[int]) -> int | None:
    """The size, if it divides all lengths; else its largest divisor that does, or None for one that is too small to
    pay.
    """
    common = math.gcd(size, *lengths)
    return common if common == size or common >= SMALLEST else None


def _smaller_pattern(n: int, m: int, columns: list[int]) -> str:
    """n:m with both divided by the same whole number, so that it tiles the columns; unchanged where there is none."""
    for by in range(2, math.gcd(n, m) + 1):
        if n % by == 0 and m % by == 0 and all(length % (m // by) == 0 for length in columns):
            return f"{n // by}:{m // by}"
    return f"{n}:{m}"
