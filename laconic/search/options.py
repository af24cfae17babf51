"""How a search is carried out."""

from dataclasses import dataclass
from pathlib import Path

from laconic.errors import SearchError


@dataclass(frozen=True)
class SearchOptions:
    """How a search is carried out.

    At most `trials` trials, shared by all workers on one storage; `minutes` of wall-clock time for this worker, after
    which the trial under way ends with the best it has, and is put back for a resumed search if that misses the floor.
    `storage` is an SQLite file or database URL, by default `study.db` in the search's folder; `name` is the study's.
    `warm_share`: a trial starts from the nearest finished one that kept the floor and takes this share of the L-steps
    (None: every trial starts from the original). `early_stop` gives a trial up that can no longer reach the floor.
    `thin` removes cut channels for good; without it they stay as zeros, as they must where no graph can be traced.
    `sampler`: "two-sided" (ours, and what "auto" is for one real number and one objective), "drucb"
    (Condensa's, as published), Optuna's "gp" or "tpe". `resume` goes on with the study in the storage, or joins it as
    another worker; `overwrite` removes an earlier search in the folder, its study too. A worker says every `heartbeat`
    seconds that it lives.
    Raises: SearchError for numbers out of range.
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
    overwrite: bool = False
    seed: int = 0
    command: str = ""
    heartbeat: int = 60

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise SearchError(f"expected minutes above 0, or None, got {self.minutes!r}")
        if self.warm_share is not None and not 0 < self.warm_share <= 1:
            raise SearchError(
                f"warm_share: expected a share of the L-steps, above 0 and at most 1, or None, got {self.warm_share!r}"
            )
        if self.overwrite and (self.resume or self.storage is not None):
            other = (
                "resume"
                if self.resume
                else "a storage of its own, whose study may be other workers' too: give another name"
            )
            raise SearchError(f"overwrite replaces a folder with the study in it and does not go with {other}")
        if self.heartbeat < 1:
            raise SearchError(f"heartbeat: expected seconds from 1, got {self.heartbeat!r}")
