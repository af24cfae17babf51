"""`search`: the order of things in a search for free hyper-parameters. Trials are `trial.py`'s, the choice of the next one `study.py`'s."""

import copy
import shutil
import statistics as means
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from laconic.blocks import Batch
from laconic.errors import SearchError
from laconic.machine import machine, versions
from laconic.methods.base import Keep
from laconic.methods.free import Free, fix, free_of
from laconic.objectives import Candidate, Floor, Maximize, Minimize, nonzero_bytes_of, within
from laconic.passes import allocations, needs_of
from laconic.profile import layers_table
from laconic.progress import Log, Progress
from laconic.recover import LC, Task
from laconic.recover.call import How, first_batches
from laconic.run import disk_errors
from laconic.scheme import Scheme, describe, parse, resolve
from laconic.search.report import write_search_report
from laconic.search.trial import Neighbour, Trials, nearest
from laconic.sites import Stats, find_slots
from laconic.store import stored_bytes

if TYPE_CHECKING:
    import optuna

Goal = Maximize | Minimize


@dataclass(frozen=True)
class SearchOptions:
    """How a search is carried out.

    At most `trials` trials, shared by all workers on one storage; `minutes` of wall-clock time for this worker, after which the trial under
    way ends with the best it has. `storage` is an SQLite file or database URL, by default `study.db` in the search's folder; `name` is the
    study's. `warm_share`: a trial starts from the nearest finished one that kept the floor and takes this share of the L-steps (None: every
    trial starts from the original). `early_stop` gives a trial up that can no longer reach the floor. `thin` removes cut channels for good;
    without it they stay as zeros. `sampler`: "auto", "drucb", "gp" or "tpe". `resume` goes on with the study in the storage.
    """

    trials: int = 10
    minutes: float | None = None
    storage: str | Path | None = None
    name: str = "search"
    warm_share: float | None = 0.5
    early_stop: bool = True
    thin: bool = True
    sampler: str = "auto"
    resume: bool = False
    seed: int = 0
    command: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found: the compressed model, read back from its file; the free values s*; the Optuna study; every figure.

    `model` has Weights installed (and is smaller than the original where channels were cut); `path` is the folder it is stored in.
    """

    model: nn.Module
    values: dict[str, Any]
    study: "optuna.Study"
    result: dict[str, Any]
    path: Path


def search(
    model: nn.Module, scheme: Scheme | str, *, objective: Goal | Sequence[Goal], keep: Floor | None = None, recover: How | None = None,
    train: Iterable[Batch], validation: Iterable[Batch], test: Iterable[Batch] | None = None, loss: Any = None, score: Any = None,
    example: Batch | None = None, out: str | Path = "search", progress: Progress | None = None, **options: Any,
) -> Found:  # fmt: skip
    """Find the values of a scheme's `Free` hyper-parameters that serve an objective best while the validation score keeps a floor.

    Stage 1 finds the largest sparsity whose recovered score is at least `keep.floor(reference score)`, stage 2 optimises the objective below
    it. `train` is for recovery, `validation` decides everything, `test` is measured once at the end. `options` are those of SearchOptions.
    Models, the study and the report go to the folder `out`. The module given is not changed.
    Raises: SchemeError, DataError, SearchError (nothing free, a floor that the original or every trial misses, an objective that is not a
    number, a storage that does not answer), SurgeryError. Source: Condensa sections 3.2 to 3.4, listing 1.
    """
    task = Task(train, validation, test, loss, score, example)
    goals = (objective,) if isinstance(objective, Maximize | Minimize) else tuple(objective)
    return search_task(model, scheme, task, goals, keep or within(0.02), recover or LC(), Path(out), SearchOptions(**options), progress or Log())


def search_task(
    model: nn.Module, scheme: Scheme | str, task: Task, goals: tuple[Goal, ...], keep: Floor, how: How, out: Path, options: SearchOptions,
    progress: Progress,
) -> Found:  # fmt: skip
    """`search` for a Task."""
    from laconic.search import study as studies
    from laconic.search.drucb import Rule
    from laconic.search.samplers import Settings

    began = time.time()
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    slots = find_slots(model)
    free = free_of(scheme, slots)
    if not free:
        raise SearchError(f"{describe(scheme)}: nothing to search; leave a hyper-parameter open, as in FilterPrune(sparsity=Free(0, 1))")
    if len({goal.name for goal in goals}) != len(goals) or not goals:
        raise SearchError(f"expected one or more objectives of different names, got {[goal.name for goal in goals]}")
    task = task.checked()
    model = copy.deepcopy(model).float().eval()
    reference, again = (task.judge(model, task.validation) for _ in range(2))
    noise = abs(reference.score - again.score)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    settings = Settings(sampler=options.sampler, trials=options.trials, seed=options.seed, rule=Rule(margin=noise))  # type: ignore[arg-type]
    about = {"scheme": describe(scheme), "keep": repr(keep), "recovery": repr(how), "parameters": sum(p.numel() for p in model.parameters())}
    study = studies.open_study(
        options.storage or out / "study.db", options.name, free=free, objectives={goal.name: goal.direction for goal in goals},
        settings=settings, about=about, resume=options.resume,
    )  # fmt: skip
    facts = studies.set_reference(study, level=keep.floor(reference.score), reference=reference.score, noise=noise)
    trials = Trials(
        model, scheme, how, task, goals, out, facts["reference"], facts["level"], _coupling(model, scheme, free, task, progress),
        first_batches(task, options.seed), options.thin, options.warm_share, options.early_stop, {"scheme": describe(scheme)}, options.seed, slots,
    )  # fmt: skip
    notes = [f"the score differs by {noise:.3g} when measured twice on the original: it is not deterministic"] if noise else []
    notes += _run_trials(study, trials, options, began, progress)
    result = _result(study, trials, keep, free, facts, options, notes) | {"seconds": time.time() - began}
    best = studies.best(study) if len(goals) == 1 else _first_of(studies.pareto(study), goals[0])
    if best is None:
        write_search_report(out, result)
        raise SearchError(_nothing_kept(result))
    delivered, figures = _measure(trials, best, progress)
    result |= figures | {"seconds": time.time() - began}
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(trials.place(best.number) / "model", out / "model")
    write_search_report(out, result)
    return Found(delivered, dict(best.params), study.study, result, out / "model")


def _coupling(model: nn.Module, scheme: Scheme, free: dict[str, Free], task: Task, progress: Progress) -> Any:
    """The network's channels, if the scheme cuts any."""
    slots = find_slots(model)
    fixed = fix(scheme, {name: one.choices[0] if one.choices else one.high if one.integer else _middle(one) for name, one in free.items()}, slots)
    chosen = {slot: method for slot, method in resolve(fixed, slots).items() if not isinstance(method, Keep)}
    wanted = [*needs_of(chosen).values(), *(allocation.wants for allocation in allocations(chosen).values())]
    if not any(need & Stats.CHANNELS for need in wanted):
        return None
    from laconic.surgery import couple

    coupling = couple(model, task.sample())
    for line in coupling.refused:
        progress.say(f"not cut: {line}")
    return coupling


