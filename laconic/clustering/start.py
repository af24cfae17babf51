"""Around the training: where centroids start, how soft the attention is, and the stored weight at the end."""

import math

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.model.sites import Site
from laconic.solvers.tables import fit_tables
from laconic.weights import Codebook


def init_centroids(
    weight: Tensor,
    bits: int,
    *,
    dimension: int = 1,
    rows_per_table: int | None = None,
    zero: bool = False,
    iterations: int = 25,
    seed: int = 0,
) -> Tensor:
    """Starting centroids [tables, 2**bits, dimension], float32: the k-means optimum for scalars, k-means++ and Lloyd
    for vectors.

    With `zero` the centroid nearest to zero becomes zero and stands first. The same weight and seed give the same
    centroids.
    Raises: SchemeError for shapes and bits that do not fit (1 to 8 bits), and for weights that are not finite.
    Source: Wang & Song 2011 (scalars). Cost: 2**bits x distinct x log(distinct) per table.
    """
    if not 1 <= bits <= 8:
        raise SchemeError(f"init_centroids: bits must be 1 to 8, got {bits}")
    W = _matrix(weight)
    if not bool(W.isfinite().all()):
        raise SchemeError("init_centroids: the weight holds NaN or infinity")
    book = Codebook((W.shape[0], W.shape[1]), bits=bits, dimension=dimension, rows_per_table=rows_per_table)
    tables = fit_tables(Site("weight", W, seed=seed), book, None, iterations).to(weight.device)
    return with_zero(tables) if zero else tables


def with_zero(tables: Tensor) -> Tensor:
    """Tables [tables, K, d] in which the centroid nearest to zero is zero and stands first."""
    tables = tables.clone()
    nearest = tables.square().sum(2).argmin(1)
    for found, entries in zip(nearest.tolist(), tables, strict=True):
        entries[found] = entries[0]
        entries[0] = 0
    return tables


def temperature(weight: Tensor, relative: float, *, dimension: int = 1, scale: Tensor | None = None) -> float:
    """tau = relative x variance of what is clustered, vectors of W [out, in] / `scale` [out], x dimension, the mean
    squared distance of a vector from the mean one.

    A constant tensor has no variance, and any temperature decodes it alike: `relative` itself is returned. Raises:
    SchemeError unless `relative` is positive and the variance finite.
    """
    if not (math.isfinite(relative) and relative > 0):
        raise SchemeError(f"temperature: relative must be a positive number, got {relative}")
    W = _matrix(weight).unflatten(1, (-1, dimension)).float()
    if scale is not None:
        W = W / scale.reshape(-1, 1, 1)
    variance = float((W - W.mean((0, 1))).square().mean(dtype=torch.float64)) * dimension
    if not math.isfinite(variance):
        raise SchemeError("temperature: the weight holds NaN or infinity")
    return relative * variance or relative


def annealed(first: float, last: float, progress: float) -> float:
    """The temperature at `progress` 0 to 1 of the training, falling (or rising) by equal factors: first
    (last / first)^progress.
    """
    if not (first > 0 and last > 0 and 0 <= progress <= 1):
        raise SchemeError(
            f"annealed: temperatures must be positive and progress from 0 to 1, got {first}, {last} and {progress}"
        )
    return first * (last / first) ** progress


def harden(
    weight: Tensor,
    centroids: Tensor,
    *,
    rows_per_table: int | None = None,
    scale: Tensor | None = None,
    table_dtype: str = "float16",
) -> Codebook:
    """The trained weight [out, in] (further dimensions are flattened into `in`) with every entry at its nearest
    centroid, as a weight to be stored.

    `centroids`, `rows_per_table` and `scale` as in `dkm_decode`; `scale` is stored in bfloat16. A table of K centroids
    takes ceil(log2 K) bits; spare codes repeat the last.
    Raises: SchemeError when the shapes do not fit, and for numbers that are not finite. Cost: entries x log K, or
    entries x K for vectors.
    """
    W = _matrix(weight)
    if not (bool(W.isfinite().all()) and bool(centroids.isfinite().all())):
        raise SchemeError("harden: the weight or the centroids hold NaN or infinity")
    c = centroids.detach().float()
    c = c.reshape(1, -1, 1) if c.dim() == 1 else c.reshape(-1, *c.shape[-2:])
    bits = max(1, math.ceil(math.log2(c.shape[1])))
    book = Codebook(
        (W.shape[0], W.shape[1]),
        bits=bits,
        dimension=c.shape[2],
        rows_per_table=rows_per_table,
        row_scale=scale is not None,
        table_dtype=table_dtype,
    )
    if W.shape[0] // book.rows_per_table != len(c):
        raise SchemeError(
            f"harden: {len(c)} tables do not serve {W.shape[0]} rows with rows_per_table={rows_per_table}"
        )
    book.set_tables(torch.cat([c, c[:, -1:].expand(-1, 2**bits - c.shape[1], -1)], 1), scale)
    book.to(W.device).right_inverse(W.float())
    return book


def _matrix(weight: Tensor) -> Tensor:
    """A tensor as [out, in], without its graph; one of a single dimension as one row."""
    return weight.detach().reshape(len(weight) if weight.dim() > 1 else 1, -1)
