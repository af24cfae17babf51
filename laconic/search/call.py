"""`search`, the public call: it gathers what a search is given, and has its page drawn."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from laconic.host.progress import Log, Progress
from laconic.measure.goals import Floor, Goal, within
from laconic.model.batches import Batch
from laconic.recover import Recovery, Task, usual_recovery
from laconic.scheme.text import Scheme, parse
from laconic.search.options import SearchOptions
from laconic.search.run import Found, run_search
from laconic.show.search_page import write_search_page


def search(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    objective: Goal | Sequence[Goal],
    keep: Floor | None = None,
    recover: Recovery | None = None,
    train: Iterable[Batch],
    validation: Iterable[Batch],
    test: Iterable[Batch] | None = None,
    loss: Any = None,
    score: Any = None,
    example: Batch | None = None,
    out: str | Path = "search",
    progress: Progress | None = None,
    **options: Any,
) -> Found:
    """Find the values of a scheme's `Free` hyper-parameters that serve an objective best while the validation score
    keeps a floor.

    Stage 1 finds the largest sparsity whose recovered score is at least `keep.floor(reference score)`, stage 2
    optimises the objective below it. `train` is for recovery, `validation` decides everything, `test` is measured once
    at the end. `recover` is how each trial is trained, by default what `usual_recovery` says. `options` are those of
    SearchOptions. Models, the study and the report go to the folder `out`. The module given is not changed.
    Raises: SchemeError, DataError, SearchError (nothing free, a floor that the original or every trial misses, an
    objective that is not a number, a storage that does not answer), SurgeryError (a network that cannot be traced:
    thin=False), OutputError.
    Source: Condensa sections 3.2 to 3.4, listing 1. Cost: `trials` recoveries, less what warm starts and early stops
    save.
    """
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    task = Task(train, validation, test=test, loss=loss, score=score, example=example)
    goals = tuple(objective) if isinstance(objective, list | tuple) else (objective,)
    return search_task(
        model,
        scheme,
        task,
        goals,
        keep=keep or within(0.02),
        how=usual_recovery(scheme, model) if recover is None else recover,
        out=Path(out),
        options=SearchOptions(**options),
        progress=progress or Log(),
    )


def search_task(
    model: nn.Module,
    scheme: Scheme | str,
    task: Task,
    goals: tuple[Goal, ...],
    keep: Floor,
    how: Recovery,
    out: Path,
    options: SearchOptions,
    progress: Progress,
) -> Found:
    """`search` for a Task."""
    return run_search(
        model,
        scheme,
        task=task,
        goals=goals,
        keep=keep,
        how=how,
        out=out,
        options=options,
        progress=progress,
        draw=write_search_page,
    )