def _middle(free: Free) -> float:
    assert free.low is not None
    assert free.high is not None
    return (free.low + free.high) / 2


def _run_trials(study: Any, trials: Trials, options: SearchOptions, began: float, progress: Progress) -> list[str]:
    """Ask, carry out and tell until the search is over or its time is up; returns what the user should know."""
    from laconic.search import study as studies

    deadline = began + 60 * options.minutes if options.minutes is not None else None
    lasted: list[float] = []
    while True:
        left = deadline - time.time() if deadline is not None else float("inf")
        if left < _WORTHWHILE * (means.median(lasted) if lasted else 0.0) or left <= 0:
            return [f"the search ended after its {options.minutes:g} minutes, with {len(studies.trials(study))} trials of {options.trials}"]
        asked = studies.ask(study)
        if asked is None:
            return []
        with studies.running(study, asked):
            finished = [t for t in studies.trials(study) if "score" in t.user_attrs]
            neighbour = nearest(asked.values, _neighbours(finished, trials)) if options.warm_share is not None else None
            record = trials.run(asked.number, asked.values, neighbour, [t.user_attrs["curve"] for t in finished], deadline, progress)
        score, objectives = record.pop("score"), record.pop("objectives")
        studies.tell(study, asked, score, objectives, **record)
        lasted.append(record["seconds"])
        progress.say(_line(asked, record, score, objectives, trials))


_WORTHWHILE = 0.3  # of a trial's usual time must be left for another to begin


def _neighbours(finished: Sequence[Any], trials: Trials) -> list[Neighbour]:
    """The original, and the finished trials that kept the floor (others have lost what a milder compression needs) and whose state is here."""
    kept = [t for t in finished if t.user_attrs["score"] >= trials.floor and trials.state(t.number).is_file()]
    return [Neighbour(None, {}, None), *(Neighbour(t.number, dict(t.params), trials.state(t.number)) for t in kept)]


def _line(asked: Any, record: dict[str, Any], score: float, objectives: Sequence[float], trials: Trials) -> str:
    values = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in asked.values.items())
    goals = ", ".join(f"{goal.name} {value:.5g}" for goal, value in zip(trials.goals, objectives, strict=True))
    kept = "keeps" if score >= trials.floor else "misses"
    start = "the original" if record["warm_from"] is None else f"trial {record['warm_from'] + 1}"
    return (
        f"trial {asked.number + 1}: {values}: score {score:.4f} {kept} the floor {trials.floor:.4f}, {goals}; "
        f"{record['minibatches']} minibatches from {start}{', given up early' if record['stopped_early'] else ''}, {record['seconds']:.0f} s"
    )


