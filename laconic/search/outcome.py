"""What a search found, as plain values: its trials, the best one measured from its file, and what it costs and
saves."""

import copy
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from laconic.disk.output import finite
from laconic.disk.state import plain_bytes
from laconic.disk.store import stored_bytes
from laconic.host.machine import machine, versions
from laconic.host.progress import Progress
from laconic.measure.candidate import Candidate
from laconic.measure.goals import Floor, Goal
from laconic.measure.layers import layers_table
from laconic.measure.objectives import nonzero_bytes_of
from laconic.methods.free import Free
from laconic.recover import Task
from laconic.scheme.filling import fix
from laconic.scheme.text import describe
from laconic.search import study as studies
from laconic.search.records import Best, Reference, SearchResult, Sizes
from laconic.search.trial import Trials


class Measured(NamedTuple):
    """The original with its score on test data, the trial that is delivered, and a row per layer."""

    reference: Reference
    best: Best
    layers: list[dict[str, Any]]


def figures_of(given: nn.Module, model: nn.Module, task: Task, goals: Sequence[Goal]) -> tuple[Sizes, list[float]]:
    """What is known of the original before the search: its sizes, its objectives. `model` is `given` in float32.

    Raises: SearchError for an objective that is not a finite number.
    """
    candidate = Candidate(given, copy.deepcopy(model), task.sample(), model)
    sizes = Sizes(plain_bytes(given), nonzero_bytes_of(given), sum(p.numel() for p in given.parameters()))
    return sizes, [goal(candidate) for goal in goals]


def result_of(
    search: studies.Search,
    trials: Trials,
    keep: Floor,
    free: Mapping[str, Free],
    facts: Mapping[str, Any],
    original: Reference,
    notes: Sequence[str],
    command: str,
) -> SearchResult:
    """Everything the search knows before its best trial is measured; numbers of trials that are not finite are None."""
    rows = []
    for t in studies.trials(search):
        objective = None if not t.values else t.values[0] if len(trials.goals) == 1 else list(t.values)
        rows.append(
            {
                "number": t.number,
                "values": dict(t.params),
                "objective": objective,
                "state": t.state.name.lower(),
                **t.user_attrs,
            }
        )
    rows = finite(rows)
    done = [row for row in rows if row["state"] == "complete"]
    goals = [{"name": goal.name, "direction": goal.direction} for goal in trials.goals]
    seen = dict.fromkeys(note for row in done for note in row.get("notes", []))
    return SearchResult(
        scheme=describe(trials.scheme),
        recovery=repr(trials.how),
        objective=goals[0] if len(goals) == 1 else goals,
        floor=facts["level"],
        keep=repr(keep),
        margin=facts["reference"] - facts["level"],
        reference=original,
        free={name: _bounds(one) for name, one in free.items()},
        trials=rows,
        noise=facts.get("noise", 0.0),
        notes=[*notes, *seen],
        cost={key: sum(row[key] for row in done) for key in ("minibatches", "cold_minibatches")},
        versions=versions(),
        machine=machine(),
        seed=trials.seed,
        command=command,
        pareto=[t.number for t in studies.pareto(search)] if len(goals) > 1 else None,
    )


def _bounds(free: Free) -> dict[str, Any]:
    return {"choices": list(free.choices)} if free.choices else {"low": free.low, "high": free.high, "log": free.log}


def best_of(search: studies.Search) -> Any:
    """The trial to deliver, or None: the best one; of a Pareto front, the one that is best for the first objective."""
    if len(search.objectives) == 1:
        return studies.best(search)
    sign = 1 if next(iter(search.objectives.values())) == "maximize" else -1
    return max(studies.pareto(search), key=lambda t: sign * t.values[0], default=None)


def folder_of(trial: Any) -> int:
    """The number of the folder that holds a trial's model: a result that came late is stored as another trial than it
    was begun as."""
    return int(trial.user_attrs.get("late", trial.number))


def nothing_kept(result: SearchResult) -> str:
    """What to say when no trial kept the floor."""
    if not any(row["state"] == "complete" for row in result.trials):
        return "no trial was finished: allow more time or trials, and go on with the study (resume)"
    scores = [(row["score"], row["values"]) for row in result.trials if row.get("score") is not None]
    if not scores:
        return "training diverged in every trial: lower the learning rate of the recovery"
    score, values = max(scores, key=lambda pair: pair[0])
    best = f"the best of {len(scores)} has {score:.4f}, at {values}"
    return f"no trial kept the floor {result.floor:.4f}: {best}. Recover longer, or allow more loss"


def measure(trials: Trials, best: Any, original: Reference, progress: Progress) -> tuple[nn.Module, Measured]:
    """The best trial's model, read from its file, and the figures of it, of direct compression and of its layers; test
    data is used here only."""
    progress.start("measuring", 4)
    model, task = trials.model, trials.task
    path = trials.place(folder_of(best)) / "model"
    delivered = trials.reload(folder_of(best), best.params)
    candidate = trials.candidate(delivered, path)
    found = task.judge(delivered, task.validation)
    progress.advance(1, "validation")
    stored, nonzero = stored_bytes(path), nonzero_bytes_of(delivered)
    figures = Best(
        trial=best.number,
        values=dict(best.params),
        score=found.score,
        objective=best.values[0] if len(trials.goals) == 1 else list(best.values),
        stored_bytes=stored,
        nonzero_bytes=nonzero,
        parameters=sum(p.numel() for p in candidate.network.parameters()),
        ratio=original.stored_bytes / stored,
        nonzero_ratio=original.nonzero_bytes / nonzero,
    )
    if task.test is not None:
        original = replace(original, test_score=task.judge(model, task.test).score)
        progress.advance(1, "the original on test data")
        figures = replace(figures, test_score=task.judge(delivered, task.test).score)
        progress.advance(1, "the compressed model on test data")
        direct = trials.direct(fix(trials.scheme, best.params, trials.slots))[0]
        figures = replace(figures, direct_test_score=task.judge(direct, task.test).score)
        progress.advance(1, "direct compression on test data")
    return delivered, Measured(original, figures, layers_table(model, candidate.network, task.sample()))


def deliver(source: Path, target: Path) -> None:
    """Copy a folder to where an earlier one may be, whole or not at all; another worker may be doing the same."""
    fresh = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    for last in (False,) * _RACES + (True,):
        shutil.rmtree(target, ignore_errors=True)
        try:
            fresh.rename(target)
            return
        except OSError as error:
            if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


_RACES = 5
