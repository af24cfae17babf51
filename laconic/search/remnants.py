"""What workers that were killed leave in a search's folder."""

import re
import shutil
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from laconic.recover.checkpoint import STATE as UNFINISHED
from laconic.search.outcome import folder_of
from laconic.search.trial import Trials


def progressed(trials: Trials, lost: FrozenTrial) -> bool:
    """Whether a trial whose worker died had stored a state that is newer than the trial itself: one more attempt will
    end later than this did.
    """
    file = trials.place(lost.number) / UNFINISHED
    return file.is_file() and lost.datetime_start is not None and file.stat().st_mtime > lost.datetime_start.timestamp()


def remove_remnants(trials: Trials, known: Sequence[FrozenTrial]) -> None:
    """Remove copies under way, temporary files, and the folders of trials that neither have a result nor can be gone on
    with.

    Only for a worker that is alone.
    """
    results = {folder_of(t) for t in known if "score" in t.user_attrs and t.state is TrialState.COMPLETE}
    retried = {t.number: t.user_attrs.get("retry_of") for t in known}
    wanted: set[int] = set()
    for t in known:
        number = t.number if t.state is TrialState.WAITING else None
        while number is not None:
            wanted.add(number)
            number = retried.get(number)
    for folder in trials.folder.glob("trials/*"):
        if not (folder.is_dir() and re.fullmatch(r"\d{3,}", folder.name)):
            continue
        if int(folder.name) not in results | wanted:
            shutil.rmtree(folder)
            continue
        settled = [folder / UNFINISHED] if int(folder.name) not in wanted else []
        for file in (*folder.glob("*.tmp"), *folder.glob("model/*.tmp"), *settled):
            file.unlink(missing_ok=True)
    for left in (*trials.folder.glob(".model-*"), *trials.folder.glob("*.tmp")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
