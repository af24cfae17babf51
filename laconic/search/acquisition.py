"""What both stages share: acquisition functions, bounds seen as the unit interval, and a proposal with its reasons."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from laconic.errors import SearchError
from laconic.search.gp import Array

Sample = tuple[float, float]
"""(s, y): a sparsity, and the score or objective measured there."""

GRID = 1000  # points on which an acquisition's maximum is sought: a tenth of the default tolerance apart
_SHOWN = 101  # points of a posterior that is kept for a picture


def level_ucb(mean: Array, deviation: Array, level: float, gamma: float = 0.95) -> Array:
    """(1 - gamma) sigma(s) - gamma |mu(s) - L|: high where the curve may cross the level.

    Source: ILS-UCB (Garg et al. 2016), and over a restricted domain DR-UCB (Condensa, equation 1; gamma from section
    4).
    """
    return (1 - gamma) * deviation - gamma * np.abs(mean - level)


def ucb(mean: Array, deviation: Array, kappa: float = 2.576) -> Array:
    """mu + kappa sigma, to maximise. Source: Srinivas et al. 2009; kappa is the default of the package that Condensa
    used (99 %).
    """
    return mean + kappa * deviation


def lcb(mean: Array, deviation: Array, kappa: float = 2.576) -> Array:
    """-(mu - kappa sigma), so that the point to minimise at is again a maximum. Source: Srinivas et al. 2009."""
    return kappa * deviation - mean


@dataclass(frozen=True)
class Proposal:
    """Where to sample next, and why.

    `domain`: the open interval that may hold the answer. `x`, `mean`, `deviation`, `acquisition`: the process over the
    whole bounds, in the units of what was measured, for a picture; the acquisition is None outside the domain.
    `exhausted`: a further sample promises nothing. `wait`: none should be taken before a pending one is known.
    """

    s: float
    domain: tuple[float, float]
    x: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    acquisition: tuple[float | None, ...]
    exhausted: bool = False
    wait: bool = False


@dataclass(frozen=True)
class Axis:
    """Bounds (low, high) as the unit interval, on which the length scale of the paper is meant; on the logarithm if
    `log`.

    Raises: SearchError for bounds that are reversed, equal or not finite, and for a logarithm of bounds that are not
    above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high) or (
            self.log and self.low <= 0
        ):
            raise SearchError(
                f"expected bounds (low, high) with low < high{' and low > 0' * self.log}, got ({self.low}, {self.high})"
            )

    def unit(self, s: float) -> float:
        if self.log:
            return math.log(s / self.low) / math.log(self.high / self.low)
        return (s - self.low) / (self.high - self.low)

    def value(self, u: float) -> float:
        return self.low * (self.high / self.low) ** u if self.log else self.low + u * (self.high - self.low)

    def short(self, u: float) -> float:
        """The value without digits that mean nothing: to a millionth of the width (or of itself)."""
        if self.log:
            return float(f"{self.value(u):.7g}")
        return round(self.value(u), 6 - math.floor(math.log10(self.high - self.low)))

    def shown(self) -> Array:
        return np.linspace(0, 1, _SHOWN)

    def inside(self, domain: tuple[float, float]) -> Array:
        """A grid of the open interval, in units."""
        low, high = (self.unit(end) for end in domain)
        return low + (high - low) * np.arange(1, GRID) / GRID


def best_of(grid: Array, acquisition: Array) -> float:
    """The grid's best point; of equal ones that nearest to the middle, and of two the lower."""
    ties = np.flatnonzero(acquisition >= acquisition.max() - 1e-12 * max(1.0, float(np.abs(acquisition).max())))
    return float(grid[ties[np.argmin(np.abs(ties - (len(grid) - 1) / 2))]])


def explained(
    s: float,
    domain: tuple[float, float],
    axis: Axis,
    process: tuple[Array, Array, Array],
    exhausted: bool = False,
    wait: bool = False,
) -> Proposal:
    """A proposal with (mean, deviation, acquisition) at `axis.shown()`."""
    x = _rounded(axis.value(float(u)) for u in axis.shown())
    mean, deviation, acquisition = (_rounded(values) for values in process)
    within = tuple(a if domain[0] < at < domain[1] else None for at, a in zip(x, acquisition, strict=True))
    return Proposal(s, domain, x=x, mean=mean, deviation=deviation, acquisition=within, exhausted=exhausted, wait=wait)


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{v:.7g}") for v in values)
