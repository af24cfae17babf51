"""`search`: the order of things in a search for free hyper-parameters. Trials are `trial.py`'s, the choice of the next
one `study.py`'s."""

import copy
import math
import statistics as means
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from laconic.disk.files import disk_errors
from laconic.disk.lock import alone, locked
from laconic.disk.ours import SEARCH_HTML
from laconic.disk.output import finite
from laconic.disk.state import half_types
from laconic.disk.tensors import checksum_of
from laconic.engine.resolve import resolve
from laconic.errors import SearchError
from laconic.host.ambient import undisturbed
from laconic.host.progress import Progress
from laconic.measure.goals import Floor, Goal
from laconic.methods.free import Free
from laconic.model.sites import find_slots
from laconic.recover import Recovery, Task
from laconic.recover.call import first_batches
from laconic.recover.curve import Point
from laconic.scheme.filling import fix
from laconic.scheme.text import Scheme, describe, parse
from laconic.search.checks import STUDY, check_first, check_folder, clear_folder, original_score, remarks, some_value
from laconic.search.neighbours import Neighbour, nearest
from laconic.search.options import SearchOptions
from laconic.search.records import Reference, TrialRecord
from laconic.search.result import Draw, publish
from laconic.search.trial import Trials

if TYPE_CHECKING:
    import optuna

    from laconic.search.study import Search

# of the loss that is allowed: a warm-started trial less than this below the floor might keep it from a better start, so
# it closes nothing alone
_DOUBT = 0.15
_WORTHWHILE = 0.3  # of a trial's usual time must be left for another to begin


@dataclass(frozen=True)
class Found:
    """What a search found: the compressed model, read back from its file; the free values s*; the Optuna study; every
    figure.

    `model` has Weights installed (and is smaller than the original where channels were cut); `path` is the folder it is
    stored in, `report` the page with all figures and pictures.
    """

    model: nn.Module
    values: dict[str, Any]
    study: "optuna.Study"
    result: dict[str, Any]
    path: Path
    report: Path


@undisturbed()
def run_search(
    model: nn.Module,
    scheme: Scheme | str,
    task: Task,
    goals: tuple[Goal, ...],
    keep: Floor,
    how: Recovery,
    out: Path,
    options: SearchOptions,
    progress: Progress,
    draw: Draw,
) -> Found:
    """Carry out a search in a folder; `draw` makes a page of its result, also of one in which nothing kept the
    floor."""
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    check_first(model, scheme, goals=goals, keep=keep, how=how, out=out, options=options)
    with locked(out, shared=True):
        return _search(
            model,
            scheme,
            task=task,
            goals=goals,
            keep=keep,
            how=how,
            out=out,
            options=options,
            progress=progress,
            draw=draw,
        )


