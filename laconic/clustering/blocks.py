"""Every entry for itself, computed again block by block: for float32 weights, for vectors, and for tables of few
entries.
"""

import torch
from torch import Tensor

from laconic.clustering.recursion import (
    Iteration,
    Points,
    Reduce,
    decode_backward,
    decode_points,
    follow,
    follow_backward,
)

_TOGETHER = 1 << 18  # attentions of as many small tables as are treated in one go


def forward(
    values: Tensor, start: Tensor, rule: Iteration, reduce: Reduce, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decoded values [tables, n, d] in `dtype`, and the last centroids, from `values` [tables, n, d] and `start`
    [tables, K, d].
    """
    decoded, last = torch.empty(values.shape, dtype=dtype, device=values.device), torch.empty_like(start)
    for tables in _tables(values, start):
        points = Points(values[tables], None, start.dtype, reduce)
        c = follow(points, start[tables], rule).last
        last[tables] = c
        for part, v, _ in points.blocks(c.shape[1]):
            decoded[tables, part] = decode_points(v, c, rule.tau).to(dtype)
    return decoded, last


def backward(
    values: Tensor, start: Tensor, grad: Tensor, grad_last: Tensor, rule: Iteration, reduce: Reduce, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of values [tables, n, d], in `dtype`, and of starting centroids [tables, K, d], given those of decoded
    values and last centroids, of the same shapes.
    """
    into, first = torch.zeros(values.shape, dtype=start.dtype, device=values.device), torch.empty_like(start)
    for tables in _tables(values, start):
        points = Points(values[tables], None, start.dtype, reduce)
        path = follow(points, start[tables], rule)
        at_last = decode_backward(points, path.last, grad[tables], rule, into[tables]) + rule.hold(grad_last[tables])
        first[tables] = follow_backward(points, path, at_last, rule, into[tables])
    return into.to(dtype), first


def _tables(values: Tensor, start: Tensor) -> list[slice]:
    """Tables that are treated together."""
    step = max(1, _TOGETHER // max(1, values.shape[1] * start.shape[1]))
    return [slice(t, t + step) for t in range(0, len(start), step)]
