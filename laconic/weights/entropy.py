"""Lossless entropy coding of integer matrices with asymmetric numeral systems, in independent streams per tile of rows.

A matrix of codes [rows, columns] is cut into tiles of whole rows; each tile is one ANS stream, so tiles decode in
parallel and at random. The probability tables are static and stored with the matrix. Columns may be sorted into a few
classes with a table each (a column that matters more has a finer step, hence a wider distribution); one class is used
where more would not pay for their tables.

Tensors: `codes` int32, the words of all streams; `head` uint8, all that is needed to read them: seven int32 (see
`_Head`), where each stream ends, the values outside the tables, the tables [classes, symbols] of probabilities 2**(-q /
12), and (with several classes) the 4-bit class of every column. Reaches the empirical entropy of the classes within
1e-3 bit per code plus about 12 bytes per tile.

Source: Duda 2013 (ANS); the coder is `constriction` (Bamler 2022), 50 to 70 million symbols decoded per second on one
core, half as many encoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import constriction
import numpy as np
import torch
from torch import Tensor

from laconic.errors import CheckpointError

TILE = 1 << 16  # symbols per stream: about 16 KB at 2 bits, so the 12 bytes a stream costs are 0.1 %
# largest table; a value outside it is stored as it is (a single huge weight must not cost a table of its size)
_ALPHABET = 1 << 12
_STEPS = 12  # table entries are probabilities on a grid of 1/12 octave: 2e-4 bit per code lost, 1 byte per entry
_CLASSES = 16
# 2**(24 - k / 12), rounded: integers, because encoder and decoder must build bit-equal tables on every machine
_OCTAVE = np.array(
    [
        16777216,
        15835583,
        14946800,
        14107901,
        13316085,
        12568711,
        11863283,
        11197448,
        10568984,
        9975792,
        9415894,
        8887421,
    ]
)


def _frequencies(q: np.ndarray) -> np.ndarray:
    return np.maximum(_OCTAVE[q % _STEPS] >> (q // _STEPS).astype(np.int64), 1).astype(np.float64)


def _quantize(counts: np.ndarray) -> np.ndarray:
    """Probabilities of the counts [classes, symbols] as uint8 exponents; 255 stands for "does not occur"."""
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        q = np.rint(-_STEPS * np.log2(p))
    return np.minimum(np.where(counts > 0, q, 255), 255).astype(np.uint8)


def _models(table: np.ndarray) -> list[Any]:
    return [constriction.stream.model.Categorical(_frequencies(row), perfect=False) for row in table.astype(np.int64)]


def _entropy_bits(counts: np.ndarray) -> float:
    """Total bits of the counted symbols [classes, symbols] under their own class's distribution."""
    total = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(-np.nansum(np.where(counts > 0, counts * np.log2(counts / total), 0.0)))


