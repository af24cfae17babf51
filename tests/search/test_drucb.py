"""DR-UCB line by line, its domain, its samples, and stage 2."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.needs import extra

extra("sklearn")

from laconic.errors import SearchError
from laconic.search.acquisition import level_ucb
from laconic.search.drucb import Rule, answer, domain, propose
from laconic.search.gp import Prior, posterior
from laconic.search.objective import propose_objective

Curve = Callable[[float], float]
BOUNDS = (0.0, 1.0)
REFERENCE, LEVEL = 0.92, 0.90


def knee(star: float, width: float = 0.03) -> Curve:
    """A logistic curve from 0.92 to 0.1 that passes 0.90 at `star`."""
    centre = star + width * math.log((0.82 - 0.02) / 0.02)
    return lambda s: 0.1 + 0.82 / (1 + math.exp((s - centre) / width))


def cliff(star: float) -> Curve:
    return lambda s: 0.92 if s <= star else 0.1


def sampled(
    curve: Curve, count: int, rule: Rule | None = None, level: float = LEVEL, reference: float | None = REFERENCE
) -> list[tuple[float, float]]:
    history: list[tuple[float, float]] = []
    for _ in range(count):
        s = propose(history, level, BOUNDS, rule, reference=reference).s
        history.append((s, curve(s)))
    return history


def found(curve: Curve, star: float, rule: Rule | None = None, limit: int = 30) -> int:
    """Samples until the best one that keeps the level is within 0.01 of `star`."""
    history: list[tuple[float, float]] = []
    while len(history) < limit:
        s = propose(history, LEVEL, BOUNDS, rule, reference=REFERENCE).s
        history.append((s, curve(s)))
        best = answer(history, LEVEL)
        if best is not None and star - 0.01 <= best[0] <= star + 1e-9:
            return len(history)
    return limit + 1


def test_equation_1_by_hand() -> None:
    got = level_ucb(np.array([0.9, 0.8]), np.array([0.2, 0.4]), level=0.85, gamma=0.95)
    assert got == pytest.approx([0.05 * 0.2 - 0.95 * 0.05, 0.05 * 0.4 - 0.95 * 0.05])


def test_the_process_is_the_textbook_one() -> None:
    x, y, at = np.array([0.0, 0.5, 0.7]), np.array([0.9, 0.88, 0.5]), np.linspace(0, 1, 11)
    mean, deviation = posterior(x, y, at)
    expected_mean, expected_deviation = process(x, y, at)
    assert mean == pytest.approx(expected_mean, abs=1e-7)
    assert deviation == pytest.approx(expected_deviation, abs=1e-7)
    assert posterior(x, y, x)[0] == pytest.approx(y, abs=1e-4)
    with pytest.raises(SearchError, match="finite"):
        posterior([0.1], [math.nan], at)


def test_a_fitted_process_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()
    first = posterior([0.0, 0.4, 0.9], [1.0, 0.9, 0.1], np.linspace(0, 1, 5), Prior(optimize=True))
    again = posterior([0.0, 0.4, 0.9], [1.0, 0.9, 0.1], np.linspace(0, 1, 5), Prior(optimize=True))
    assert (np.random.get_state()[1] == before).all()
    assert (first[0] == again[0]).all()


def process(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2, length 1, noise 1e-6, normalised targets: written out, without scikit-learn."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        d = math.sqrt(5) * np.abs(a[:, None] - b[None])
        return (1 + d + d**2 / 3) * np.exp(-d)

    centre, scale = y.mean(), y.std() or 1.0
    inverse = np.linalg.inv(kernel(x, x) + 1e-6 * np.eye(len(x)))
    cross = kernel(at, x)
    variance = 1 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    return centre + scale * (cross @ inverse @ ((y - centre) / scale)), scale * np.sqrt(np.maximum(variance, 0))


def algorithm_1(curve: Curve, level: float, T: int, gamma: float = 0.95, every: bool = False) -> list[float]:
    """Algorithm 1 of the paper, line by line; `every` reads line 7 as equation 1 does (above all earlier sparsities)."""
    s = [0.0]  # line 3: s_0
    low, high = 0.0, 1.0  # line 3: D
    X, Y = [0.0], [REFERENCE]  # line 3: X, with the reference, which costs no sample
    for t in range(1, T):  # line 4
        if t == 1:
            s_t = 0.5  # the process is flat: our choice is the middle
        else:
            grid = low + (high - low) * np.arange(1, 1000) / 1000
            mean, deviation = process(np.array(X), np.array(Y), grid)
            s_t = float(grid[np.argmax((1 - gamma) * deviation - gamma * np.abs(mean - level))])  # line 5, equation 1
        y_t = curve(s_t)  # line 6
        if s_t > (max(s) if every else s[-1]) and y_t >= level:  # line 7
            low = s_t  # line 8
        X.append(s_t)  # lines 10 and 11
        Y.append(y_t)
        s.append(s_t)
    return s[1:]


@pytest.mark.parametrize("star", [0.15, 0.45, 0.62, 0.79, 0.93])
@pytest.mark.parametrize("reading", ["listing", "equation"])
def test_algorithm_1_line_by_line(star: float, reading: str) -> None:
    curve = knee(star, 0.06)  # wide, so that no two points of the grid are equally good up to rounding
    ours = sampled(curve, 9, Rule("dr-ucb", reading=reading))
    assert [s for s, _ in ours] == pytest.approx(algorithm_1(curve, LEVEL, T=10, every=reading == "equation"), abs=1e-5)


def test_the_three_readings_of_line_7() -> None:
    history = [(0.8, 0.2), (0.4, 0.91), (0.5, 0.905), (0.45, 0.91), (0.6, 0.4)]
    assert domain(history, LEVEL, BOUNDS, Rule("dr-ucb", reading="listing")) == (
        0.5,
        1,
    )  # 0.4 is not above 0.8, 0.5 is above 0.4
    assert domain(history, LEVEL, BOUNDS, Rule("dr-ucb", reading="equation")) == (0, 1)  # nothing is above 0.8
    assert domain(history, LEVEL, BOUNDS, Rule("dr-ucb", reading="feasible")) == (0.5, 1)
    assert domain(history, LEVEL, BOUNDS, Rule("ils-ucb")) == (0, 1)
    assert domain(history, LEVEL, BOUNDS) == (0.5, 0.6)


def test_the_answer_keeps_the_level_though_the_last_sample_does_not() -> None:
    assert answer([(0.4, 0.91), (0.6, 0.905), (0.7, 0.3)], LEVEL) == (0.6, 0.905)
    assert answer([(0.7, 0.3)], LEVEL) is None


@pytest.mark.parametrize("rule", [Rule(), Rule("dr-ucb", reading="feasible")])
def test_no_sample_lies_outside_the_domain(rule: Rule) -> None:
    history: list[tuple[float, float]] = []
    curve = knee(0.7)
    for _ in range(7):
        proposal = propose(history, LEVEL, BOUNDS, rule, reference=REFERENCE)
        low, high = proposal.domain
        assert low < proposal.s < high
        assert low == max([s for s, y in history if y >= LEVEL], default=0.0)
        assert high == (min([s for s, y in history if y < LEVEL], default=1.0) if rule.name == "two-sided" else 1.0)
        assert all((a is None) == (not low < x < high) for x, a in zip(proposal.x, proposal.acquisition, strict=True))
        history.append((proposal.s, curve(proposal.s)))


@pytest.mark.parametrize(
    "make", [knee, cliff, lambda star: knee(star, 0.1), lambda star: lambda s: 0.92 - 0.02 * (s / star) ** 2]
)
def test_two_sided_takes_at_most_one_sample_more_than_bisection(make: Callable[[float], Curve]) -> None:
    for star in np.linspace(0.06, 0.97, 14):
        assert found(make(star), star) <= 8  # bisection: ceil(log2(100)) = 7


def test_two_sided_needs_fewer_samples_than_published() -> None:
    stars = np.linspace(0.1, 0.95, 12)
    ours = [found(knee(star), star) for star in stars]
    published = [found(knee(star), star, Rule("dr-ucb"), limit=12) for star in stars]
    assert np.median(ours) <= 5
    assert np.mean(ours) < np.mean(published) - 1


def test_it_ends_when_the_domain_is_narrower_than_the_tolerance() -> None:
    curve, history = knee(0.66), []
    while not (proposal := propose(history, LEVEL, BOUNDS, reference=REFERENCE)).exhausted:
        history.append((proposal.s, curve(proposal.s)))
    assert len(history) <= 8
    assert proposal.domain[1] - proposal.domain[0] <= 0.01 * (1 + 1e-9)
    assert 0.65 <= answer(history, LEVEL)[0] <= 0.66


@pytest.mark.parametrize(("low", "high"), [(0.67, 0.68), (0.52, 0.53), (0.3, 0.31)])
def test_a_domain_of_exactly_the_tolerance_takes_no_more_samples(low: float, high: float) -> None:
    assert high - low > 0.01, "as floats they are an ulp more than a hundredth apart"
    assert propose([(low, 0.91), (high, 0.3)], LEVEL, BOUNDS, reference=REFERENCE).exhausted
    assert not propose([(low, 0.91), (high + 0.001, 0.3)], LEVEL, BOUNDS, reference=REFERENCE).exhausted


def test_without_an_allowed_loss_it_is_bisection_or_so() -> None:
    history = sampled(cliff(0.63), 8, level=0.92)
    assert 0.62 <= answer(history, 0.92)[0] <= 0.63


def test_nothing_keeps_the_level() -> None:
    history = sampled(lambda s: 0.1, 8)
    assert answer(history, LEVEL) is None
    assert propose(history, LEVEL, BOUNDS, reference=REFERENCE).exhausted


def test_a_sample_just_below_the_level_is_doubted_until_there_are_two() -> None:
    rule = Rule(margin=0.004)
    history = [(0.5, 0.898)]
    assert domain(history, LEVEL, BOUNDS, rule) == (0, 1)
    assert domain(history, LEVEL, BOUNDS) == (0, 0.5)
    assert propose(history, LEVEL, BOUNDS, rule, reference=REFERENCE).s == pytest.approx(0.75)
    assert domain([*history, (0.75, 0.91)], LEVEL, BOUNDS, rule) == (0.75, 1)  # it was noise
    assert domain([*history, (0.75, 0.2)], LEVEL, BOUNDS, rule) == (0, 0.5)  # it was not
    assert domain([(0.5, 0.895)], LEVEL, BOUNDS, rule) == (0, 0.5)


def test_noise_on_a_plateau_near_the_level_does_not_lock_the_answer_out() -> None:
    def curve(s: float) -> float:  # a plateau 0.003 above the level, one bad sample in its middle
        return 0.899 if abs(s - 0.5) < 0.01 else 0.903 if s < 0.8 else 0.3

    assert answer(sampled(curve, 8), LEVEL)[0] < 0.5
    assert answer(sampled(curve, 9, Rule(margin=0.004)), LEVEL)[0] > 0.78


def test_pending_samples_are_not_proposed_again() -> None:
    history = [(0.5, 0.915), (0.9, 0.2)]
    alone = propose(history, LEVEL, BOUNDS, reference=REFERENCE)
    beside = propose(history, LEVEL, BOUNDS, reference=REFERENCE, pending=[alone.s])
    assert abs(beside.s - alone.s) > 0.03
    assert alone.domain == beside.domain == (0.5, 0.9)
    last = propose([(0.5, 0.915), (0.515, 0.2)], LEVEL, BOUNDS, reference=REFERENCE, pending=[0.508])
    assert last.wait
    assert not last.exhausted


def test_a_run_that_diverged_counts_as_bad() -> None:
    for rule in (Rule(), Rule("dr-ucb"), Rule("ils-ucb")):
        proposal = propose([(0.5, 0.915), (0.75, -math.inf)], LEVEL, BOUNDS, rule, reference=REFERENCE)
        assert math.isfinite(proposal.s)
        assert np.isfinite(proposal.mean).all()


def test_bounds_set_the_scale() -> None:
    wide = propose([(0.5, 0.915), (0.75, 0.7)], LEVEL, (0.0, 1.0), reference=REFERENCE)
    narrow = propose([(0.95, 0.915), (0.975, 0.7)], LEVEL, (0.9, 1.0), reference=REFERENCE)
    assert narrow.s == pytest.approx(0.9 + 0.1 * wide.s, abs=1e-5)
    log = propose([(1e-3, 0.915), (10**-2.0, 0.7)], LEVEL, (1e-5, 1e-1), reference=REFERENCE, log=True)
    assert math.log10(log.s) == pytest.approx(-5 + 4 * wide.s, abs=1e-4)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.5, 0.5), (0.0, math.inf), (math.nan, 1.0)])
def test_bad_bounds(bounds: tuple[float, float]) -> None:
    with pytest.raises(SearchError, match="low < high"):
        propose([], LEVEL, bounds)
    with pytest.raises(SearchError, match="low < high"):
        propose_objective([], bounds, True)


def test_bad_values() -> None:
    with pytest.raises(SearchError, match="numbers"):
        propose([(0.5, math.nan)], LEVEL, BOUNDS)
    with pytest.raises(SearchError, match="level nan"):
        propose([], math.nan, BOUNDS)
    with pytest.raises(SearchError, match="tolerance"):
        Rule(tolerance=0)
    with pytest.raises(SearchError, match="bisect"):
        Rule("bisect")  # type: ignore[arg-type]


def test_a_monotone_objective_needs_no_sample_in_stage_2() -> None:
    samples = [(s, 1 / (1 - 0.5 * s)) for s in (0.5, 0.62, 0.65)]
    proposal = propose_objective(samples, BOUNDS, maximize=True, within=(0.0, 0.65))
    assert proposal.exhausted
    falling = [(s, 1e6 * (1 - s)) for s in (0.5, 0.62, 0.65)]
    assert propose_objective(falling, BOUNDS, maximize=False, within=(0.0, 0.65)).exhausted


def test_stage_2_finds_a_maximum_inside_the_domain() -> None:
    def objective(s: float) -> float:
        return 100 - 400 * (s - 0.3) ** 2

    samples = [(s, objective(s)) for s in (0.5, 0.75, 0.78)]
    mirrored = list(samples)
    for _ in range(5):
        up = propose_objective(samples, BOUNDS, maximize=True, within=(0.0, 0.78))
        down = propose_objective([(s, -y) for s, y in mirrored], BOUNDS, maximize=False, within=(0.0, 0.78))
        assert up.s == down.s
        assert 0 < up.s < 0.78
        if up.exhausted:
            break
        samples.append((up.s, objective(up.s)))
        mirrored = list(samples)
    assert max(y for _, y in samples) > 99
    assert up.exhausted
