"""How long a run will still take: what its stages were expected to take, corrected by what they do take."""

import time
from collections.abc import Mapping

from laconic.host.progress import Progress
from laconic.host.told import Preflight, SiteRecord
from laconic.host.units import duration

_TASKS = {
    "sampling": "own text",
    "surveying": "survey",
    "compressing": "compression",
    "verifying": "verification",
    "evaluating": "evaluation",
    "writing": "samples",
}
_KNOWN = 0.02  # of a stage has to be done before its own pace says how long it takes
_EARLY = 0.1  # of the compression: about a block


class Clock:
    """A progress that passes everything on to another one, and adds to every note how long the whole run will still
    take.

    `expected`: seconds by stage. A stage that goes on is judged by its pace, one that is to come by how wrong the
    finished ones' expectations were. `taken` are the seconds of finished stages; `early`: the whole run's seconds, as
    estimated when a tenth of the compression was done.
    """

    def __init__(self, inner: Progress, expected: Mapping[str, float]) -> None:
        self.inner, self.expected, self.taken = inner, dict(expected), dict[str, float]()
        self.early: float | None = None
        self.began = self.since = time.monotonic()
        self.stage: str | None = None
        self.total = self.done = 0.0

    def plan(self, preflight: Preflight) -> None:
        self.inner.plan(preflight)

    def site(self, record: SiteRecord) -> None:
        self.inner.site(record)

    def say(self, message: str) -> None:
        self.inner.say(message)

    def start(self, task: str, total: float) -> None:
        self.finish()
        self.stage, self.since, self.total, self.done = (
            _TASKS.get(task.split(maxsplit=1)[0]),
            time.monotonic(),
            total,
            0.0,
        )
        self.inner.start(task, total)

    def finish(self) -> None:
        """The present stage is over."""
        if self.stage is not None:
            self.taken[self.stage] = self.taken.get(self.stage, 0.0) + time.monotonic() - self.since
        self.stage = None

    def told(self) -> dict[str, dict[str, float]]:
        """Seconds of every finished stage, expected and taken."""
        return {
            stage: {"expected": self.expected.get(stage, 0.0), "actual": seconds}
            for stage, seconds in self.taken.items()
        }

    def advance(self, units: float, note: str = "") -> None:
        self.done += units
        left = self.left()
        if self.early is None and self.stage == "compression" and self.done >= _EARLY * self.total:
            self.early = time.monotonic() - self.began + left
        self.inner.advance(units, f"{note}, {duration(left)} left in all".removeprefix(", "))

    def left(self) -> float:
        """Seconds that the rest of the run takes, as far as can be told now."""
        elapsed, share = time.monotonic() - self.since, min(self.done / self.total, 1.0) if self.total else 0.0
        expected = self.expected.get(self.stage or "", 0.0)
        judged, took = sum(self.expected.get(stage, 0.0) for stage in self.taken), sum(self.taken.values())
        here = 0.0
        if self.stage is not None:
            known = share >= _KNOWN
            if known:
                here = elapsed * (1 - share) / share
            else:
                slower = took / judged if judged else 1.0
                here = max(expected * slower - elapsed, 0.0)
            judged, took = judged + expected * share * known, took + elapsed * known
        later = sum(
            seconds for stage, seconds in self.expected.items() if stage not in self.taken and stage != self.stage
        )
        return here + later * (took / judged if judged > 0 and took > 0 else 1.0)