def _search(
    model: nn.Module,
    scheme: Scheme,
    task: Task,
    goals: tuple[Goal, ...],
    keep: Floor,
    how: Recovery,
    out: Path,
    options: SearchOptions,
    progress: Progress,
    draw: Draw,
) -> Found:
    """`run_search` in a folder that is ours and other workers'."""
    from laconic.search import outcome

    began = time.time()
    slots, free = (
        find_slots(model),
        check_first(model, scheme, goals=goals, keep=keep, how=how, out=out, options=options),
    )
    how = how.over(task.train)
    task, given, model = task.checked(), model, copy.deepcopy(model).float().eval()
    reference, noise = original_score(model, task, keep)
    sizes, standards = outcome.figures_of(given, model, task, goals)
    coupling, notes = _coupling(model, scheme, free=free, task=task, thin=options.thin, progress=progress)
    study, facts = _study(
        out,
        scheme,
        free=free,
        goals=goals,
        keep=keep,
        how=how,
        options=options,
        model=model,
        reference=reference,
        noise=noise,
        standards=standards,
    )
    objective = facts["objectives"][0] if len(goals) == 1 else facts["objectives"]
    original = Reference(**sizes.to_json(), score=facts["reference"], objective=objective)
    trials = Trials(
        model=model,
        scheme=scheme,
        how=how,
        task=task,
        goals=goals,
        folder=out,
        reference=facts["reference"],
        floor=facts["level"],
        standards=facts["objectives"],
        coupling=coupling,
        statistics=first_batches(task, options.seed),
        thin=options.thin,
        warm_share=options.warm_share,
        early_stop=options.early_stop,
        fields={"scheme": describe(scheme)},
        seed=options.seed,
        slots=slots,
        types=half_types(given),
    )
    check_folder(study, trials)
    _after_a_kill(study, trials, options)
    notes += remarks(facts, reference, noise)
    notes += _run_trials(study, trials, options, began, progress)
    result = outcome.result_of(
        study, trials, keep=keep, free=free, facts=facts, original=original, notes=notes, command=options.command
    )
    best = outcome.best_of(study)
    if best is None:
        publish(out, finite(replace(result, seconds=time.time() - began).to_json()), draw)
        raise SearchError(outcome.nothing_kept(result))
    delivered, figures = outcome.measure(trials, best, original, progress)
    result = replace(result, best=figures.best, layers=figures.layers, reference=figures.reference)
    if figures.best.score < facts["level"]:
        result.notes.append(
            f"measured once more, the chosen model scores {figures.best.score:.6g}, less than the floor: "
            "the score is noisy"
        )
    _after_a_kill(study, trials, options)
    with disk_errors(out):
        outcome.deliver(trials.place(outcome.folder_of(best)) / "model", out / "model")
        told = finite(replace(result, seconds=time.time() - began).to_json())
        publish(out, told, draw)
    return Found(
        delivered,
        dict(best.params),
        study=study.study,
        result=told,
        path=out / "model",
        report=out / SEARCH_HTML,
    )


def _study(
    out: Path,
    scheme: Scheme,
    free: Mapping[str, Free],
    goals: Sequence[Goal],
    keep: Floor,
    how: Recovery,
    options: SearchOptions,
    model: nn.Module,
    reference: float,
    noise: float,
    standards: Sequence[float],
) -> tuple["Search", dict[str, Any]]:
    """The study and what its first worker found of the original. Only here does the search begin to write."""
    from laconic.search import study as studies
    from laconic.search.drucb import Rule
    from laconic.search.samplers import Settings

    level = keep.floor(reference)
    warm = options.warm_share is not None and how.warmed(options.warm_share) is not None
    doubt = _DOUBT * (reference - level) if warm else 0.0
    settings = Settings(
        sampler=options.sampler,  # type: ignore[arg-type]
        trials=options.trials,
        seed=options.seed,
        rule=Rule(margin=doubt),
    )
    with disk_errors(out):
        if options.overwrite:
            with locked(out):
                clear_folder(out)
    about = {
        "scheme": describe(scheme),
        "keep": repr(keep),
        "recovery": repr(how),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checksum": checksum_of(model.state_dict()),
    }
    search = studies.open_study(
        options.storage or out / STUDY,
        options.name,
        free=free,
        objectives={goal.name: goal.direction for goal in goals},
        settings=settings,
        about=about,
        resume=options.resume,
        heartbeat=options.heartbeat,
    )
    return search, studies.set_reference(
        search, level=level, reference=reference, noise=noise, objectives=list(standards)
    )


def _after_a_kill(study: "Search", trials: Trials, options: SearchOptions) -> None:
    """Take over from dead workers without waiting for their silence, and remove what they left half done, where nobody
    else is at work.

    Only of a study that is kept in the search's own folder is it known who works on it: the folder's lock says so.
    """
    from laconic.search import study as studies
    from laconic.search.remnants import progressed, remove_remnants

    if options.storage is not None:
        return
    with alone(trials.folder) as only:
        if only:
            studies.take_over(study, partial(progressed, trials))
            with disk_errors(trials.folder):
                remove_remnants(trials, studies.trials(study))