@dataclass(frozen=True)
class _Symbols:
    """Codes [rows, columns] as symbols 0 ... high - low, those outside clipped, a few rows at a time: a large matrix is
    never copied whole."""

    codes: np.ndarray
    low: int
    high: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start : stop as int32 symbols [rows, columns]."""
        return np.clip(self.codes[start:stop].astype(np.int32), self.low, self.high) - np.int32(self.low)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where runs of rows start and stop that hold about a million symbols each."""
        step = max(1, TILE * 16 // self.codes.shape[1])
        return ((start, start + step) for start in range(0, len(self.codes), step))

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in turn, a span at a time."""
        return (self.rows(*span) for span in self.spans())

    def count(self, classes: np.ndarray, k: int) -> np.ndarray:
        """How often each symbol comes, by the class of its column: [k, symbols]."""
        size = self.high - self.low + 1
        counts = np.zeros((k, size), np.int64)
        for block in self.blocks():
            counts += np.bincount((classes[None] * size + block).reshape(-1), minlength=k * size).reshape(k, size)
        return counts

    def magnitudes(self) -> np.ndarray:
        """The mean |code| of every column [columns]; sums of integers, exact in any order."""
        totals = sum(np.abs(block + np.int32(self.low)).sum(0, dtype=np.float64) for block in self.blocks())
        return np.asarray(totals) / len(self.codes)

    def outside(self) -> np.ndarray:
        """The codes at or beyond the two ends, row by row: what a table that was capped cannot say."""
        found = []
        for start, stop in self.spans():
            block = self.codes[start:stop].astype(np.int32)
            found.append(block[(block <= self.low) | (block >= self.high)])
        return np.concatenate(found)


def _classify(symbols: _Symbols) -> tuple[np.ndarray, np.ndarray]:
    """A class per column, and the counts of every class: by the columns' mean magnitude in half-octave steps, if that
    pays."""
    columns = symbols.codes.shape[1]
    single = np.zeros(columns, np.int64)
    counts = symbols.count(single, 1)
    if columns < 2:
        return single, counts
    magnitude = np.log2(symbols.magnitudes() + 1e-3)
    step = max(0.5, float(np.ptp(magnitude)) / (_CLASSES - 1))
    classes = np.unique(np.rint((magnitude - magnitude.min()) / step).astype(np.int64), return_inverse=True)[1]
    k = int(classes.max()) + 1
    split = symbols.count(classes, k)
    pays = _entropy_bits(split) + 8 * (k - 1) * counts.shape[1] + 4 * columns < _entropy_bits(counts)
    return (classes, split) if pays else (single, counts)


@dataclass(frozen=True)
class _Head:
    """Everything about a coded matrix but the streams."""

    shape: tuple[int, int]
    low: int
    tile: int
    ends: np.ndarray
    outside: np.ndarray
    table: np.ndarray
    classes: np.ndarray

    def bytes(self) -> np.ndarray:
        """Seven int32 (rows, columns, low, tile, values outside, symbols, classes), then the arrays."""
        k, size = self.table.shape
        fields = np.array([*self.shape, self.low, self.tile, len(self.outside), size, k], "<i4")
        packed = _pack_classes(self.classes, k)
        return np.concatenate(
            [part.view(np.uint8).reshape(-1) for part in (fields, self.ends, self.outside, self.table, packed)]
        )

    @classmethod
    def read(cls, data: np.ndarray, shape: tuple[int, int], words: int) -> Self:
        """The inverse of `bytes`. Raises: CheckpointError unless everything fits together and the expected shape."""
        fields = data[:28].view("<i4").tolist() if len(data) >= 28 else [0] * 7
        rows, columns, low, tile, outside, size, k = fields
        tiles = -(-rows // tile) if tile > 0 else 0
        sane = tile > 0 and 2 <= size <= _ALPHABET and 1 <= k <= _CLASSES and 0 <= outside <= rows * columns
        expected = 28 + 4 * tiles + 4 * outside + k * size + (-(-columns // 2) if k > 1 else 0)
        if (rows, columns) != shape or not sane or len(data) != expected:
            raise CheckpointError(
                f"entropy-coded codes: the head ({len(data)} bytes, {fields}) does not describe {shape[0]} x "
                f"{shape[1]} codes"
            )
        ends, rest = data[28 : 28 + 4 * tiles].view("<i4"), data[28 + 4 * tiles :]
        if np.any(np.diff(ends, prepend=0) < 0) or ends[-1] != words:
            raise CheckpointError(
                f"entropy-coded codes: the {tiles} streams should end at word {words}, the head says otherwise"
            )
        table = rest[4 * outside : 4 * outside + k * size].reshape(k, size)
        classes = _unpack_classes(rest[4 * outside + k * size :], k, columns)
        values = rest[: 4 * outside].view("<i4")
        return cls(shape, low=low, tile=tile, ends=ends, outside=values, table=table, classes=classes)


def least_bytes(shape: tuple[int, int]) -> int:
    """Bytes that `encode` takes for a matrix [rows, columns] whose codes are all equal: the head's fields, where each
    tile ends, one table."""
    return 28 + 4 * -(-shape[0] // max(1, TILE // shape[1])) + 2


def encode(codes: np.ndarray) -> dict[str, Tensor]:
    """Integer codes [rows, columns] as tensors. Cost: one pass for the tables, one for the streams; a few million bytes
    beside the codes."""
    rows, columns = codes.shape
    if codes.size == 0:
        return {"codes": torch.empty(0, dtype=torch.int32), "head": torch.empty(0, dtype=torch.uint8)}
    low, high = int(codes.min()), int(codes.max())
    capped = high - low >= _ALPHABET
    if capped:
        low = int(np.median(codes)) - _ALPHABET // 2
        high = low + _ALPHABET - 1
    symbols = _Symbols(codes, low, high)
    outside = symbols.outside() if capped else np.empty(0, np.int32)
    classes, counts = _classify(symbols)
    padded = counts if counts.shape[1] > 1 else np.pad(counts, ((0, 0), (0, 1)))  # an alphabet has two symbols or more
    table = _quantize(padded)
    models = _models(table)
    members = [np.flatnonzero(classes == k) for k in range(len(table))]
    tile = max(1, TILE // columns)
    words: list[np.ndarray] = []
    ends: list[int] = []
    for start in range(0, rows, tile):
        coder = constriction.stream.stack.AnsCoder()
        part = symbols.rows(start, start + tile)
        for model, member in zip(reversed(models), reversed(members), strict=True):
            coder.encode_reverse(np.ascontiguousarray(part[:, member]).reshape(-1), model)
        words.append(coder.get_compressed())
        ends.append(len(words[-1]) + (ends[-1] if ends else 0))
    ended, values = np.array(ends, "<i4"), outside.astype("<i4")
    head = _Head((rows, columns), low=low, tile=tile, ends=ended, outside=values, table=table, classes=classes)
    return {"codes": torch.from_numpy(np.concatenate(words).view(np.int32)), "head": torch.from_numpy(head.bytes())}


def decode(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The inverse of `encode`: int32 codes [rows, columns]. Raises: CheckpointError when tensors and shape disagree."""
    if shape[0] * shape[1] == 0:
        return torch.zeros(shape, dtype=torch.int32)
    words, head = _arrays(tensors, shape)
    decoded = _decode(words, head)
    if len(head.outside):
        edge = (decoded == head.low) | (decoded == head.low + head.table.shape[1] - 1)
        if int(edge.sum()) != len(head.outside):
            raise CheckpointError(
                f"entropy-coded codes: {len(head.outside)} values lie outside the table, {int(edge.sum())} were decoded"
            )
        decoded[edge] = head.outside
    return torch.from_numpy(decoded)


def _decode(words: np.ndarray, head: _Head) -> np.ndarray:
    rows, columns = head.shape
    models = _models(head.table)
    members = [np.flatnonzero(head.classes == k) for k in range(len(models))]
    out = np.empty((rows, columns), np.int32)
    for t in range(len(head.ends)):
        try:
            coder = constriction.stream.stack.AnsCoder(words[head.ends[t - 1] if t else 0 : head.ends[t]])
        except ValueError as error:
            raise CheckpointError(f"entropy-coded codes: stream {t} is damaged: {error}") from error
        part = out[t * head.tile : (t + 1) * head.tile]
        for model, member in zip(models, members, strict=True):
            part[:, member] = coder.decode(model, part.shape[0] * len(member)).reshape(part.shape[0], len(member))
    out += np.int32(head.low)
    return out


def _arrays(tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[np.ndarray, _Head]:
    for name, dtype in (("codes", torch.int32), ("head", torch.uint8)):
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].dim() != 1:
            raise CheckpointError(
                f"entropy-coded codes: expected a one-dimensional {dtype} tensor {name!r}, found {sorted(tensors)}"
            )
    words = tensors["codes"].numpy().view(np.uint32)
    return words, _Head.read(tensors["head"].numpy(), shape, len(words))


def _pack_classes(classes: np.ndarray, k: int) -> np.ndarray:
    if k == 1:
        return np.empty(0, np.uint8)
    even = np.pad(classes, (0, len(classes) % 2)).astype(np.uint8).reshape(-1, 2)
    return even[:, 0] | (even[:, 1] << 4)


def _unpack_classes(packed: np.ndarray, k: int, columns: int) -> np.ndarray:
    if k == 1:
        return np.zeros(columns, np.int64)
    classes = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[:columns].astype(np.int64)
    if classes.size and classes.max() >= k:
        raise CheckpointError(f"entropy-coded codes: a column names class {classes.max()}, there are {k}")
    return classes
