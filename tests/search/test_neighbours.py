"""What finished trials tell a new one, and what is left of a scheme once channels are cut."""

from pathlib import Path
from typing import Any

import pytest

import laconic as lc
from laconic.recover.curve import Point
from laconic.search.neighbours import Neighbour, hopeless, nearest
from laconic.search.remains import Survivors, after_cut


def point(minibatches: int, score: float) -> Point:
    return Point(minibatches, score, 0.0)


def curve(*scores: float) -> list[Point]:
    return [point(10 * i, score) for i, score in enumerate(scores)]


def test_a_hopeless_run() -> None:
    """Reference 1.0, floor 0.9. Finished runs were at 0.6 half-way and ended at 0.8: they closed half of their gap."""
    finished = [curve(0.2, 0.6, 0.8), curve(0.4, 0.6, 0.7)]
    assert hopeless(curve(0.1, 0.6), 20, finished, 1.0, 0.9)  # 0.6 + 0.625 x 0.4 = 0.85
    assert not hopeless(curve(0.1, 0.75), 20, finished, 1.0, 0.9)  # 0.75 + 0.625 x 0.25 = 0.906
    assert hopeless(curve(0.1, 0.73), 20, finished, 1.0, 0.9)  # 0.899


def test_a_run_is_not_given_up_too_soon() -> None:
    finished = [curve(0.2, 0.2, 0.2), curve(0.2, 0.2, 0.2)]
    assert hopeless(curve(0.1, 0.1), 20, finished, 1.0, 0.9)
    assert not hopeless(curve(0.1, 0.1), 21, finished, 1.0, 0.9)  # less than half is done
    assert not hopeless(curve(0.1, 0.1, 0.1), 20, finished, 1.0, 0.9)  # all is done
    assert not hopeless(curve(0.1, 0.1), 20, finished[:1], 1.0, 0.9)  # one run says nothing
    above = [curve(0.95, 0.95, 0.95)] * 3  # of runs that kept the floor neither
    assert not hopeless(curve(0.1, 0.1), 20, above, 1.0, 0.9)
    assert not hopeless([point(0, 0.1)], 0, finished, 1.0, 0.9)  # nothing is trained
    best_counts = [*curve(0.1, 0.95), point(15, 0.1)]
    assert not hopeless(best_counts, 20, finished, 1.0, 0.9)


def test_runs_are_compared_at_equal_shares() -> None:
    """A warm run of 10 minibatches beside cold ones of 40: at its half they were at theirs."""
    cold = [[point(0, 0.0), point(10, 0.0), point(20, 0.8), point(40, 0.88)]] * 2
    assert hopeless(
        [point(0, 0.0), point(5, 0.5)], 10, cold, 1.0, 0.9
    )  # they closed 0.4 of the gap, this would need 0.8
    assert not hopeless([point(0, 0.0), point(5, 0.85)], 10, cold, 1.0, 0.9)


def test_the_nearest_trial() -> None:
    original = Neighbour(None, {}, None)
    known = [original, *(Neighbour(i, {"sparsity": s}, Path(f"{i}")) for i, s in enumerate((0.5, 0.8, 0.9)))]

    def of(s: float) -> int | None:
        found = nearest({"sparsity": s}, known)
        assert found is not None
        return found.number

    assert [of(s) for s in (0.99, 0.86, 0.7, 0.6, 0.3, 0.2)] == [2, 2, 1, 0, 0, None]
    assert of(0.25) is None  # as far from 0.5 as from the original: the first of equal ones


def test_the_nearest_of_several_variables() -> None:
    rows = [
        {"s": 0.5, "dtype": "float16", "bits": 4},
        {"s": 0.5, "dtype": "float32", "bits": 4},
        {"s": 0.5, "dtype": "float16", "bits": 8},
    ]
    known = [Neighbour(i, row, None) for i, row in enumerate(rows)]

    def of(**values: Any) -> int | None:
        found = nearest(values, known)
        return found.number if found is not None else None

    assert of(s=0.6, dtype="float32", bits=2) == 1
    assert of(s=0.6, dtype="float16", bits=5) == 0
    assert of(s=0.6, dtype="float16", bits=7) == 2
    assert of(s=0.6, dtype="bfloat16", bits=4) is None
    assert nearest({"s": 0.5}, []) is None


@pytest.mark.parametrize(
    ("scheme", "left"),
    [
        (lc.FilterPrune(0.5), None),
        (lc.FilterPrune(0.5) >> lc.Cast("float16"), lc.Cast("float16")),
        (lc.NeuronPrune(0.5) >> lc.Magnitude(0.5) >> lc.RTN(4), Survivors() >> lc.RTN(4)),
        (lc.Magnitude(0.5) >> lc.RTN(4), Survivors() >> lc.RTN(4)),
        (lc.StructurePrune(0.5) >> (lc.Magnitude(0.5) >> lc.RTN(4)), Survivors() >> lc.RTN(4)),
        (lc.BlockPrune(0.5), Survivors()),
        (lc.GPTQ(4), lc.GPTQ(4)),
    ],
    ids=str,
)
def test_what_is_left_of_a_scheme_after_the_cut(scheme: Any, left: Any) -> None:
    assert after_cut(scheme) == left