def _result(
    study: Any, trials: Trials, keep: Floor, free: dict[str, Free], facts: dict[str, Any], options: SearchOptions, notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    """Everything the search knows, as plain values."""
    from laconic.search import study as studies

    rows = []
    for t in studies.trials(study):
        told = {key: value for key, value in t.user_attrs.items() if key not in ("failure",)}
        objective = None if not t.values else t.values[0] if len(trials.goals) == 1 else list(t.values)
        rows.append({"number": t.number, "values": dict(t.params), "objective": objective, "state": t.state.name.lower(), **told})
        rows[-1] |= {"failure": t.user_attrs["failure"]} if "failure" in t.user_attrs else {}
    done = [row for row in rows if row["state"] == "complete"]
    goals = [{"name": goal.name, "direction": goal.direction} for goal in trials.goals]
    seen = dict.fromkeys(note for row in done for note in row.get("notes", []))
    return {
        "scheme": describe(trials.scheme), "recovery": repr(trials.how), "objective": goals[0] if len(goals) == 1 else goals,
        "floor": facts["level"], "keep": repr(keep), "margin": facts["reference"] - facts["level"], "reference": {"score": facts["reference"]},
        "free": {name: _bounds(one) for name, one in free.items()}, "trials": rows, "noise": facts.get("noise", 0.0),
        "notes": [*notes, *seen], "seed": options.seed,
        "cost": {key: sum(row[key] for row in done) for key in ("minibatches", "cold_minibatches")},
        "command": options.command, "versions": versions(), "machine": machine(),
    } | ({"pareto": [t.number for t in studies.pareto(study)]} if len(goals) > 1 else {})  # fmt: skip


def _bounds(free: Free) -> dict[str, Any]:
    return {"choices": list(free.choices)} if free.choices else {"low": free.low, "high": free.high, "log": free.log}


def _first_of(front: Sequence[Any], goal: Goal) -> Any:
    """Of a Pareto front, the trial that is best for the first objective, or None."""
    sign = 1 if goal.direction == "maximize" else -1
    return max(front, key=lambda t: sign * t.values[0], default=None)


def _nothing_kept(result: dict[str, Any]) -> str:
    scores = [(row["score"], row["values"]) for row in result["trials"] if "score" in row]
    if not scores:
        return "no trial was finished: allow more time or trials"
    score, values = max(scores, key=lambda pair: pair[0])
    return (
        f"no trial kept the floor {result['floor']:.4f}: the best of {len(scores)} has {score:.4f}, at {values}. Recover longer, or allow more loss"
    )


def _measure(trials: Trials, best: Any, progress: Progress) -> tuple[nn.Module, dict[str, Any]]:
    """The best trial's model, read from its file, and the figures of the original, of direct compression and of it."""
    progress.start("measuring", 4)
    model, task = trials.model, trials.task
    delivered = trials.reload(best.number)
    path = trials.place(best.number) / "model"
    candidate = trials.candidate(delivered, path)
    original = Candidate(model, copy.deepcopy(model), task.sample(), model)
    found = task.judge(delivered, task.validation)
    progress.advance(1, "validation")
    reference: dict[str, Any] = {
        "score": task.judge(model, task.validation).score, "stored_bytes": _plain_bytes(model), "nonzero_bytes": nonzero_bytes_of(model),
        "parameters": sum(p.numel() for p in model.parameters()), "objective": [goal(original) for goal in trials.goals],
    }  # fmt: skip
    figures: dict[str, Any] = {
        "trial": best.number, "values": dict(best.params), "score": found.score, "objective": list(best.values),
        "stored_bytes": stored_bytes(path), "nonzero_bytes": nonzero_bytes_of(delivered),
        "parameters": sum(p.numel() for p in candidate.network.parameters()),
    }  # fmt: skip
    figures |= {"ratio": reference["stored_bytes"] / figures["stored_bytes"], "nonzero_ratio": reference["nonzero_bytes"] / figures["nonzero_bytes"]}
    if task.test is not None:
        reference["test_score"] = task.judge(model, task.test).score
        progress.advance(1, "the original on test data")
        figures["test_score"] = task.judge(delivered, task.test).score
        progress.advance(1, "the compressed model on test data")
        direct = trials.direct(fix(trials.scheme, best.params, trials.slots))[0]
        figures["direct_test_score"] = task.judge(direct, task.test).score
    if len(trials.goals) == 1:
        reference["objective"], figures["objective"] = reference["objective"][0], figures["objective"][0]
    layers = layers_table(model, candidate.network, task.sample())
    return delivered, {"reference": reference, "best": figures, "layers": layers}


def _plain_bytes(model: nn.Module) -> int:
    """Bytes of the original's tensors, each once."""
    return sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())
