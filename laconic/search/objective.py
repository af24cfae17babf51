"""Stage 2: the best objective among the sparsities that keep the score, by confidence bounds."""

import math
from collections.abc import Sequence

import numpy as np

from laconic.errors import SearchError
from laconic.search.acquisition import Axis, Proposal, Sample, best_of, explained, lcb, ucb
from laconic.search.gp import Prior, posterior


def propose_objective(
    history: Sequence[Sample],
    bounds: tuple[float, float],
    maximize: bool,
    *,
    within: tuple[float, float] | None = None,
    pending: Sequence[float] = (),
    kappa: float = 2.576,
    improvement: float = 0.01,
    tolerance: float = 0.01,
    prior: Prior | None = None,
    log: bool = False,
) -> Proposal:
    """Where in (low, s_acc) to measure the objective next: the maximum of UCB to maximise, of LCB to minimise.
    Deterministic.

    `history`: (s, objective) of the samples that keep the level, those of stage 1 too. `within`: the open interval
    (low, s_acc), a part of the `bounds`, which set the length scale. `pending` as in stage 1. `exhausted` when no
    point's optimistic bound is better than the best sample by more than `improvement` times its size, or the best such
    point lies within half a `tolerance` of a sample; so an objective that is monotone in s costs no or few further
    samples.
    Raises: SearchError for reversed bounds and values that are not finite. Source: Condensa section 3.2, stage 2. Cost:
    O(n^3).
    """
    axis, interval, bound = Axis(*bounds, log), within or bounds, ucb if maximize else lcb
    if not interval[0] < interval[1]:
        raise SearchError(f"expected an interval (low, high) with low < high, got {interval}")
    x, y = [axis.unit(s) for s, _ in history], [value for _, value in history]
    for point in sorted(pending):
        believed = posterior(x, y, np.array([axis.unit(point)]), prior)[0][0]
        x, y = [*x, axis.unit(point)], [*y, float(believed)]
    grid = axis.inside(interval)
    acquisition = bound(*posterior(x, y, grid, prior), kappa)
    chosen = best_of(grid, acquisition)
    best = max((value if maximize else -value for value in y), default=-math.inf)
    promise = float(acquisition.max()) - best
    over = promise <= improvement * abs(best) or min((abs(chosen - u) for u in x), default=math.inf) <= tolerance / 2
    mean, deviation = posterior(x, y, axis.shown(), prior)
    picture = mean, deviation, bound(mean, deviation, kappa)
    return explained(
        axis.short(chosen),
        interval,
        axis=axis,
        process=picture,
        exhausted=over and not pending,
        wait=over and bool(pending),
    )
