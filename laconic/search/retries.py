"""Trials that are run again: of workers that died, were interrupted, or had no time left."""

from collections.abc import Callable
from datetime import datetime, timedelta

import optuna
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from laconic.errors import SearchError
from laconic.search.storage import interval_of

_RETRIES = 2  # a trial that has taken three workers down is not given to a fourth
_KEPT = ("stage", "domain", "posterior")  # of a trial that is run again: what its values were chosen by


def reclaim(study: optuna.Study, storage: BaseStorage) -> None:
    """Fail the trials of workers that have fallen silent, and put up the values of those that were lost to be run
    again, once each.
    """
    interval = interval_of(storage)
    if interval is None:
        return
    fail_stale_trials(study)  # calls `again` for each
    since = datetime.now() - timedelta(seconds=2 * interval)
    for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # died before its first heartbeat
        if not lost.params and lost.datetime_start is not None and lost.datetime_start < since:
            storage.set_trial_state_values(lost._trial_id, TrialState.FAIL)


def reclaim_all(study: optuna.Study, storage: BaseStorage, progressed: Callable[[FrozenTrial], bool]) -> None:
    """As `reclaim`, at once and for every trial that runs: for a worker that knows that it is the only one.

    A death after which a trial has `progressed` is not held against it.
    """
    for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_state_values(lost._trial_id, TrialState.FAIL)
        again(study, lost, died=not progressed(lost))


def again(study: optuna.Study, trial: FrozenTrial, died: bool = True) -> None:
    """Put the values of a trial up to be run again."""
    if not trial.params:
        return
    kept = {key: trial.user_attrs[key] for key in _KEPT if key in trial.user_attrs}
    deaths = trial.user_attrs.get("deaths", 0) + died
    if deaths > _RETRIES:
        raise SearchError(
            f"trial {trial.number} at {trial.params} has ended {deaths} workers; see their logs (out of memory?)"
        )
    kept |= {"deaths": deaths, "retry_of": trial.number}
    study.add_trial(
        create_trial(state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, user_attrs=kept)
    )


def attempts(study: optuna.Study, trial: FrozenTrial) -> tuple[int, ...]:
    """The trials that a trial repeats, the last one first."""
    earlier = {t.number: t.user_attrs.get("retry_of") for t in study.get_trials(deepcopy=False)}
    numbers: list[int] = []
    number = trial.user_attrs.get("retry_of")
    while number is not None:
        numbers.append(number)
        number = earlier.get(number)
    return tuple(numbers)
