"""Scalars of 16 bits: all work is done once per distinct value, of which there are at most 65,536.

The centroids depend on the weights through the counts n_u of the distinct values u only, and the decoded weight is
f(u). So forward is one count and one look-up, and dL/dw_i = f'(u_i) g_i + h(u_i) (see `recursion`) is one sum of g by
value and one look-up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.clustering.recursion import (
    Iteration,
    Points,
    Reduce,
    decode_backward,
    decode_points,
    decode_slope,
    follow,
    follow_backward,
)
from laconic.errors import SchemeError

HALVES = (torch.bfloat16, torch.float16)
_CODES = 1 << 16
_AT_ONCE = 1 << 20  # entries whose codes are widened to index type at a time


def forward(
    values: Tensor, start: Tensor, rule: Iteration, reduce: Reduce, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decoded values [tables, n, 1] in `dtype`, and the last centroids, from `values` [tables, n, 1] and `start`
    [tables, K, 1].
    """
    decoded, last = torch.empty(values.shape, dtype=dtype, device=values.device), torch.empty_like(start)
    for t, entries in enumerate(values.flatten(1)):
        column = _Column.of(entries, start.dtype, reduce)
        last[t] = c = follow(column.points, start[t : t + 1], rule).last[0]
        column.look_up(decode_points(column.points.values, c.unsqueeze(0), rule.tau), decoded[t, :, 0])
    return decoded, last


def backward(
    values: Tensor, start: Tensor, grad: Tensor, grad_last: Tensor, rule: Iteration, reduce: Reduce, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of values [tables, n, d], in `dtype`, and of starting centroids [tables, K, d], given those of decoded
    values and last centroids, of the same shapes.
    """
    into, first = torch.empty(values.shape, dtype=dtype, device=values.device), torch.empty_like(start)
    for t, entries in enumerate(values.flatten(1)):
        column, g = _Column.of(entries, start.dtype, reduce), grad[t, :, 0]
        points = column.points
        path = follow(points, start[t : t + 1], rule)
        # the sums G_u are over processes already, and every process holds the same table from here on
        at_last = decode_backward(points, path.last, column.gather(g, reduce), rule) + rule.hold(grad_last[t : t + 1])
        h = torch.zeros_like(points.values)
        first[t] = follow_backward(points, path, at_last, rule, h)[0]
        column.spread(decode_slope(points.values, path.last, rule.tau), h, g, into[t, :, 0])
    return into, first


@dataclass(frozen=True)
class _Column:
    """The entries of one table with their distinct values: `used` names those of the `size` codes that occur
    (None: all).
    """

    codes: Callable[[slice], Tensor]
    entries: int
    size: int
    used: Tensor
    points: Points

    @classmethod
    def of(cls, entries: Tensor, dtype: torch.dtype, reduce: Reduce) -> "_Column":
        if entries.dtype not in HALVES:  # float64 weights of few values, as in checks of the gradient
            values, index, counts = entries.unique(return_inverse=True, return_counts=True)
            used = torch.arange(len(values), device=entries.device)
            return cls(lambda part: index[part], len(entries), len(values), used, _points(values, counts, dtype))
        entries = entries.contiguous()

        def codes(part: slice) -> Tensor:
            return entries[part].view(torch.int16).int() & (_CODES - 1)

        counts = torch.zeros(_CODES, dtype=torch.int64, device=entries.device)
        for part in _parts(len(entries)):
            counts += torch.bincount(codes(part), minlength=_CODES)
        counts = reduce(counts)
        used = counts.nonzero().squeeze(1)
        values = torch.where(used < _CODES // 2, used, used - _CODES).to(torch.int16).view(entries.dtype)
        return cls(codes, len(entries), _CODES, used, _points(values, counts[used], dtype))

    def look_up(self, found: Tensor, out: Tensor) -> None:
        """out_i = found(u_i), for numbers [1, distinct, 1]."""
        table = torch.empty(self.size, dtype=out.dtype, device=out.device)
        table[self.used] = found.flatten().to(out.dtype)
        for part in _parts(self.entries):
            out[part] = table[self.codes(part)]

    def gather(self, g: Tensor, reduce: Reduce) -> Tensor:
        """G_u, the sum of g over the occurrences of every distinct value, [1, distinct, 1]."""
        sums = torch.zeros(self.size, dtype=self.points.dtype, device=g.device)
        for part in _parts(self.entries):
            sums.index_add_(0, self.codes(part), g[part].to(sums.dtype))
        return reduce(sums[self.used]).reshape(1, -1, 1)

    def spread(self, slope: Tensor, h: Tensor, g: Tensor, out: Tensor) -> None:
        """out_i = slope(u_i) g_i + h(u_i), rounded once."""
        dtype = torch.float32 if out.dtype in HALVES else self.points.dtype
        tables = torch.zeros(2, self.size, dtype=dtype, device=out.device)
        tables[0, self.used], tables[1, self.used] = slope.flatten().to(dtype), h.flatten().to(dtype)
        for part in _parts(self.entries):
            index = self.codes(part)
            out[part] = torch.addcmul(tables[1][index], tables[0][index], g[part].to(dtype))


def _points(values: Tensor, counts: Tensor, dtype: torch.dtype) -> Points:
    if not bool(values.isfinite().all()):
        raise SchemeError("dkm_decode: the weight holds NaN or infinity, which belongs to no cluster")
    return Points(values.to(dtype).reshape(1, -1, 1), counts.to(dtype).reshape(1, -1), dtype, lambda sums: sums)


def _parts(entries: int) -> Iterator[slice]:
    for start in range(0, entries, _AT_ONCE):
        yield slice(start, start + _AT_ONCE)
