"""A search as an Optuna study: stored, resumed, shared by several workers, and shown by optuna-dashboard."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from laconic.errors import OutputError, SearchError
from laconic.methods.free import Free
from laconic.search.retries import again, attempts, reclaim, reclaim_all
from laconic.search.samplers import MEASURED, Settings, SharedSampler, chosen_sampler, distribution_of, plan, sampler_of
from laconic.search.storage import address, answering, beat, beating, check_fingerprint, connect, exists_already, quiet

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Search:
    """An open study. `objectives`: their names and directions. `place`: the storage's address without its password."""

    study: optuna.Study
    storage: BaseStorage
    free: Mapping[str, Free]
    objectives: Mapping[str, Direction]
    settings: Settings
    place: str

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: distribution_of(free) for name, free in self.free.items()}

    @property
    def facts(self) -> dict[str, Any] | None:
        """What `set_reference` stored, or None: level, reference, and whatever else."""
        with answering(self.place):
            return self.study.user_attrs.get("facts")


@dataclass(frozen=True)
class Asked:
    """A trial to run: its number, the values of the free hyper-parameters, the stage of the search (None for Optuna's
    samplers), and the numbers of the interrupted trials that it repeats, the last one first.
    """

    number: int
    values: dict[str, Any]
    stage: int | None
    trial: Trial
    attempts: tuple[int, ...] = ()


