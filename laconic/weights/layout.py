"""A stored spec before anything is read by it: the tensors it asks for, how much they may decode to, what it says in
words.

No kind of weight is known here: the class that a spec names says which parts it has (`parts_in`) and which tensors
(`tensors_in`).
"""

import math
from typing import Any

from laconic.errors import CheckpointError
from laconic.weights.base import BIAS, EntryWeight, Weight, asks_its_layer, class_of, in_words
from laconic.weights.inputs import BITS_KEY, KEY, inputs_of
from laconic.weights.spec import Spec

DEPTH = 16  # weights within weights
PARTS = 1024  # of one weight
_FLOOR = 1 << 22  # entries that side information may have beside the smallest matrix: 64 tables of 16 bits
_TIMES = 16  # times the entries of the matrix, of all parts that are kept in memory together


def stored_names(spec: Spec) -> set[str]:
    """The tensors of a spec that `check_spec` let through, by their names within the weight."""
    cls = class_of(spec)
    names = set(cls.tensors_in(spec))
    for prefix, part in cls.parts_in(spec).items():
        names |= {f"{prefix}.{name}" for name in stored_names(part)}
    return names


def words_of(spec: Spec) -> str:
    """`Weight.words` of the weight that a spec stands for."""
    cls = class_of(spec)
    parts = {name: words_of(part) for name, part in cls.parts_in(spec).items()}
    return in_words(cls, parts, inputs_of(spec))


def check_spec(spec: Any, where: str) -> None:
    """Refuses a spec that no reader may be led by, before anything is read.

    A reader must not allocate far more than the matrix the spec stands for: each part may have four times its entries,
    all that are in memory together sixteen times (4M at least); a weight has at most 1,024 parts, 16 deep. Every kind
    is known, and what a weight asks of its layer stands at the outermost spec. Raises: CheckpointError.
    """
    root = _entries(spec, where, math.inf)
    total, count = 0, 0
    todo = [(spec, 0)]
    while todo:
        part, depth = todo.pop()
        entries = _entries(part, where, max(4 * root, _FLOOR))
        cls, inner = _asked_for(part, where)
        if depth and asks_its_layer(part):
            key = next(key for key in (BITS_KEY, KEY, BIAS) if key in part)
            raise CheckpointError(f"{where}: {key} in a part of a weight; the manifest is damaged")
        count += 1
        total += entries if _holds_entries(cls, inner) else 0
        if depth > DEPTH or count > PARTS or total > max(_TIMES * root, _FLOOR):
            raise CheckpointError(
                f"{where}: its parts ({count} so far, {total:,} entries) are too many for a matrix of "
                f"{spec['shape']}; damaged"
            )
        todo += [(value, depth + 1) for value in inner.values()]


def _holds_entries(cls: type[Weight], parts: dict[str, Any]) -> bool:
    """Whether a weight keeps as many numbers as its matrix has entries beside what its parts keep: one that is made of
    parts does not."""
    return issubclass(cls, EntryWeight) or not parts


def _asked_for(part: Any, where: str) -> tuple[type[Weight], dict[str, Any]]:
    """The class of a spec, and the specs of its parts."""
    try:
        cls = class_of(part)
        cls.tensors_in(part)
        inputs_of(part)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return cls, cls.parts_in(part)


def _entries(part: Any, where: str, limit: float) -> int:
    shape = part.get("shape") if isinstance(part, dict) else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        raise CheckpointError(f"{where}: shape must be two positive integers, got {str(shape)[:80]}")
    if shape[0] * shape[1] > limit:
        kind = str(part.get("kind"))[:40]
        raise CheckpointError(f"{where}: a part of kind {kind!r} and shape {shape}; the manifest is damaged")
    return shape[0] * shape[1]
