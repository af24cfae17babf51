"""SpQR: near-lossless quantization by nested scales and a few outliers kept as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import Site, Stats
from laconic.solvers.column import Sweep, factor, layout, solve
from laconic.weights import Dense, Sparse, Sum, Uniform, Weight
from laconic.weights.uniform import Group, uniform_bits


@dataclass(frozen=True, repr=False)
class SpQR(Method):
    """Small groups with quantized scales and zeros, and the weights that hurt most kept in 16 bits, all inside one
    error-feedback sweep.

    tau = outliers x mean_j(var_rows(W_j) L_jj^2). When the sweep reaches a group, entries whose removal lowers the
    group's weighted error by more than tau are left out of the fit of its grid; an entry is kept as an outlier when its
    own error (w - q)^2 L_jj^2 exceeds tau. Scales and zeros (real numbers) are quantized to `second_bits` in groups of
    `second_group` rows.
    Bits: bits + 2 second_bits / group + 64 / (group second_group) + about 32 per outlier. A higher `outliers` keeps
    FEWER of them (the public code's help says the reverse). Raises: SchemeError when the group does not divide the
    columns.
    Source: Dettmers et al. 2023, algorithm 1. Cost: that of GPTQ with groups, x group for the leave-one-out test.
    """

    bits: int = 3
    group: Group = 16
    second_bits: int = 3
    second_group: int = 16
    outliers: float = 0.2
    damping: float = 0.01
    act_order: bool = False

    needs = Stats.HESSIAN

    def expected_bits(self, shape: tuple[int, int]) -> float:
        second = (self.second_bits, self.second_group) if self.second_bits else None
        grid = uniform_bits(shape, self.bits, self.group, zero="float", second=second)
        # about 1 % of outliers near the default
        return grid + (0 if self.outliers == float("inf") else 0.01 * 32 * shape[0] * shape[1])

    def __call__(self, site: Site) -> Weight:
        if self.act_order:
            raise SchemeError(
                "SpQR: act_order needs an index per column in the file, which this format does not have; leave it False"
            )
        shape = (site.W.shape[0], site.W.shape[1])
        second = (self.second_bits, self.second_group) if self.second_bits else None
        grid = Uniform(shape, bits=self.bits, group=self.group, zero="float", second=second).to(site.W.device)
        W = site.W.float()
        H = site.hessian if site.hessian is not None else torch.eye(shape[1], device=W.device).unsqueeze(0)
        order = layout(grid, H, act_order=False)
        L = factor(H, order, self.damping, site.name, site.notes)
        diagonal = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2))
        importance = diagonal.square().repeat_interleave(shape[0] // len(L), 0)
        tau = self.outliers * float((W.var(0) * importance.mean(0)).mean())
        target = _WithOutliers(grid, importance, tau, site.mask)
        solve(target, site, Sweep(act_order=False, damping=self.damping), target.fit, L=L)
        outliers = Sparse(Dense(shape), sparsity=1.0).to(W.device)
        outliers.set_mask(target.kept)
        outliers.right_inverse(target.solved - grid.forward())
        return Sum(grid, outliers)


class _WithOutliers:
    """What the column solver sees: the grid, but an entry that would err too much stays as it is."""

    columns = 1

    def __init__(self, grid: Uniform, importance: Tensor, tau: float, mask: Tensor | None) -> None:
        self.grid, self.importance, self.tau, self.mask = grid, importance, tau, mask
        self.span = grid.span
        self.kept = torch.zeros(grid.shape, dtype=torch.bool, device=importance.device)
        self.solved = torch.zeros(grid.shape, device=importance.device)

    def fit(self, w: Tensor, j: int, importance: Tensor) -> None:
        """Fit the group at column j to its live values, likely outliers replaced by the mean of the others."""
        if self.tau == float("inf"):
            self.grid.fit(w, j)
            return
        weights = importance.expand_as(w)
        whole = _range_error(w, weights, torch.ones_like(w, dtype=torch.bool), self.grid)
        gain = torch.empty_like(w)
        for k in range(w.shape[1]):
            others = torch.ones_like(w, dtype=torch.bool)
            others[:, k] = False
            gain[:, k] = whole - _range_error(w, weights, others, self.grid)
        likely = gain > self.tau
        likely[likely.all(1)] = False
        mean = (w * ~likely).sum(1, keepdim=True) / (~likely).sum(1, keepdim=True)
        self.grid.fit(torch.where(likely, mean, w), j)

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        q = self.grid.nearest(w, j)
        kept = (w - q).square() * self.importance[:, j : j + 1] > self.tau
        if self.mask is not None:
            kept &= self.mask[:, j : j + 1]
        self.kept[:, j : j + 1] = kept
        return torch.where(kept, w, q)

    def right_inverse(self, W: Tensor) -> tuple[()]:
        self.solved = W
        return self.grid.right_inverse(W)


def _range_error(w: Tensor, weights: Tensor, used: Tensor, grid: Uniform) -> Tensor:
    """The weighted squared error [rows] of the entries in use on the range grid of those entries."""
    low = torch.where(used, w, torch.inf).amin(1, keepdim=True)
    high = torch.where(used, w, -torch.inf).amax(1, keepdim=True)
    scale = ((high - low) / (grid.high - grid.low)).clamp(min=1e-12)
    error = w - (((w - low) / scale).round() * scale + low)
    return (error.square() * weights * used).sum(1)