def _coupling(
    model: nn.Module, scheme: Scheme, free: Mapping[str, Free], task: Task, thin: bool, progress: Progress
) -> tuple[Any, list[str]]:
    """The network's channels, if the scheme cuts any; and what to say of them. Without thinning, masks will do where
    nothing can be traced."""
    slots = find_slots(model)
    fixed = fix(scheme, {name: some_value(one) for name, one in free.items()}, slots)
    if not resolve(fixed, slots).structures:
        return None, []
    from laconic.surgery import couple, couple_or_mask

    coupling = couple(model, task.sample()) if thin else couple_or_mask(model, task.sample())
    for line in coupling.refused:
        progress.say(f"not cut: {line}")
    return coupling, [] if coupling.groups else coupling.refused[:1]


def _run_trials(study: "Search", trials: Trials, options: SearchOptions, began: float, progress: Progress) -> list[str]:
    """Ask, carry out and tell until the search is over or its time is up; returns what the user should know."""
    from laconic.search import study as studies

    deadline = began + 60 * options.minutes if options.minutes is not None else math.inf
    lasted: list[float] = []
    while True:
        left = deadline - time.time()
        short = left < _WORTHWHILE * (means.median(lasted) if lasted else 0.0) or left <= 0
        asked = None if short else studies.ask(study, until=deadline)
        if asked is None:
            return [] if studies.finished(study) else [_out_of_time(study, options)]
        with studies.running(study, asked, partial(trials.settle, asked.number, *asked.attempts)):
            finished = [t for t in studies.trials(study) if "score" in t.user_attrs]
            neighbour = nearest(asked.values, _neighbours(finished, trials)) if options.warm_share is not None else None
            record = trials.run(
                asked.number, asked.values, neighbour, _complete_curves(finished), deadline, progress, asked.attempts
            )
            studies.check_numbers(study, asked, record.score, record.objectives)
        if record.late:
            studies.give_back(study, asked, "the search's time was up before it kept the floor")
        else:
            studies.tell(study, asked, record.score, record.objectives, **record.attributes())
            trials.settle(asked.number, *asked.attempts)
        lasted.append(record.seconds)
        progress.say(_line(asked, record, trials))


def _out_of_time(study: "Search", options: SearchOptions) -> str:
    from laconic.search import study as studies

    done = sum("score" in t.user_attrs for t in studies.trials(study))
    return (
        f"the search ended after its {options.minutes:g} minutes, with {done} trials of at most {options.trials}; it "
        "can be resumed"
    )


def _neighbours(finished: Sequence[Any], trials: Trials) -> list[Neighbour]:
    """The original, and the finished trials that kept the floor (others have lost what a milder compression needs) and
    whose state is here."""
    from laconic.search.outcome import folder_of

    kept = [t for t in finished if t.user_attrs["score"] >= trials.floor and trials.state(folder_of(t)).is_file()]
    return [Neighbour(None, {}, None), *(Neighbour(t.number, dict(t.params), trials.state(folder_of(t))) for t in kept)]


def _complete_curves(finished: Sequence[Any]) -> list[list[Point]]:
    """The learning curves of trials that went to their end."""
    told = [TrialRecord.stored(t.user_attrs, t.values) for t in finished]
    return [one.curve for one in told if not one.stopped_early and math.isfinite(one.score)]


def _line(asked: Any, record: TrialRecord, trials: Trials) -> str:
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in asked.values.items()
    )
    goals = ", ".join(f"{goal.name} {value:.5g}" for goal, value in zip(trials.goals, record.objectives, strict=True))
    kept = "keeps" if record.score >= trials.floor else "misses"
    start = "the original" if record.warm_from is None else f"trial {record.warm_from + 1}"
    ended = ", given up early" if record.stopped_early else ""
    if record.late:
        ended = ", put back: the time is up"
    return (
        f"trial {asked.number + 1}: {values}: score {record.score:.4f} {kept} the floor {trials.floor:.4f}, {goals}; "
        f"{record.minibatches} minibatches from {start}{ended}, {record.seconds:.0f} s"
    )
