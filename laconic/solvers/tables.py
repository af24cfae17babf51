"""Tables of shared values: the exact optimum for scalars, k-means++ and Lloyd's iterations for vectors.

Sources: Wang & Song 2011 (Ckmeans.1d.dp); Arthur & Vassilvitskii 2007 (k-means++); Lloyd 1982.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from laconic.model.sites import Site
from laconic.weights import Codebook

_POINTS = 256  # vectors per table entry that a table is fitted to; more do not move it


def fit_tables(site: Site, weight: Codebook, f: Tensor | None, iterations: int) -> Tensor:
    """Tables [tables, 2**bits, dimension] for the weight's row groups; entries outside the site's mask count
    nothing.
    """
    W = site.W.float()
    if site.mask is not None:
        f = (f if f is not None else torch.ones(1, 1, device=W.device)).expand_as(W) * site.mask
    generator = site.generator()
    tables = []
    for start in range(0, len(W), weight.rows_per_table):
        rows = slice(start, start + weight.rows_per_table)
        part, weights = W[rows], None
        if f is not None:
            weights = (f[rows] if len(f) == len(W) else f).expand_as(part)
        if weight.columns == 1:
            tables.append(torch.from_numpy(exact_table(*_histogram(part, weights), 2**weight.bit_width)).unsqueeze(1))
        else:
            vectors = part.reshape(-1, weight.columns)
            per_vector = None if weights is None else weights.reshape(-1, weight.columns)
            tables.append(vector_table(vectors, per_vector, 2**weight.bit_width, iterations, generator))
    return torch.stack(tables).float()


def _histogram(w: Tensor, f: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of w as 16-bit floats, sorted, and the sum of weights at each; values no weight falls on are
    left out.
    """
    scale = float(w.abs().max()) or 1.0
    # relative to the largest, so that float16 resolves all of them
    half = (w / scale).half() if w.dtype != torch.bfloat16 else w
    values, index = half.reshape(-1).unique(return_inverse=True)
    counts = torch.zeros(len(values), dtype=torch.float64, device=w.device)
    counts.index_add_(0, index, torch.ones_like(index, dtype=torch.float64) if f is None else f.reshape(-1).double())
    used = counts > 0
    if not bool(used.any()):
        used, counts = torch.ones_like(used), torch.ones_like(counts)
    return values[used].double().cpu().numpy() * (scale if half is not w else 1.0), counts[used].cpu().numpy()


RangeCost = Callable[[np.ndarray, np.ndarray], np.ndarray]


def exact_table(values: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """The k values that minimise the weighted squared distance to sorted `values`, ascending; with fewer values, they
    repeat.

    Dynamic programming: D_k[j] = min_i D_{k-1}[i] + cost(i, j), the cost of one cluster for values i..j from prefix
    sums. The best i never decreases with j, so each layer is solved level by level, halving the ranges: O(n log n) a
    layer.
    """
    n = len(values)
    if n <= k:
        return np.concatenate([values, np.full(k - n, values[-1])])
    centre = np.average(values, weights=weights)
    x = values - centre  # prefix sums of squares keep their digits around the mean
    S0, S1, S2 = (np.concatenate([[0.0], np.cumsum(weights * x**p)]) for p in (0, 1, 2))

    def cost(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        n0, n1 = S0[j + 1] - S0[i], S1[j + 1] - S1[i]
        return np.maximum(S2[j + 1] - S2[i] - n1 * n1 / n0, 0.0)

    last = np.arange(n)
    D = cost(np.zeros(n, np.int64), last)
    starts = [np.zeros(n, np.int64)]
    for clusters in range(1, k):
        D, first = _layer(D, cost, clusters, n)
        starts.append(first)
    table, j = np.empty(k), n - 1
    for clusters in range(k - 1, -1, -1):
        i = int(starts[clusters][j])
        table[clusters] = (S1[j + 1] - S1[i]) / (S0[j + 1] - S0[i]) + centre
        j = i - 1
    return table


def _layer(D: np.ndarray, cost: RangeCost, clusters: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer of the dynamic programme: the cost of values 0..j in clusters + 1 clusters, and where the last cluster
    starts.
    """
    new, first = np.full(n, np.inf), np.zeros(n, np.int64)
    # ranges of j whose best i lies in a range: [j low, j high, i low, i high]
    todo = np.array([[clusters, n - 1, clusters, n - 1]])
    while len(todo):
        j = (todo[:, 0] + todo[:, 1]) // 2
        low, high = todo[:, 2], np.minimum(todo[:, 3], j)
        lengths = high - low + 1
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        i = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - low, lengths)
        total = D[i - 1] + cost(i, np.repeat(j, lengths))
        least = np.minimum.reduceat(total, offsets[:-1])
        hit = np.flatnonzero(total == np.repeat(least, lengths))
        owner = np.searchsorted(offsets, hit, side="right") - 1
        best = i[hit[np.unique(owner, return_index=True)[1]]]
        new[j], first[j] = least, best
        left = np.stack([todo[:, 0], j - 1, todo[:, 2], best], 1)
        right = np.stack([j + 1, todo[:, 1], best, todo[:, 3]], 1)
        todo = np.concatenate([left[left[:, 0] <= left[:, 1]], right[right[:, 0] <= right[:, 1]]])
    return new, first


def vector_table(vectors: Tensor, f: Tensor | None, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """k vectors by k-means++ and Lloyd's iterations on weighted vectors [n, d] (weights [n, d]); empty clusters restart
    at the worst vectors.
    """
    points = max(_POINTS * k, 1 << 14)
    if len(vectors) > points:
        chosen = torch.randperm(len(vectors), generator=generator)[:points].to(vectors.device)
        vectors, f = vectors[chosen], None if f is None else f[chosen]
    f = torch.ones_like(vectors) if f is None else f.to(vectors)
    table = _plus_plus(vectors, f, k, generator)
    for _ in range(iterations):
        index, distance = _assign(vectors, f, table)
        mass = torch.zeros_like(table).index_add_(0, index, f)
        sums = torch.zeros_like(table).index_add_(0, index, f * vectors)
        empty = torch.bincount(index, minlength=k) == 0
        table = torch.where(mass > 0, sums / mass.clamp(min=1e-30), table)
        if bool(empty.any()):
            worst = distance.topk(int(empty.sum())).indices
            table[empty] = vectors[worst]
    return table


def _plus_plus(vectors: Tensor, f: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Starting centres, each drawn in proportion to its weighted squared distance from those before, a batch at a time
    for large k.
    """
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    table = vectors[first : first + 1]
    distance = (f * (vectors - table).square()).sum(1)
    while len(table) < k:
        batch = min(max(1, len(table) // 4), k - len(table))
        p = distance.double().clamp(min=0) + 1e-30
        drawn = torch.multinomial(
            (p / p.sum()).cpu(), min(batch, len(vectors)), replacement=len(vectors) < batch, generator=generator
        )
        new = vectors[drawn.to(vectors.device)]
        distance = torch.minimum(distance, _assign(vectors, f, new)[1])
        table = torch.cat([table, new])
    return table


def _assign(vectors: Tensor, f: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry and its weighted squared distance, for vectors [n, d] with weights [n, d]."""
    index, distance = [], []
    for v, w in zip(vectors.split(1 << 14), f.split(1 << 14), strict=True):
        d = (w * v.square()).sum(1, keepdim=True) - 2 * (w * v) @ table.t() + w @ table.square().t()
        least = d.min(1)
        index.append(least.indices)
        distance.append(least.values.clamp(min=0))
    return torch.cat(index), torch.cat(distance)
