"""The names of the tensors a spec asks for, found without any of them; and how much they may decode to."""

import math
from collections.abc import Iterator
from typing import Any

from laconic.errors import CheckpointError
from laconic.weights.base import Spec
from laconic.weights.dense import DTYPES

DEPTH = 16  # weights within weights
PARTS = 1024  # of one weight
_FLOOR = 1 << 22  # entries that side information may have beside the smallest matrix: 64 tables of 16 bits
_TIMES = 16  # times the entries of the matrix, of all parts that are kept in memory together
_MADE_OF = {"sparse": ("values",), "lowrank": ("left", "right", "bias"), "scaled": ("weight", "row_scale", "column_scale"), "rotated": ("weight",),
            "permuted": ("weight",), "uniform": ("scale", "zero"), "codebook": ("table", "row_scale"), "dense": ()}  # fmt: skip
_OWN = {"dense": ("values",), "permuted": ("order",)}
_MASKS: dict[str, tuple[str, ...]] = {"index": ("mask", "counts"), "entropy": ("mask", "stream")}


def parts_of(spec: Spec) -> Iterator[tuple[str, Any]]:
    """The specs a spec is made of, by the prefix of their tensors."""
    if spec.get("kind") == "sum":
        terms = spec.get("terms")
        yield from ((str(i), term) for i, term in enumerate(terms if isinstance(terms, list) else ()))
        return
    yield from ((name, spec[name]) for name in _MADE_OF.get(str(spec.get("kind")), ()) if name in spec)


def stored_names(spec: Spec) -> set[str]:
    """The tensors of a spec that `check_spec` let through, by their names within the weight."""
    kind = spec["kind"]
    own: tuple[str, ...] = _OWN.get(kind, ())
    if kind in ("uniform", "codebook"):
        own = ("codes", "head") if spec.get("codec") == "ans" else ("codes",)
    elif kind == "sparse":
        mask = spec.get("mask")
        own = _MASKS.get(str(mask.get("coding")) if isinstance(mask, dict) else "", ("mask",))
    elif kind == "rotated":
        sides = spec.get("sides")
        own = tuple(name for name in ("row_signs", "column_signs") if isinstance(sides, list) and name in sides)
    return {*own, *(f"{prefix}.{name}" for prefix, part in parts_of(spec) for name in stored_names(part))}


def check_spec(spec: Any, where: str) -> None:
    """Refuses a spec whose reader would allocate far more than the matrix it stands for, before anything is read.

    Each part may have four times the entries of the matrix, all that are in memory together sixteen times (4M at least); a weight has at
    most 1,024 parts, 16 deep. Raises: CheckpointError.
    """
    root = _entries(spec, where, math.inf)
    total, count = 0, 0
    todo = [(spec, 0)]
    while todo:
        part, depth = todo.pop()
        entries = _entries(part, where, max(4 * root, _FLOOR))
        if part["kind"] not in (*_MADE_OF, "sum", "shared"):
            raise CheckpointError(
                f"{where}: unknown kind of weight {part['kind'][:40]!r}; this file needs a newer laconic, or is damaged"
            )
        inner = [value for _, value in parts_of(part)]
        count += 1
        total += 0 if part.get("kind") in ("sum", "scaled", "lowrank", "rotated", "permuted", "sparse") else entries
        if depth > DEPTH or count > PARTS or total > max(_TIMES * root, _FLOOR):
            raise CheckpointError(
                f"{where}: its parts ({count} so far, {total:,} entries) are too many for a matrix of {spec['shape']}; damaged"
            )
        blocks = part.get("pattern")
        if isinstance(blocks, dict) and any(isinstance(side, list) and len(side) > 8 for side in blocks.values()):
            raise CheckpointError(f"{where}: blocks of a tensor of more than eight dimensions; the manifest is damaged")
        todo += [(value, depth + 1) for value in inner]


def _entries(part: Any, where: str, limit: float) -> int:
    shape = part.get("shape") if isinstance(part, dict) else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        raise CheckpointError(f"{where}: shape must be two positive integers, got {str(shape)[:80]}")
    sound = (
        isinstance(part.get("kind"), str)
        and isinstance(part.get("sides", []), list)
        and str(part.get("dtype", "float32")) in DTYPES
    )
    if shape[0] * shape[1] > limit or not sound:
        raise CheckpointError(
            f"{where}: a part of kind {str(part.get('kind'))[:40]!r} and shape {shape}; the manifest is damaged"
        )
    return shape[0] * shape[1]
