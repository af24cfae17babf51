"""Row maps: tensors that say the same wherever a 16-bit weight has the same value. Found by comparing all rows, never
assumed.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from laconic.offload.held import CHUNK, Bytes, Layout
from laconic.offload.learners import checksum

_CODES = 1 << 16
# entries of a weight that are looked at before all are: rows of equal ones among them tell most tensors that are no row
# maps
_PAIRS = 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks(NamedTuple):
    """Which entries of a weight are equal: `codes` [n] int32, each entry's distinct value; `standing` [distinct], where
    an entry of each value is.
    """

    codes: Tensor
    standing: Tensor
    mark: int  # a checksum of the codes


class Followed:
    """A 16-bit weight, pairs of equal entries in it, and its index list while a row map holds it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.n, self.mark = weight, weight.numel(), -1
        self.held: weakref.ref[Bytes] | None = None
        self.pairs: tuple[int, Tensor, Tensor] | None = None  # a version, and positions of equal entries in it

    def listed(self, ranks: Ranks) -> Bytes | None:
        """The index list, if it is held and is that of these ranks."""
        return self.held() if self.held is not None and self.mark == ranks.mark else None

    def hold(self, ranks: Ranks, held: Bytes) -> Bytes:
        """Remember an index list, but do not keep it alive."""
        self.held, self.mark = weakref.ref(held), ranks.mark
        return held

    def ranks(self) -> Ranks:
        """Cost: two passes over the weight."""
        bits = torch.empty(self.n, dtype=torch.int32, device=self.weight.device)
        flat = self.weight.reshape(-1).view(torch.int16)
        at = torch.full((_CODES,), -1, dtype=torch.int64, device=bits.device)
        for begin in range(0, self.n, CHUNK):
            part = flat[begin : begin + CHUNK].to(torch.int32) & (_CODES - 1)
            bits[begin : begin + CHUNK] = part
            at[part.long()] = torch.arange(begin, begin + len(part), device=bits.device)
        present = at >= 0
        codes = (present.cumsum(0).to(torch.int32) - 1).index_select(0, bits)
        return Ranks(codes, at[present], checksum(codes.view(torch.uint8)))


class RowMap(NamedTuple):
    """A tensor's memory as rows [a, n, b] of integers, equal where the weight is, and one row per distinct value, table
    [a, distinct, b].
    """

    weight: Followed
    ranks: Ranks
    rows: Tensor
    table: Tensor


@dataclass(eq=False)
class Rows:
    """The weights whose row maps are looked for, in a ring that begins at the one found last. The ranks of one of them
    are kept at a time.
    """

    weights: list[Followed]
    ranked: tuple[Followed, int, Ranks] | None = None  # a weight, its version, and its ranks

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "Rows":
        return cls([Followed(w.detach()) for w in weights if w.numel()])

    def close(self) -> None:
        """Forget everything."""
        self.weights, self.ranked = [], None

    def candidates(self, t: Tensor, view: Layout) -> list[Followed]:
        """The weights of which a tensor of any shape could be a row map, by its size alone, so that all learners find
        the same."""
        if t.element_size() not in _INTEGERS or view.entries != t.numel():
            return []
        return [w for w in self.weights if t.numel() % w.n == 0 and w.weight.device == t.device]

    def find(self, t: Tensor, candidates: list[Followed]) -> RowMap | None:
        """The tensor t [rows, ...] as a row map of one of the candidates. Cost: a few thousand rows per candidate, and
        two passes over a tensor that is one.
        """
        found = next((hit for w in candidates if (hit := self._row_map(w, t)) is not None), None)
        if found is not None:  # what is saved next is likely of this weight or of the one after it
            at = self.weights.index(found.weight)
            self.weights = self.weights[at:] + self.weights[:at]
        return found

    def _row_map(self, weight: Followed, t: Tensor) -> RowMap | None:
        one, other = self._pairs(weight)
        if not len(one):  # hardly a value occurs twice: a table would be no smaller
            return None
        dims = sorted((d for d in range(t.dim()) if t.size(d) > 1), key=t.stride, reverse=True)
        for after, before in sorted({(b, a) for a, b in _splits([t.size(d) for d in dims], weight.n)}):
            rows = t.as_strided((before, weight.n, after), (weight.n * after, after, 1)).view(
                _INTEGERS[t.element_size()]
            )
            if not torch.equal(rows[:, one], rows[:, other]):
                continue
            codes, standing, _ = ranks = self._ranks(weight)
            table = rows[:, standing]
            step = max(1, CHUNK // (before * after))
            chunks = range(0, weight.n, step)
            if all(torch.equal(rows[:, i : i + step], table.index_select(1, codes[i : i + step])) for i in chunks):
                return RowMap(weight, ranks, rows, table)
        return None

    def _pairs(self, weight: Followed) -> tuple[Tensor, Tensor]:
        """Positions of equal entries; kept for every weight, so that one that a tensor is no row map of need not be
        ranked again.
        """
        version = weight.weight._version
        if weight.pairs is None or weight.pairs[0] != version:
            codes, standing, _ = self._ranks(weight)
            one = torch.arange(0, weight.n, max(1, weight.n // _PAIRS), device=codes.device)
            other = standing[codes[one].long()]
            weight.pairs = (version, one[one != other], other[one != other])
        return weight.pairs[1:]

    def _ranks(self, weight: Followed) -> Ranks:
        ranked, version = self.ranked, weight.weight._version
        if ranked is None or ranked[0] is not weight or ranked[1] != version:
            self.ranked = None  # before the next ones are made: only one at a time takes memory
            ranked = self.ranked = (weight, version, weight.ranks())
        return ranked[2]


def _splits(sizes: list[int], n: int) -> Iterator[tuple[int, int]]:
    """(a, b) such that adjacent sizes multiply to n, with the product of the sizes before them a and of those after
    them b.
    """
    for i in range(len(sizes)):
        for j in range(i + 1, len(sizes) + 1):
            if prod(sizes[i:j]) == n:
                yield prod(sizes[:i]), prod(sizes[j:])
