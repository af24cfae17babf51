"""Differentiable k-means as the formula has it, by plain autograd: the reference that everything else is compared
with.
"""

import torch
from torch import Tensor

from laconic.clustering.recursion import LEAST_MASS


def dkm_naive(
    weight: Tensor,
    centroids: Tensor,
    *,
    tau: float,
    iterations: int,
    tolerance: float = 0.0,
    zero: bool = False,
    rows_per_table: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `dkm_decode` computes, with every attention matrix kept for the backward pass.

    A = softmax(-|w - c|^2 / tau), c <- A^T w / sum A, at most `iterations` times and until no centroid moves by more
    than `tolerance` (0: all of them); decoded = A c. `weight` [out, ...], `centroids` [tables, K, d]; a table serves
    `rows_per_table` rows. 16-bit weights are computed in float32. Returns the decoded weight, in the weight's dtype and
    shape, and the last centroids.
    Source: Cho et al. 2022 (DKM) section 3. Cost: entries x K numbers saved per iteration, several times over.
    """
    exact = weight.double() if weight.dtype == torch.float64 else weight.float()
    groups = exact.reshape(len(centroids), -1, centroids.shape[-1])
    assert rows_per_table is None or rows_per_table * len(centroids) == len(weight)
    done = [
        _one_table(w, c, tau=tau, iterations=iterations, tolerance=tolerance, zero=zero)
        for w, c in zip(groups, centroids.to(exact.dtype), strict=True)
    ]
    decoded = torch.stack([part for part, _ in done]).reshape(weight.shape)
    return decoded.to(weight.dtype), torch.stack([c for _, c in done]).to(centroids.dtype)


def _one_table(
    w: Tensor, c: Tensor, tau: float, iterations: int, tolerance: float, zero: bool
) -> tuple[Tensor, Tensor]:
    """The decoded vectors [n, d] and the last centroids [K, d]."""
    c = _held(c, zero)
    for _ in range(iterations):
        A = _attention(w, c, tau)
        mass = A.sum(0).unsqueeze(1)
        served = mass > LEAST_MASS
        # a centroid that nothing is near stays
        new = _held(torch.where(served, A.t() @ w / torch.where(served, mass, 1.0), c), zero)
        moved = (new - c).abs().max()
        c = new
        if tolerance > 0 and moved <= tolerance:
            break
    return _attention(w, c, tau) @ c, c


def _attention(w: Tensor, c: Tensor, tau: float) -> Tensor:
    """A [n, K] for vectors [n, d] and centroids [K, d]."""
    return torch.softmax(-(w.unsqueeze(1) - c).square().sum(2) / tau, 1)


def _held(c: Tensor, zero: bool) -> Tensor:
    """The centroids with the first of them at zero, if one is kept there."""
    return torch.cat([torch.zeros_like(c[:1]), c[1:]]) if zero else c