def open_study(
    storage: str | Path | None,
    name: str,
    *,
    free: Mapping[str, Free],
    objectives: Mapping[str, Direction],
    settings: Settings | None = None,
    about: Mapping[str, Any] | None = None,
    resume: bool = True,
    heartbeat: int = 60,
) -> Search:
    """Create a study, or open the one of that name again, alone or beside other workers.

    `storage`: a path (an SQLite file, made with its folder), the address of any database SQLAlchemy knows, or None for
    memory. `about`: what else makes the search what it is (the scheme's text, the floor, the data); it is stored with
    the free values, objectives and settings, and has to be the same on every later opening. Only `settings.trials` and
    the rule's margin may change. A worker says every `heartbeat` seconds that it lives; after twice that in silence its
    trial is run again by another.
    Raises: SearchError for a storage that does not answer or is no database, for a study of that name which is another
    search (with what differs) or which exists when `resume` is False, and as `chosen_sampler` does.
    """
    settings = settings or Settings()
    sampler = chosen_sampler(free, len(objectives), settings)
    if not objectives or any(direction not in ("maximize", "minimize") for direction in objectives.values()):
        raise SearchError(f"expected objectives, each to maximize or minimize, got {dict(objectives)}")
    url, place = address(storage)
    with answering(place), quiet():
        opened = connect(url, place, heartbeat, again)
        shared = SharedSampler(sampler_of(free, len(objectives), settings), lambda trial_id: beat(opened, trial_id))
        try:
            study = optuna.create_study(
                storage=opened,
                study_name=name,
                directions=list(objectives.values()),
                sampler=shared,
                load_if_exists=resume,
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise exists_already(place, name) from error
        how = asdict(settings) | {"sampler": sampler}
        del (
            how["trials"],
            how["rule"]["margin"],
        )  # the one may grow, the other is measured noise and differs each time it is measured
        mine = {
            "free": {key: repr(value) for key, value in free.items()},
            "objectives": dict(objectives),
            "settings": how,
            **(about or {}),
        }
        check_fingerprint(study, mine, place)
    return Search(study, opened, free=dict(free), objectives=dict(objectives), settings=settings, place=place)


def set_reference(search: Search, *, level: float, reference: float, **facts: Any) -> dict[str, Any]:
    """Store the score's floor L and the uncompressed model's score, with other facts as JSON, and return what is
    stored.

    A fact "noise", by how much two scores of one model differ, is the least margin of stage 1's rule.
    The first worker's facts hold for all: measured a second time they may differ by noise, and the samples would
    disagree about the level.
    Raises: SearchError when a number is not finite, or the reference is below its own floor.
    """
    if not (math.isfinite(level) and math.isfinite(reference)) or reference < level:
        raise SearchError(f"the score's floor {level} is not reached by the uncompressed model, which has {reference}")
    with answering(search.place):
        if search.facts is None:
            search.study.set_user_attr("facts", {"level": level, "reference": reference, **facts})
        stored = search.facts
    assert stored is not None
    return stored


def ask(search: Search, poll: float = 2.0, until: float = math.inf) -> Asked | None:
    """The next trial to run, or None when the search is over.

    A trial whose worker died comes first. While other workers hold the last trials this one waits, looking every `poll`
    seconds, because it takes over from one that dies; at the time `until` (of time.time()) it gives up and returns
    None.
    Raises: SearchError when the storage fails, when there is no level yet, and for a trial that took three workers
    down.
    """
    while time.time() < until:
        with answering(search.place), quiet():
            reclaim(search.study, search.storage)
            state = _state(search)
            if state == "over":
                return None
            if state == "go":
                trial = search.study.ask(fixed_distributions=search.distributions)
                # the one at hand does not know what the sampler noted
                stored = search.storage.get_trial(trial._trial_id)
                ahead = [
                    t
                    for t in search.study.get_trials(deepcopy=False)
                    if t.number < trial.number and t.state in (*MEASURED, TrialState.RUNNING)
                ]
                if len(ahead) < search.settings.trials:
                    return Asked(
                        trial.number,
                        dict(stored.params),
                        stored.user_attrs.get("stage"),
                        trial,
                        attempts(search.study, stored),
                    )
                trial.set_user_attr("failure", "one more than the search takes: two workers asked at once")
                search.study.tell(trial, state=TrialState.FAIL)
        time.sleep(max(0.0, min(poll, until - time.time())))
    return None


def take_over(search: Search, progressed: Callable[[FrozenTrial], bool]) -> None:
    """Put up every trial that runs to be run again, now: nobody else works on this study. `progressed`: whether a trial
    left more than it found.
    """
    with answering(search.place), quiet():
        reclaim_all(search.study, search.storage, progressed)


def finished(search: Search) -> bool:
    """Whether the search is over: it has had its trials, or nothing is left to learn. Trials that other workers run
    keep it open.
    """
    with answering(search.place), quiet():
        return _state(search) == "over"


@contextmanager
def running(search: Search, asked: Asked, failed: Callable[[], None] | None = None) -> Iterator[None]:
    """Around the work on a trial: tells the other workers that this one lives, and what became of the trial if the work
    does not end.

    Interrupted (Ctrl-C, exit, a full disk), the trial is put back to be run again; after an error it is stored as
    failed, with the reason, and `failed` is called.
    """
    try:
        with beating(search.storage, asked.trial._trial_id):
            yield
    except (KeyboardInterrupt, SystemExit, OutputError):
        give_back(search, asked)
        raise
    except BaseException as error:
        fail(search, asked, f"{type(error).__name__}: {error}")
        if failed is not None:
            failed()
        raise


def tell(search: Search, asked: Asked, score: float, objectives: Sequence[float], **attributes: Any) -> None:
    """Store a trial's result: the objectives are the study's values, the floor minus the score its constraint
    (feasible up to 0).

    `score`: higher is better; -inf for a run that diverged. `attributes` are stored as user attributes, as JSON. A
    result that comes after another worker took the trial over is stored as a trial of its own.
    Raises: SearchError naming the objective (or the score) that is not a number, after the trial is stored as failed.
    """
    facts = search.facts
    if facts is None:
        raise SearchError("a result needs a floor to be judged by: call set_reference first")
    score, objectives = float(score), [float(value) for value in objectives]
    try:
        check_numbers(search, asked, score, objectives)
    except SearchError as error:
        fail(search, asked, str(error))
        raise
    attributes = {**attributes, "score": score}
    excess = facts["level"] - score
    with answering(search.place), quiet():
        if _stored(search, asked).state is not TrialState.RUNNING:
            _add_late(search, asked, objectives, attributes, excess)
            return
        for key, value in attributes.items():
            asked.trial.set_user_attr(key, value)
        asked.trial.set_constraint("score", excess)
        search.study.tell(asked.trial, objectives)


def check_numbers(search: Search, asked: Asked, score: float, objectives: Sequence[float]) -> None:
    """Raises: SearchError naming the objective (or the score) that is not a number."""
    for name, value in zip(("score", *search.objectives), (score, *objectives), strict=True):
        if math.isnan(value) or (name != "score" and math.isinf(value)):
            what = "the score" if name == "score" else f"the objective {name!r}"
            raise SearchError(f"{what} is {value} at {asked.values}; expected a finite number")


def fail(search: Search, asked: Asked, reason: str) -> None:
    """Store a trial as failed. The search goes on as if it had not been."""
    with answering(search.place), quiet():
        if _stored(search, asked).state is TrialState.RUNNING:
            asked.trial.set_user_attr("failure", reason)
            search.study.tell(asked.trial, state=TrialState.FAIL)


def give_back(search: Search, asked: Asked, reason: str = "interrupted") -> None:
    """Store a trial as failed and put its values up to be run again, by this worker or another."""
    fail(search, asked, reason)
    with answering(search.place):
        again(search.study, _stored(search, asked), died=False)


def best(search: Search) -> FrozenTrial | None:
    """The trial with the best objective among those that keep the floor, the latest of equal ones, or None.

    Raises: SearchError for several objectives, which have no single best: see `pareto`.
    """
    if len(search.objectives) != 1:
        raise SearchError(f"{len(search.objectives)} objectives have no single best trial; see the Pareto front")
    feasible = [t for t in trials(search) if is_feasible(t)]
    sign = 1 if search.study.direction is StudyDirection.MAXIMIZE else -1
    return max(feasible, key=lambda t: (sign * t.values[0], t.number), default=None)


def pareto(search: Search) -> list[FrozenTrial]:
    """The trials that keep the floor and are not worse in all objectives than another that does, by number."""
    with answering(search.place):
        return sorted((t for t in search.study.best_trials if is_feasible(t)), key=lambda t: t.number)


def trials(search: Search) -> list[FrozenTrial]:
    """Every trial of the study, by number; failed, running and waiting ones too."""
    with answering(search.place):
        return search.study.get_trials(deepcopy=False)


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a trial was measured and keeps the score's floor."""
    return trial.state is TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def _state(search: Search) -> Literal["go", "wait", "over"]:
    found = search.study.get_trials(deepcopy=False)
    done = sum(t.state in MEASURED for t in found)
    busy = sum(t.state is TrialState.RUNNING for t in found)
    if done >= search.settings.trials:
        return "over"
    if done + busy >= search.settings.trials:
        return "wait"
    if any(t.state is TrialState.WAITING for t in found):
        return "go"
    if search.facts is None:
        raise SearchError("stage 1 needs a level: call set_reference first")
    if chosen_sampler(search.free, len(search.objectives), search.settings) != "two stages":
        return "go"
    ((name, distribution),) = search.distributions.items()
    assert isinstance(distribution, FloatDistribution)
    maximize = search.study.direction is StudyDirection.MAXIMIZE
    proposal = plan(found, name, distribution, search.facts, maximize, search.settings)[1]
    if proposal.exhausted and not busy:
        return "over"
    return "wait" if proposal.exhausted or proposal.wait else "go"


def _add_late(search: Search, asked: Asked, values: list[float], attributes: Mapping[str, Any], excess: float) -> None:
    old = _stored(search, asked)
    told = {**old.user_attrs, **attributes, "late": asked.number}
    search.study.add_trial(
        create_trial(
            values=values,
            params=old.params,
            distributions=old.distributions,
            user_attrs=told,
            constraints={"score": excess},
        )
    )


def _stored(search: Search, asked: Asked) -> FrozenTrial:
    return search.storage.get_trial(asked.trial._trial_id)
