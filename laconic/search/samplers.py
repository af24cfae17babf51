"""Optuna's view of the search: the two stages as a sampler of one number, Optuna's own samplers for everything else."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from laconic.errors import SearchError
from laconic.methods.free import Free
from laconic.search.acquisition import Proposal
from laconic.search.drucb import Rule, answer, propose
from laconic.search.objective import propose_objective

_OPEN = 1e-3  # a Free is an open interval: what is sampled ends this share of the width before the bounds
# seconds to wait for another worker between its trial's start and its choice of values, which takes milliseconds
_PATIENCE = 10.0
MEASURED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Settings:
    """How a scheme's free values are searched.

    `sampler`: for one number and one objective "two-sided" (our rule of stage 1) or "drucb" (Condensa's, as published);
    Optuna's "gp" or "tpe" (anything); or "auto": stage 1 by `rule` where it can, else "gp". `trials`: samples that the
    workers take together. `level_trials`: stage 1 ends after this many, or when its rule has nothing left to learn; by
    default "two-sided", which ends by itself, may take all, and the other rules seven in ten. `kappa`: of UCB and LCB
    in stage 2. `improvement`: stage 2 ends when no point may be better by this share. `startup`: random trials before
    "gp" and "tpe" look at the results; by default two more than there are variables.
    Raises: SearchError for an unknown sampler and for counts below one.
    Source: Condensa section 3.2; ten samples per search, section 4.1.
    """

    sampler: Literal["auto", "two-sided", "drucb", "gp", "tpe"] = "auto"
    trials: int = 10
    level_trials: int | None = None
    rule: Rule = field(default_factory=Rule)
    kappa: float = 2.576
    improvement: float = 0.01
    startup: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in ("auto", "two-sided", "drucb", "gp", "tpe"):
            raise SearchError(f"expected the sampler auto, two-sided, drucb, gp or tpe, got {self.sampler!r}")
        if min(count for count in (self.trials, self.level_trials, self.startup) if count is not None) < 1:
            raise SearchError(
                f"expected at least one trial, got trials={self.trials}, level_trials={self.level_trials}, "
                f"startup={self.startup}"
            )

    @property
    def level_rule(self) -> Rule:
        """The rule of stage 1: `rule`, under the name that the sampler gives it."""
        names: dict[str, Literal["two-sided", "dr-ucb"]] = {"two-sided": "two-sided", "drucb": "dr-ucb"}
        return replace(self.rule, name=names[self.sampler]) if self.sampler in names else self.rule

    @property
    def level_limit(self) -> int:
        """The most trials that stage 1 takes."""
        return self.level_trials or (
            self.trials if self.level_rule.name == "two-sided" else max(1, round(0.7 * self.trials))
        )


def distribution_of(free: Free) -> BaseDistribution:
    """What Optuna draws a Free from. Choices that Optuna cannot store are refused with a SearchError."""
    if free.choices is not None:
        if bad := [c for c in free.choices if not isinstance(c, None | bool | int | float | str)]:
            raise SearchError(f"{free!r}: a study can hold numbers, text and None as choices, got {bad[0]!r}")
        return CategoricalDistribution(free.choices)
    assert free.low is not None
    assert free.high is not None
    if free.integer:
        return IntDistribution(int(free.low), int(free.high), log=free.log)
    if free.log:
        edge = (free.high / free.low) ** _OPEN
        return FloatDistribution(free.low * edge, free.high / edge, log=True)
    edge = (free.high - free.low) * _OPEN
    return FloatDistribution(free.low + edge, free.high - edge)


def plan(
    trials: Sequence[FrozenTrial],
    name: str,
    distribution: FloatDistribution,
    facts: Mapping[str, Any],
    maximize: bool,
    settings: Settings,
) -> tuple[int, Proposal]:
    """(stage, where to sample next) from nothing but the stored trials, so that a study continues in any process.

    `facts`: "level"; "reference", the uncompressed model's score; "noise" of scores, the least margin of the rule.
    Trials that failed do not count; those that run or wait are pending. Stage 2 begins when stage 1 is exhausted or has
    had its `level_trials`; a study that is in stage 2 stays there. Its domain is (low, s_acc), s_acc the largest
    sampled s that kept the level. The search is over when the proposal is exhausted.
    Raises: SearchError for scores that are not numbers. Source: Condensa section 3.2.
    """
    bounds, log = (distribution.low, distribution.high), distribution.log
    level, reference = facts["level"], facts.get("reference")
    rule = replace(settings.level_rule, margin=max(settings.rule.margin, facts.get("noise", 0.0)))
    known = [t for t in trials if t.state in MEASURED and "score" in t.user_attrs and name in t.params]
    history = [(t.params[name], t.user_attrs["score"]) for t in known]
    pending = [
        t.params[name] for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING) and name in t.params
    ]
    first = propose(history, level, bounds, rule, reference=reference, pending=pending, log=log)
    if not any(t.user_attrs.get("stage") == 2 for t in trials if t.state is not TrialState.FAIL):
        full = len(known) + len(pending) >= settings.level_limit
        if not first.exhausted and not (full and not pending):
            return 1, replace(first, wait=first.wait or full)
    top = answer(history, level)
    feasible = [(t.params[name], t.values[0]) for t in known if t.user_attrs["score"] >= level and t.values]
    if top is None or not feasible:  # nothing keeps the level: there is no domain to optimise in
        return 1, replace(first, exhausted=not pending, wait=bool(pending))
    return 2, propose_objective(
        feasible,
        bounds,
        maximize,
        pending=[s for s in pending if s < top[0]],
        kappa=settings.kappa,
        improvement=settings.improvement,
        tolerance=rule.tolerance,
        prior=rule.prior,
        log=log,
        within=(bounds[0], top[0]),
    )


class DRUCBSampler(BaseSampler):
    """Condensa's two stages over one float parameter, `name`, drawn from `distribution`, by the rule of the settings.

    Holds no state: every proposal is `plan` of the study's trials and of its user attribute "facts" (level, reference).
    It reads the trials' user attributes "score" and "stage" and writes "stage", "domain" and "posterior". Works in
    `study.optimize` too, where the objective function has to set "score"; the end of the search is
    `plan(...)[1].exhausted`, which a sampler has no means to say.
    Raises: SearchError for a study of several objectives, one without facts, and for any other parameter.
    Source: Condensa section 3.2, Algorithm 1. Cost: that of a Gaussian process over the trials, milliseconds.
    """

    def __init__(self, name: str, distribution: FloatDistribution, settings: Settings | None = None) -> None:
        self.name, self.distribution, self.settings = name, distribution, settings or Settings()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {self.name: self.distribution}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        facts = study.user_attrs.get("facts")
        if len(study.directions) != 1 or facts is None:
            raise SearchError(
                f"study {study.study_name!r}: DR-UCB needs one objective and the level of the score, see set_reference"
            )
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        stage, proposal = plan(
            others,
            self.name,
            distribution=self.distribution,
            facts=facts,
            maximize=study.direction is StudyDirection.MAXIMIZE,
            settings=self.settings,
        )
        parts = {"x": proposal.x, "mean": proposal.mean, "std": proposal.deviation, "acquisition": proposal.acquisition}
        seen = {key: list(values) for key, values in parts.items()}
        for key, value in {"stage": stage, "domain": list(proposal.domain), "posterior": seen}.items():
            # the trial that is given here is a copy; Optuna's own samplers reach the stored one in the same way
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
        return {self.name: proposal.s}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise SearchError(f"DR-UCB searches {self.name!r} alone, got {param_name!r} as well; use the sampler gp or tpe")


class SharedSampler(BaseSampler):
    """Another sampler, made anew for each trial as `make(count)`, of the trials before it that did not fail, for a
    study that is resumed and shared.

    Its random numbers then depend on what is known and not on how often the study was opened or a trial interrupted.
    Before it samples it calls `beat(trial id)`, and waits until the trials of other workers that began before have
    chosen their values, so that two do not choose the same.
    """

    def __init__(self, make: Callable[[int], BaseSampler], beat: Callable[[int], None]) -> None:
        self.make, self.beat = make, beat
        self.made: tuple[int, BaseSampler] | None = None

    def _inner(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if self.made is None or self.made[0] != trial.number:
            before = [
                t
                for t in study.get_trials(deepcopy=False)
                if t.number < trial.number and t.state is not TrialState.FAIL
            ]
            self.made = trial.number, self.make(len(before))
        return self.made[1]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.beat(trial._trial_id)
        limit = time.monotonic() + _PATIENCE
        while any(
            t.number < trial.number and not t.params
            for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ):
            if time.monotonic() > limit:
                break  # it was killed just there, and is found by its missing heartbeat later
            time.sleep(0.02)
        self._inner(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner(study, trial).after_trial(study, trial, state, values)


def chosen_sampler(free: Mapping[str, Free], objectives: int, settings: Settings) -> str:
    """ "two stages", "gp" or "tpe". "auto" is the two stages for one float and one objective, Optuna's GPSampler
     otherwise.

    Raises: SearchError when there is nothing to search, or the two stages are asked for anything else.
    """
    if not free:
        raise SearchError("nothing to search: the scheme has no Free value, as in FilterPrune(sparsity=Free(0, 1))")
    single = len(free) == 1 and objectives == 1 and all(f.choices is None and not f.integer for f in free.values())
    if settings.sampler in ("two-sided", "drucb") and not single:
        raise SearchError(
            f"{settings.sampler} searches one real number for one objective, got {', '.join(map(repr, free.values()))} "
            f"and {objectives}; "
            "use gp or tpe"
        )
    if settings.sampler in ("gp", "tpe"):
        return settings.sampler
    return "two stages" if single else "gp"


def sampler_of(free: Mapping[str, Free], objectives: int, settings: Settings) -> Callable[[int], BaseSampler]:
    """The sampler of a trial by the number of those before it: the two stages, or Optuna's GPSampler or TPESampler,
    which handle the score's floor as a constraint (`Trial.set_constraint`), any number of variables of any kind, and
    several objectives.

    Source: GP: log constrained expected improvement or hypervolume improvement, Matern 5/2 with a length scale per
    variable (Optuna's documentation of GPSampler); TPE: Watanabe and Hutter 2023 (constraints). Both take other
    workers' running trials into account.
    """
    kind = chosen_sampler(free, objectives, settings)
    startup = settings.startup or len(free) + 2
    if kind == "two stages":
        ((name, one),) = free.items()
        distribution = distribution_of(one)
        assert isinstance(distribution, FloatDistribution)
        return lambda number: DRUCBSampler(name, distribution, settings)
    if kind == "gp":
        return lambda number: GPSampler(seed=_seed(settings, number), n_startup_trials=startup)
    return lambda number: TPESampler(seed=_seed(settings, number), n_startup_trials=startup)


def _seed(settings: Settings, number: int) -> int:
    return (settings.seed * 1_000_003 + number) % 2**31
