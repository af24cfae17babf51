"""What a search makes sure of before it begins: its scheme, its arguments, the original's score, the folder it writes
to."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from laconic.disk.lock import check_place
from laconic.disk.ours import SEARCH_HTML, SEARCH_JSON, earlier_files, remove
from laconic.engine.resolve import resolve
from laconic.errors import OutputError, SchemeError, SearchError
from laconic.measure.goals import Floor, Goal
from laconic.methods.free import Free
from laconic.model.sites import Slot, find_slots
from laconic.recover import Recovery, Task
from laconic.recover.own_text import is_own_text
from laconic.scheme.filling import fix, free_of
from laconic.scheme.text import Scheme, describe
from laconic.search.options import SearchOptions
from laconic.search.trial import Trials

if TYPE_CHECKING:
    from laconic.search.study import Search


STUDY = "study.db"  # where a search is kept if nothing else is said
_FOLDERS = ("trials", "model", "transformers")
_PARTS = (
    ".model-",
    f"{SEARCH_JSON}.",
    f"{SEARCH_HTML}.",
    f"{STUDY}-",
)  # on their way; what SQLite writes beside its file


def variables(scheme: Scheme, slots: Sequence[Slot]) -> dict[str, Free]:
    """The variables of a scheme. Raises: SearchError when there are none, SchemeError when it cannot be carried out at
    the ends of a range."""
    from laconic.search.samplers import distribution_of

    free = free_of(scheme, slots)
    if not free:
        raise SearchError(
            f"{describe(scheme)}: nothing to search; leave a hyper-parameter open, as in "
            "FilterPrune(sparsity=Free(0, 1))"
        )
    usual = {name: some_value(one) for name, one in free.items()}
    for name, one in free.items():
        distribution: Any = distribution_of(one)
        for value in one.choices or (distribution.low, distribution.high):
            try:
                resolve(fix(scheme, usual | {name: value}, slots), slots)
            except SchemeError as error:
                raise SchemeError(f"{name} = {value!r}, which {one!r} allows: {error}") from error
    return free


def some_value(free: Free) -> Any:
    """A value that a variable may have."""
    if free.choices is not None:
        return free.choices[0]
    assert free.low is not None
    assert free.high is not None
    return free.high if free.integer else (free.low + free.high) / 2


def check_first(
    model: nn.Module,
    scheme: Scheme,
    goals: Sequence[Goal],
    keep: Floor,
    how: Recovery,
    out: Path,
    options: SearchOptions,
) -> dict[str, Free]:
    """What costs nothing to check, before anything that takes time; returns the scheme's variables. Raises:
    SearchError, SchemeError, OutputError."""
    _need_optuna()
    from laconic.search.samplers import Settings, chosen_sampler
    from laconic.search.storage import check_new

    slots = find_slots(model)
    free = variables(scheme, slots)
    check_arguments(goals, keep, how)
    how.check(model, slots)
    check_place(out)
    if options.overwrite:
        earlier_search(out)
    elif not options.resume:
        check_new(options.storage or out / STUDY, options.name)
    chosen_sampler(free, len(goals), Settings(options.sampler, options.trials))  # type: ignore[arg-type]
    return free


def _need_optuna() -> None:
    """Raises SearchError saying what to install, before anything that is written with it is imported."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise SearchError("a search needs Optuna 5 or newer; pip install 'laconic[search]'") from error


def check_arguments(goals: Sequence[Any], keep: Any, how: Any) -> None:
    """Raises SearchError unless these are goals of different names, a floor and a recovery."""
    if not goals or any(not isinstance(goal, Goal) for goal in goals):
        raise SearchError(f"objective: expected Maximize(...) or Minimize(...), or several, got {list(goals)}")
    if len({goal.name for goal in goals}) != len(goals):
        raise SearchError(f"objective: expected different names, got {[goal.name for goal in goals]}; give them labels")
    if not callable(getattr(keep, "floor", None)):
        raise SearchError(f"keep: expected within(margin) or at_least(score), got {keep!r}")
    if not isinstance(how, Recovery):
        raise SearchError(f"recover: expected LC(...), FineTune(...), Direct() or another recovery, got {how!r}")


def original_score(model: nn.Module, task: Task, keep: Floor) -> tuple[float, float]:
    """The original's score, and by how much a second measurement differs. Raises: SearchError when it is no number or
    below its own floor."""
    first, second = (task.judge(model, task.validation).score for _ in range(2))
    if not (math.isfinite(first) and math.isfinite(second)):
        raise SearchError(f"the original's score on validation data is {first}; expected a finite number")
    if not keep.floor(first) <= first:
        raise SearchError(
            f"the floor {keep.floor(first):.6g} is above the score of the original, {first:.6g}: no compression is "
            "asked to gain that"
        )
    return first, abs(first - second)


def earlier_search(out: Path) -> list[Path]:
    """What an earlier search wrote into a folder. Raises: OutputError where anything else is there too."""

    def ours(path: str) -> bool:
        top = path.split("/", maxsplit=1)[0]
        return top in (*_FOLDERS, STUDY, SEARCH_JSON, SEARCH_HTML) or top.startswith(_PARTS) or is_own_text(out / path)

    return earlier_files(out, "search", ours)


def clear_folder(out: Path) -> None:
    """Remove what an earlier search wrote. Raises: OutputError where anything else is there too; then nothing is
    removed."""
    found = [file for file in earlier_search(out) if not is_own_text(file)]  # which the model may have just written
    remove(out, found)


def check_folder(search: "Search", trials: Trials) -> None:
    """Raises OutputError unless the folder holds the models of the study's finished trials, and nobody else's."""
    from laconic.search import study as studies
    from laconic.search.outcome import folder_of

    used, known = (
        (trials.folder / "trials").exists(),
        studies.trials(search),
    )  # in this order: another worker may begin just now
    done = [t for t in known if "score" in t.user_attrs]
    lacking = [t.number + 1 for t in done if not (trials.place(folder_of(t)) / "model").is_dir()]
    if lacking:
        raise OutputError(
            f"{trials.folder}: does not hold the models of trials {lacking} of the study; a search's folder and "
            "its storage belong together"
        )
    if used and not known:
        raise OutputError(f"{trials.folder}: holds the trials of another search; choose another directory")


def remarks(facts: Mapping[str, Any], reference: float, noise: float) -> list[str]:
    """What the user should know of the score."""
    found = max(noise, facts.get("noise", 0.0))
    notes = (
        [f"the score differs by {found:.3g} when measured twice on the original: it is not deterministic"]
        if found
        else []
    )
    if abs(reference - facts["reference"]) > max(found, 1e-6 * abs(reference)):
        notes.append(
            f"the original scores {reference:.6g} here and {facts['reference']:.6g} where the study began; the "
            "latter holds. "
            "Is it the same model, on the same data?"
        )
    return notes
