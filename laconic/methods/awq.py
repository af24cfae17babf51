"""AWQ: columns scaled by the size of their inputs before they are rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import Site, Stats
from laconic.solvers.output_error import energy
from laconic.solvers.scaling import bounded, scaled, stored_scale
from laconic.weights import Uniform, Weight
from laconic.weights.uniform import Group, uniform_bits

# at least as many rows of a site decide alpha, if it has them, evenly spaced: it is one number for all of them
_ROWS = 1024
_STEPS, _RANGES = 20, 10  # ranges searched: 1, 1 - 1/20, ... 1 - 9/20 of the full one, as the authors' code does
_ENTRIES = 1 << 22  # of a matrix, whose ranges are searched at a time: bounds the working memory to about a hundred MB


@dataclass(frozen=True, repr=False)
class AWQ(Method):
    """Rounds W diag(s) to a grid and divides by s when it is decoded: columns with large inputs are rounded more
    finely.

    W_hat = Q(W diag(s)) diag(s)^-1, s = m^alpha / sqrt(max m^alpha min m^alpha), m_j the mean |x_j|. alpha is the one
    of 0, 1 / grid, ... 1 - 1 / grid with the least tr(E H E^T), E = W - W_hat, H = X^T X / n, summed over all sites
    that read the input and so share s. Then (`clip`) the range of every group of every row is shrunk, to 0.55 of it at
    most, to where e H_gg e^T of that group alone is least. Nothing is folded into the layer before: 1 / s is stored
    with each weight. Bits: those of RTN + 16 per column.
    Raises: SchemeError when the group does not divide the columns. Source: Lin et al. 2023, section 3 and eq. 4-5;
    clipping as in the authors' code. Cost: 2 grid min(rows, 2047) in^2 operations, and 20 rows in group for the ranges.
    """

    bits: int = 4
    group: Group = 64
    symmetric: bool = False
    clip: bool = True
    grid: int = 20
    codec: Literal["dense", "ans"] = "dense"

    needs = Stats.HESSIAN | Stats.MEAN

    def __post_init__(self) -> None:
        if not (isinstance(self.grid, int) and self.grid > 0):
            raise SchemeError(f"AWQ: grid is the number of exponents to try, at least 1, got {self.grid!r}")

    @property
    def joint(self) -> bool:
        return True

    @property
    def scales_columns(self) -> bool:
        return True

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return uniform_bits(shape, self.bits, self.group, symmetric=self.symmetric) + 16 * shape[1]

    def __call__(self, site: Site) -> Weight:
        return self.together([site])[0]

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        s = self._scale(sites)
        return [self._rounded(site, s) for site in sites]

    def _uniform(self, V: Tensor) -> Uniform:
        shape = (V.shape[0], V.shape[1])
        return Uniform(shape, bits=self.bits, group=self.group, symmetric=self.symmetric, codec=self.codec).to(V.device)

    def _scale(self, sites: Sequence[Site]) -> Tensor:
        """s [in]: the power of the inputs' sizes with the least output error, summed over the sites."""
        size = _mean_size(sites)
        samples = [_evenly_spaced(site) for site in sites]
        best, least = torch.ones_like(size), float("inf")
        for k in range(self.grid):
            s = size ** (k / self.grid)
            s = stored_scale(s / (s.max() * s.min()).sqrt())
            loss = sum(
                self._loss(W, s, _hessian(site)) * len(site.W) / len(W) for site, W in zip(sites, samples, strict=True)
            )
            if loss < least:
                best, least = s, loss
        if not least < float("inf"):
            sites[0].notes.append(f"{_names(sites)}: input statistics are not finite; rounded to nearest")
        return best

    def _loss(self, W: Tensor, s: Tensor, H: Tensor) -> float:
        """tr(E H E^T) of W rounded on the full ranges, over the row groups that have a Hessian each."""
        weight = scaled(self._uniform(W), s)
        weight.fit(W)
        weight.right_inverse(W)
        E = (W - weight.forward()).unflatten(0, (len(H), -1))
        return sum(energy(part, metric) for part, metric in zip(E, H, strict=True))

    def _rounded(self, site: Site, s: Tensor) -> Weight:
        W = site.W.float()
        grid = self._uniform(W)
        grid.fit(self._held_back(W * s, s, _hessian(site)) if self.clip else W * s)
        weight = scaled(grid, s)
        weight.right_inverse(W)
        return weight

    def _held_back(self, V: Tensor, s: Tensor, H: Tensor) -> Tensor:
        """V = W diag(s) with the entries of every group held back to the range that the grid is to span."""
        width = self.group if isinstance(self.group, int) else V.shape[1]
        blocks = H.unflatten(1, (-1, width)).unflatten(3, (-1, width)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        if self.group == "tensor":  # one range for all rows
            return self._within_ranges(V, s, blocks)
        rows, step = len(V) // len(H), max(1, _ENTRIES // V.shape[1])
        owned = zip(V.split(rows), blocks.split(1), strict=True)
        return torch.cat([self._within_ranges(part, s, block) for own, block in owned for part in own.split(step)])

    def _within_ranges(self, V: Tensor, s: Tensor, blocks: Tensor) -> Tensor:
        """`_held_back` for rows whose groups have the Hessians `blocks` [row groups, groups, width, width]."""
        grouped = V.unflatten(1, (-1, blocks.shape[-1]))
        full = grouped.abs().amax(2, keepdim=True) if self.group != "tensor" else grouped.abs().max().view(1, 1, 1)
        best, least = full, torch.full_like(full, torch.inf)
        for k in range(_RANGES):
            limit = full * (1 - k / _STEPS)
            grid = self._uniform(V)
            grid.fit(grouped.clamp(-limit, limit).flatten(1))
            grid.right_inverse(V)
            error = _group_errors((grid.forward() - V) / s, blocks).unsqueeze(2)
            error = error if self.group != "tensor" else error.sum().view(1, 1, 1)
            better = error < least
            best, least = torch.where(better, limit, best), torch.where(better, error, least)
        return grouped.clamp(-best, best).flatten(1)


def _group_errors(E: Tensor, blocks: Tensor) -> Tensor:
    """e H_gg e^T [rows, groups] of every group e of every row of E [rows, in], by its own block of the Hessian only."""
    # [row groups, groups, rows, width]
    e = E.unflatten(0, (len(blocks), -1)).unflatten(2, (-1, blocks.shape[-1])).transpose(1, 2)
    return ((e @ blocks) * e).sum(3).transpose(1, 2).flatten(0, 1)


def _mean_size(sites: Sequence[Site]) -> Tensor:
    """The mean |x| of every column [in] of the input that the sites read, over the tokens of all row groups."""
    for site in sites:
        if site.magnitude is None:
            raise SchemeError(f"{site.name}: AWQ needs the mean magnitude of the inputs")
    first = sites[0]
    assert first.magnitude is not None
    tokens = first.tokens if first.tokens is not None else torch.ones(len(first.magnitude))
    mean = tokens.to(first.magnitude) @ first.magnitude / max(float(tokens.sum()), 1.0)
    if not mean.any():
        first.notes.append(f"{_names(sites)}: no input was seen; rounded to nearest")
    return bounded(mean)


def _names(sites: Sequence[Site]) -> str:
    return ", ".join(site.name for site in sites)


def _hessian(site: Site) -> Tensor:
    if site.hessian is None:
        raise SchemeError(f"{site.name}: AWQ needs the Hessian of the inputs")
    return site.hessian


def _evenly_spaced(site: Site) -> Tensor:
    """About as many rows as decide alpha, as many of every row group, in float32."""
    step = max(1, len(site.W) // _ROWS)
    return site.W.unflatten(0, (site.groups, -1))[:, ::step].flatten(0, 1).float()
