"""ONE column solver: error feedback onto any set whose columns can be chosen one unit after the other.

With Uniform sets it is GPTQ, with sparse ones SparseGPT, with vector codebooks GPTVQ.

Notation: W [rows, n], H = X^T X / n = L L^T with L lower triangular (Cholesky). Then tr((W - Q) H (W - Q)^T) =
||(W - Q) L||^2, and

    column k of (W - Q) L  =  E_k L_kk + sum_{i > k} E_i L_ik,        E = W - Q,

so choosing columns from the last to the first, the best admissible Q_k is the one nearest to v_k = W_k +
(sum_{i > k} E_i L_ik) / L_kk, at a loss of L_kk^2 |v_k - Q_k|^2. With the columns laid out in reverse this is GPTQ
exactly (its U = chol(H^-1) holds the inverses of the same numbers) without an inverse: one Cholesky factorisation
instead of two and an inversion. The errors of finished blocks are brought in by one matrix product per block. For a
unit of c columns (vector codebooks) L_kk becomes a c x c block and the distance is |(v - q) L_uu|.

Sources: Frantar et al. 2022 (GPTQ) eq. 2-4 and algorithm 1; Chee et al. 2023 (QuIP) section 3, for the form without an
inverse; Frantar & Alistarh 2023 (SparseGPT); van Baalen et al. 2024 (GPTVQ) section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from laconic.host.units import ranges
from laconic.model.sites import Site

Fit = Callable[[Tensor, int, Tensor], None]
"""Fits the side information of columns j : j + k to live values [rows, k], weighted by the importance [1 or rows, k] of
their errors.
"""


class ColumnSet(Protocol):
    """What the solver asks of a set; every `weights.ColumnWeight` is one."""

    columns: int
    span: int | None

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        """The admissible values nearest to w [rows, columns], for columns j : j + columns; see
        `ColumnWeight.nearest`."""

    def right_inverse(self, W: Tensor) -> tuple[()]:
        """Take the solved matrix [rows, n], whose columns are all admissible."""


@dataclass(frozen=True)
class Sweep:
    """Options of one sweep. `act_order`: columns with the largest diag(H) first, side information fitted before the
    sweep (static groups); `damping`: the share of mean(diag H) added to the diagonal, raised as far as the
    factorisation needs; `block`: columns per lazy update, which does not change the result.
    """

    act_order: bool = True
    damping: float = 0.01
    block: int = 128


def factor(H: Tensor, order: Tensor, damping: float, name: str, notes: list[str]) -> Tensor:
    """Lower triangular L [groups, n, n] of H[order, order] + damping * mean(diag H) * I, for every group.

    Columns that no input ever used (H_jj = 0) get the mean weight and no correlation, so they are rounded as they are.
    (The public GPTQ code sets them to zero, which is wrong for any other input.) If the factorisation fails, damping is
    raised tenfold until it reaches the mean of the diagonal, first in float32, then in float64; if that fails too, or
    no input was seen, L is diagonal, which is plain rounding, and `notes` says so.
    """
    said: dict[str, list[int]] = {}
    if len(H) == 1:  # without another copy of what can be the largest tensor there is
        L = _factor_one(H[0], order, damping, said, 0).unsqueeze(0)
    else:
        L = torch.empty_like(H)
        for g in range(len(H)):
            L[g] = _factor_one(H[g], order, damping, said, g)
    for text, groups in said.items():
        notes.append(f"{name}: {text}" if len(H) == 1 else f"{name}: row groups {ranges(groups)} of {len(H)}: {text}")
    return L


def _factor_one(H: Tensor, order: Tensor, damping: float, said: dict[str, list[int]], group: int) -> Tensor:
    """The factor of one group; what there is to say is noted under its text, so that many groups make one line."""
    diagonal = H.diagonal()[order]
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        text = f"{'no input was seen' if mean == 0 else 'input statistics are not finite'}; rounded to nearest"
        said.setdefault(text, []).append(group)
        return torch.eye(len(H), dtype=H.dtype, device=H.device)
    steps = [damping, *(damping * 10**k for k in range(1, 40) if damping * 10 ** (k - 1) < 1)]
    for dtype in (torch.float32, torch.float64):
        for step in steps:
            # symmetric, so the same matrix; stored by columns, LAPACK works in place
            work = H[order[:, None], order].to(dtype).mT
            added = work.diagonal()
            added += torch.where(added == 0, mean, step * mean)
            info = torch.empty((), dtype=torch.int32, device=H.device)
            torch.linalg.cholesky_ex(work, out=(work, info))
            if int(info) == 0 and bool((work.diagonal() > 0).all()) and bool(torch.isfinite(work[-1]).all()):
                if step > damping or dtype == torch.float64:
                    said.setdefault(
                        f"Hessian not positive definite; solved with damping {step:g} in {dtype}", []
                    ).append(group)
                return work.to(H.dtype)
    said.setdefault(
        "Hessian not positive definite at any damping; rounded to nearest, weighted by its diagonal", []
    ).append(group)
    return torch.diag(diagonal.clamp(min=1e-3 * mean).sqrt())


def layout(weight: ColumnSet, H: Tensor, act_order: bool) -> Tensor:
    """The order [n] in which columns are laid out for a sweep that runs from the last to the first, whole units
    together.
    """
    units = torch.arange(H.shape[-1]).view(-1, weight.columns)
    if act_order:
        sensitivity = H.diagonal(dim1=1, dim2=2).mean(0).cpu().view_as(units).mean(1)
        units = units[sensitivity.argsort(dim=0, descending=True, stable=True)]
    return units.flip(0).reshape(-1).to(H.device)


def solve(weight: ColumnSet, site: Site, sweep: Sweep, fit: Fit | None = None, L: Tensor | None = None) -> None:
    """Move `weight` to the point of its set that error feedback finds for `site`, by its Hessian or its factor L
    [groups, n, n].

    `fit` is called when the sweep enters a span of columns that share side information (or, with act_order, for all
    spans beforehand). Entries outside `site.mask` become zero, and their error is fed forward like any other. `L` is
    the factor of this layout if it is at hand already. Cost: n^3 / 3 + rows * n^2 operations.
    """
    W = site.W.float()
    n = W.shape[1]
    H = site.hessian if site.hessian is not None else torch.eye(n, device=W.device).unsqueeze(0)
    order = layout(weight, H, sweep.act_order)
    if L is None:
        L = factor(H, order, sweep.damping, site.name, site.notes)
    span = weight.span
    if fit is not None and span is not None and (sweep.act_order or span >= n):
        importance = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2).square())
        fit(W, 0, importance.repeat_interleave(len(W) // len(L), 0) if len(L) > 1 else importance)
        span = None
    span = span if fit is not None else None
    unit = span or weight.columns
    block = max(sweep.block - sweep.block % unit, unit)
    weight.right_inverse(_sweep(weight, W, L=L, order=order, block=block, span=span, fit=fit, mask=site.mask))


def _sweep(
    weight: ColumnSet,
    W: Tensor,
    L: Tensor,
    order: Tensor,
    block: int,
    span: int | None,
    fit: Fit | None,
    mask: Tensor | None,
) -> Tensor:
    """The solved matrix. Here columns are the contiguous rows of transposed matrices [groups, n, rows per group], in
    sweep layout.
    """
    groups, rows, n, unit = len(L), *W.shape, weight.columns
    columns = order.tolist()
    # the original columns, replaced by the chosen ones
    Q = W[:, order].reshape(groups, -1, n).transpose(1, 2).contiguous()
    E = torch.zeros_like(Q)
    for stop in range(n, 0, -block):
        start = max(stop - block, 0)
        # what the errors of finished columns leave in these
        left = L[:, stop:, start:stop].transpose(1, 2) @ E[:, stop:]
        for k in range(stop - unit, start - 1, -unit):
            done = slice(k + unit, stop)
            if span is not None and fit is not None and (n - k - unit) % span == 0:
                _fit_span(
                    Q,
                    E,
                    L=L,
                    left=left,
                    block=slice(start, stop),
                    here=slice(max(k + unit - span, 0), k + unit),
                    j=columns[k],
                    fit=fit,
                )
            here = slice(k, k + unit)
            v = left[:, k - start : k - start + unit]
            if k + unit < stop:
                v = v + L[:, done, here].transpose(1, 2) @ E[:, done]
            if unit == 1:
                w, metric = Q[:, here] + v / L[:, here, here], None
            else:
                shift = torch.linalg.solve_triangular(L[:, here, here], v.transpose(1, 2), upper=False, left=False)
                w, metric = Q[:, here] + shift.transpose(1, 2), L[:, here, here].mean(0)
            q = weight.nearest(w.transpose(1, 2).reshape(rows, unit), columns[k], metric)
            if mask is not None:
                q = torch.where(mask[:, columns[k] : columns[k] + unit], q, torch.zeros_like(q))
            chosen = q.reshape(groups, -1, unit).transpose(1, 2)
            E[:, here] = Q[:, here] - chosen
            Q[:, here] = chosen
    del E, left  # together with L and H this is the most that a sweep holds
    return Q[:, order.argsort()].transpose(1, 2).reshape(rows, n)


def _fit_span(Q: Tensor, E: Tensor, L: Tensor, left: Tensor, block: slice, here: slice, j: int, fit: Fit) -> None:
    """Fit the span in layout positions `here` (its first column is j; the matrix's last span may be shorter) to its
    live values.

    With V = sum over finished columns E_i L_i,span, the errors still to come must cancel V: the best completion is
    W_span + V L_span^-1.
    """
    done = slice(here.stop, block.stop)
    V = left[:, here.start - block.start : here.stop - block.start]
    if here.stop < block.stop:
        V = V + L[:, done, here].transpose(1, 2) @ E[:, done]
    shift = torch.linalg.solve_triangular(L[:, here, here], V.transpose(1, 2), upper=False, left=False)
    live = (Q[:, here].transpose(1, 2) + shift).flip(2)  # the layout runs backwards, sets count forwards
    importance = L[:, here, here].diagonal(dim1=1, dim2=2).square().flip(1)
    fit(live.flatten(0, 1), j, importance.repeat_interleave(live.shape[1], 0) if len(L) > 1 else importance)
