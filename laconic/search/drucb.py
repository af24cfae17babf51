"""Stage 1, DR-UCB: where to sample a falling curve next, to find the last point that keeps a level.

Pure functions of the samples so far; nothing here knows of trials, storage or networks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from laconic.errors import SearchError
from laconic.search.acquisition import Axis, Proposal, Sample, best_of, explained, level_ucb
from laconic.search.gp import Array, Prior, posterior

_LOSS = 10.0  # losses beyond ten times the allowed one, or below a tenth of it, do not say where the level is crossed
_SLACK = 1 + 1e-9  # the ends of an interval of exactly the tolerance are floats: 0.68 - 0.67 is 0.010000000000000009
_EXTRA = 1  # samples more than bisection that "two-sided" may take; n_0 of ITP, for which its authors too take 1


@dataclass(frozen=True)
class Rule:
    """How stage 1 seeks s_acc, the largest s with y >= L.

    `name`:
    - "two-sided", beyond the paper: monotonicity closes the domain from both sides, D = (largest s with y >= L,
      smallest with y < L). The process, the same as the paper's, sees the logarithm of the loss in units of the loss
      that is allowed, log((A - y) / (A - L)) with A the reference's score, kept between a tenth and ten times. What is
      lost grows about exponentially in s before a network breaks, and a process in y itself takes every cliff for a
      slope. The lower bound stands for a tenth; the upper one for ten times, until a sample is below the level. The
      maximum of equation 1 is moved half a tolerance to the side that keeps the level, and kept so near to the middle
      of D that at most one sample more is taken than by bisection.
    - "dr-ucb": Algorithm 1 and equation 1 as published; the domain closes only from below.
    - "ils-ucb": equation 1 over the whole domain (Garg et al. 2016).

    `tolerance`: the share of the bounds' width below which s need not be known. `gamma`, `prior`: equation 1.
    `reading`: when line 7 of Algorithm 1 moves the domain; "listing": s_t is above the sample before it; "equation":
    above all earlier samples; "feasible": above all that moved it. `margin`: a sample less than this below the level
    (in the score's units) is doubted by "two-sided": it does not close the domain before another one above it is below
    the level too, which is asked for next. 0 trusts every sample. One that keeps the level is always believed, since it
    comes with a model that keeps it; it overrules those below it that did not.
    Raises: SearchError for an unknown name or reading, a gamma outside 0 ... 1, a tolerance outside 0 ... 0.5, a
    negative margin.
    """

    name: Literal["two-sided", "dr-ucb", "ils-ucb"] = "two-sided"
    gamma: float = 0.95
    tolerance: float = 0.01
    margin: float = 0.0
    reading: Literal["listing", "equation", "feasible"] = "listing"
    prior: Prior = field(default_factory=Prior)

    def __post_init__(self) -> None:
        if self.name not in ("two-sided", "dr-ucb", "ils-ucb") or self.reading not in (
            "listing",
            "equation",
            "feasible",
        ):
            raise SearchError(
                f"expected a rule two-sided, dr-ucb or ils-ucb, got {self.name!r} with the reading {self.reading!r}"
            )
        if not (0 <= self.gamma <= 1 and 0 < self.tolerance <= 0.5 and self.margin >= 0):
            raise SearchError(
                f"expected gamma in 0 ... 1, tolerance in 0 ... 0.5 and a margin from 0, got {self.gamma}, "
                f"{self.tolerance} and {self.margin}"
            )


def domain(
    history: Sequence[Sample], level: float, bounds: tuple[float, float], rule: Rule | None = None
) -> tuple[float, float]:
    """The open interval that may still hold s_acc. Source: Condensa, Algorithm 1, lines 3 and 7 to 9; see `Rule` for
    what goes beyond it.
    """
    rule = rule or Rule()
    low, high = bounds
    if rule.name == "ils-ucb":
        return low, high
    if rule.name == "two-sided":
        low = max((s for s, y in history if y >= level), default=low)
        below = [(s, y) for s, y in history if y < level and s > low]
        closing = [s for s, y in below if y < level - rule.margin or any(other > s for other, _ in below)]
        return low, min(closing, default=high)
    earlier = low  # s_0 of line 3
    for s, y in history:
        if s > earlier and y >= level:
            low = s
        earlier = {"listing": s, "equation": max(earlier, s), "feasible": low}[rule.reading]
    return low, high


def answer(history: Sequence[Sample], level: float) -> Sample | None:
    """The sample with the largest s that kept the level, or None.

    Line 12 of Algorithm 1 returns the last sample s_(T-1), whether or not it kept the level.
    """
    return max((sample for sample in history if sample[1] >= level), default=None)


def propose(
    history: Sequence[Sample],
    level: float,
    bounds: tuple[float, float],
    rule: Rule | None = None,
    *,
    reference: float | None = None,
    pending: Sequence[float] = (),
    log: bool = False,
) -> Proposal:
    """Where to measure the score next, so that the largest s that keeps the level is found. Deterministic.

    `history` in the order of sampling. `reference`: the uncompressed model's score, which costs no sample and stands in
    the process at the lower bound; without it the best score seen is taken for the allowed loss. The first sample is
    the middle of the bounds (the paper's flat prior prefers none); ties go to the point nearest to the middle.
    `pending`: points that other workers are measuring; they count as if the process's mean had been measured there
    (kriging believer). `log`: the bounds are searched on the logarithm. A score of -inf is a run that diverged.
    Raises: SearchError for reversed bounds and values that are no numbers. Source: Condensa section 3.2, Algorithm 1,
    line 5. Cost: O(n^3).
    """
    rule, axis = rule or Rule(), Axis(*bounds, log)
    if not math.isfinite(level) or any(math.isnan(y) or not math.isfinite(s) for s, y in history):
        raise SearchError(f"expected a finite level and scores that are numbers, got level {level} and {list(history)}")
    told = list(history)
    for point in sorted(pending):
        process = _Process(told, level, reference, rule, axis)
        told.append((point, float(process.scores(np.array([axis.unit(point)]))[0][0])))
    process = _Process(told, level, reference, rule, axis)
    interval = domain(told, level, bounds, rule)
    doubted = [s for s, y in told if rule.name == "two-sided" and y < level and interval[0] < s < interval[1]]
    low, high = axis.unit(max([interval[0], *doubted])), axis.unit(interval[1])
    if not told or doubted:
        chosen = (low + high) / 2
    else:
        grid = axis.inside(interval)
        chosen = best_of(grid, process.acquisition(grid))
        if rule.name == "two-sided":
            chosen = _safe(chosen, low, high, len(told), rule.tolerance)
    known = _is_exhausted(history, axis.value(chosen), level=level, bounds=bounds, rule=rule, axis=axis)
    believed = _is_exhausted(told, axis.value(chosen), level=level, bounds=bounds, rule=rule, axis=axis)
    # what the domain shows is certain; what the process shows may change
    over = known and (not pending or rule.name == "two-sided")
    shown = axis.shown()
    picture = (*process.scores(shown), process.acquisition(shown))
    return explained(
        axis.short(chosen),
        domain(history, level, bounds, rule),
        axis=axis,
        process=picture,
        exhausted=over,
        wait=believed and not over,
    )


@dataclass(frozen=True)
class _Process:
    """The Gaussian process of the samples, at points of the unit interval: of scores as they are, or of the logarithm
    of what was lost.
    """

    told: Sequence[Sample]
    level: float
    reference: float | None
    rule: Rule
    axis: Axis

    @property
    def allowed(self) -> float:
        """The loss that is allowed, A - L. Where none is, only the side of the level counts, as in bisection."""
        top = self.reference if self.reference is not None else max((y for _, y in self.told), default=self.level)
        return max(top - self.level, 1e-6 * max(abs(self.level), 1e-6))

    def _posterior(self, at: Array) -> tuple[Array, Array]:
        x = [self.axis.unit(s) for s, _ in self.told]
        if self.rule.name == "two-sided":
            y = [
                math.log(min(_LOSS, max(1 / _LOSS, 1 + (self.level - score) / self.allowed))) for _, score in self.told
            ]
            x, y = [0.0, *x], [-math.log(_LOSS), *y]
            if all(score >= self.level for _, score in self.told):
                x, y = [*x, 1.0], [*y, math.log(_LOSS)]
            return posterior(x, y, at, self.rule.prior)
        # a process needs finite numbers: a run that diverged counts as the worst score seen
        worst = min([score for _, score in self.told if score != -math.inf] + [self.level - self.allowed])
        y = [max(score, worst) for _, score in self.told]
        if self.reference is not None:
            x, y = [0.0, *x], [self.reference, *y]
        return posterior(x, y, at, self.rule.prior)

    def acquisition(self, at: Array) -> Array:
        return level_ucb(*self._posterior(at), 0.0 if self.rule.name == "two-sided" else self.level, self.rule.gamma)

    def scores(self, at: Array) -> tuple[Array, Array]:
        """Mean and deviation in the score's units; to first order where the process is of a logarithm."""
        mean, deviation = self._posterior(at)
        if self.rule.name != "two-sided":
            return mean, deviation
        lost = self.allowed * np.exp(mean)
        return self.level + self.allowed - lost, lost * deviation


def _is_exhausted(
    told: Sequence[Sample], s: float, level: float, bounds: tuple[float, float], rule: Rule, axis: Axis
) -> bool:
    """Whether the domain is narrower than the tolerance or, for rules that do not close it, the proposal is a sample
    already taken.
    """
    if rule.name == "two-sided":
        low, high = domain(told, level, bounds, rule)
        return axis.unit(high) - axis.unit(low) <= rule.tolerance * _SLACK
    return min((abs(axis.unit(s) - axis.unit(other)) for other, _ in told), default=1.0) <= rule.tolerance / 2 * _SLACK


def _safe(chosen: float, low: float, high: float, samples: int, tolerance: float) -> float:
    """The maximum moved half a tolerance to the side that keeps the level, and near enough to the middle to keep up
    with bisection.

    Bisection takes n = ceil(log2(1 / tolerance)) samples. After k samples the next may be r from the middle of the
    domain, r = tolerance / 2 * 2^(n + n_0 - k) - (high - low) / 2. Source: the projection of ITP (Oliveira and
    Takahashi 2020, section 2).
    """
    edge = 0.3 * min(tolerance, high - low)
    chosen = min(max(chosen - tolerance / 2, low + edge), high - edge)
    steps = math.ceil(math.log2(1 / tolerance)) + _EXTRA
    radius = max(0.0, tolerance / 2 * 2.0 ** (steps - samples) - (high - low) / 2)
    middle = (low + high) / 2
    return min(max(chosen, middle - radius), middle + radius)
