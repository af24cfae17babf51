"""GPTVQ: vector codebooks with error feedback."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import Site, Stats
from laconic.solvers.column import Sweep, solve
from laconic.solvers.tables import fit_tables
from laconic.weights import Codebook, Weight
from laconic.weights.codebook import codebook_bits


@dataclass(frozen=True, repr=False)
class GPTVQ(Method):
    """Assigns `dimension` neighbouring columns at a time to a table of 2**bits vectors, feeding the error forward; then
    refits the table.

    Tables (one per matrix, or per `rows` rows) start from k-means weighted by diag(H). The sweep of `solvers.column`
    assigns each unit by |(v - c) L_uu|. With the codes fixed, the tables that minimise tr((W - W_hat) H (W - W_hat)^T)
    solve a linear system: `refit` steps of conjugate gradients. dimension=1 is GPTQ onto a table of scalars. Bits:
    bits / dimension per weight + 16 x dimension x 2**bits per table.
    Raises: SchemeError when dimension does not divide the columns. Source: van Baalen et al. 2024, sections 3.2-3.3
    (their tables also vary along the columns and are updated by gradient descent; ours have a closed quadratic). Cost:
    k-means + GPTQ + refit x rows x n^2.
    """

    bits: int = 8
    dimension: int = 2
    rows: int | None = None
    refit: int = 20
    damping: float = 0.01
    act_order: bool = True
    codec: Literal["dense", "ans"] = "dense"

    needs = Stats.HESSIAN

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return codebook_bits(shape, self.bits, self.dimension, self.rows)

    def __call__(self, site: Site) -> Weight:
        if site.mask is not None and self.dimension > 1:
            raise SchemeError(
                f"{site.name}: vectors of {self.dimension} columns cannot encode single surviving entries; use "
                "dimension=1"
            )
        weight = Codebook(
            (site.W.shape[0], site.W.shape[1]),
            bits=self.bits,
            dimension=self.dimension,
            rows_per_table=self.rows,
            codec=self.codec,
        )
        weight.set_tables(fit_tables(site, weight, site.importance, 25))
        weight.to(site.W.device)
        solve(weight, site, Sweep(self.act_order, self.damping))
        if self.refit and site.hessian is not None:
            refit_tables(weight, site, self.refit)
        return weight


def refit_tables(weight: Codebook, site: Site, steps: int) -> None:
    """Move the tables towards the least output error for the present codes, by `steps` conjugate gradients; never worse
    than before.

    With Q = S(t) linear in the table entries t, the gradient of tr((W - Q) H (W - Q)^T) / 2 is -S^T((W - Q) H).
    """
    W, H = site.W.float(), site.hessian
    assert H is not None
    tables = weight.tables().detach().float()
    owner = torch.arange(len(W), device=W.device) // weight.rows_per_table
    index = (weight.codes.long() + owner.unsqueeze(1) * tables.shape[1]).reshape(-1)
    mask = site.mask if site.mask is not None else torch.ones((), dtype=torch.bool, device=W.device)

    def spread(t: Tensor) -> Tensor:
        return t.flatten(0, 1)[index].reshape(W.shape) * mask

    def gather(M: Tensor) -> Tensor:
        flat = torch.zeros(tables.shape[0] * tables.shape[1], tables.shape[2], device=W.device)
        return flat.index_add_(0, index, (M * mask).reshape(-1, weight.columns)).view_as(tables)

    def times_hessian(M: Tensor) -> Tensor:
        return (M.unflatten(0, (len(H), -1)) @ H).flatten(0, 1)

    def loss(t: Tensor) -> float:
        E = W - spread(t)
        return float((times_hessian(E) * E).sum(dtype=torch.float64))

    before = loss(tables)
    t = tables.clone()
    residual = gather(times_hessian(W - spread(t)))
    direction, energy = residual.clone(), residual.square().sum()
    for _ in range(steps):
        image = gather(times_hessian(spread(direction)))
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        t = t + (energy / curvature) * direction
        residual = residual - (energy / curvature) * image
        next_energy = residual.square().sum()
        direction, energy = residual + (next_energy / energy) * direction, next_energy
    weight.set_tables(t)
    # rounding the tables to 16 bits can cost more than a few steps win
    if loss(weight.tables().detach().float()) > before:
        weight.set_tables(tables)
