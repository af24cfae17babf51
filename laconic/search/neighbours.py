"""What finished trials tell a new one: which of them it can start from, and when it need not be carried to its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.recover.curve import Point

_SLACK = 0.25  # more than the largest share of the gap that a finished run closed is allowed for


@dataclass(frozen=True)
class Neighbour:
    """A finished trial that another can start from: its values, and where its state is (None for the original
    model).
    """

    number: int | None
    values: dict[str, Any]
    state: Path | None


def nearest(values: Mapping[str, Any], finished: Sequence[Neighbour]) -> Neighbour | None:
    """The finished trial whose values are nearest, by relative distance summed over numbers; of equal ones the first.

    Values that differ and are no numbers make a trial no neighbour. The original model counts as a trial with every
    number at zero.
    """
    best: tuple[float, Neighbour] | None = None
    for other in finished:
        apart = 0.0
        for name, value in values.items():
            there = other.values.get(name, 0.0 if other.number is None else None)
            if isinstance(value, int | float) and isinstance(there, int | float):
                apart += abs(float(value) - float(there)) / max(abs(float(value)), 1e-9)
            elif value != there:
                apart = float("inf")
        if apart < float("inf") and (best is None or apart < best[0]):
            best = apart, other
    return best[1] if best is not None else None


def hopeless(
    curve: Sequence[Point],
    total: int,
    finished: Sequence[Sequence[Point]],
    reference: float,
    floor: float,
) -> bool:
    """Whether a run cannot reach the floor any more: not even if, from here on, it closed of its gap to the reference
    score the largest share that a finished run closed, and a bit more.

    Runs are compared at equal shares of their minibatches; `finished` holds the curves of runs that went to their end.
    Only those that were behind the floor there say anything; two are needed, and half of this run has to be done. An
    estimate: a trial can be given up wrongly, which costs sparsity and never accuracy.
    """
    done = curve[-1].minibatches / max(total, 1)
    if not 0.5 <= done < 1:
        return False
    closed = []
    for other in finished:
        here = _best_score([p for p in other if p.minibatches <= done * other[-1].minibatches])
        if here < floor:
            closed.append((_best_score(other) - here) / (reference - here))
    if len(closed) < 2:
        return False
    here = _best_score(curve)
    return here + min(1.0, (1 + _SLACK) * max(closed)) * (reference - here) < floor


def _best_score(curve: Sequence[Point]) -> float:
    return max(point.score for point in curve)
