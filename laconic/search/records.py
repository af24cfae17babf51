"""What a search knows of a trial, of the original and of itself: records whose JSON is in the study and in
search.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from laconic.host.record import Record
from laconic.recover.curve import Point

Objective = float | list[float]
"""The value of the one objective, or those of all."""


@dataclass(frozen=True)
class TrialRecord(Record):
    """What came of a trial.

    `score`: that of the model read back from its file, -inf where training diverged; `direct_score`: direct
    compression's; `curve`: the points of its learning curve; `late`: its time was up before it kept the floor;
    `warm_from`: the trial whose state it started from, None for the original; `cold_minibatches`: those of a run that
    starts there and goes to its end; `seconds`: those of the interrupted attempts it goes on from included.
    """

    score: float
    direct_score: float
    objectives: list[float]
    curve: list[Point]
    late: bool
    stopped_early: bool
    warm_from: int | None
    minibatches: int
    cold_minibatches: int
    seconds: float
    notes: list[str]

    def attributes(self) -> dict[str, Any]:
        """What the study stores of it beside its score and its objectives."""
        told = self.to_json()
        return {key: value for key, value in told.items() if key not in ("score", "objectives", "late")}

    @classmethod
    def stored(cls, attributes: dict[str, Any], objectives: Sequence[float] | None) -> Self:
        """A finished trial as the study has it. Raises: CheckpointError where an attribute is missing."""
        told = {**attributes, "objectives": list(objectives or ()), "late": False}
        if "curve" in told:
            told["curve"] = [Point.from_json(point) for point in told["curve"]]
        return cls.from_json(told)


@dataclass(frozen=True)
class Sizes(Record):
    """Bytes in the model's own types, bytes without zeros, parameters."""

    stored_bytes: int
    nonzero_bytes: float
    parameters: int


@dataclass(frozen=True)
class Reference(Sizes):
    """The original: its validation score, its objectives, and its score on test data once that is looked at."""

    OPTIONAL = frozenset({"test_score"})

    score: float
    objective: Objective
    test_score: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"score": self.score, **super().to_json()}


@dataclass(frozen=True)
class Best(Record):
    """The trial that is delivered, measured once more from its file; test data is looked at for it alone."""

    OPTIONAL = frozenset({"test_score", "direct_test_score"})

    trial: int
    values: dict[str, Any]
    score: float
    objective: Objective
    stored_bytes: int
    nonzero_bytes: float
    parameters: int
    ratio: float
    nonzero_ratio: float
    test_score: float | None = None
    direct_test_score: float | None = None


@dataclass(frozen=True)
class SearchResult(Record):
    """Everything a search knows. `trials` are those of the study, each with its attributes as JSON; `pareto` only of
    several objectives.

    `best` and `layers` are there once a trial that kept the floor is measured.
    """

    OPTIONAL = frozenset({"pareto", "best", "layers"})

    scheme: str
    recovery: str
    objective: dict[str, str] | list[dict[str, str]]
    floor: float
    keep: str
    margin: float
    reference: Reference
    free: dict[str, Any]
    trials: list[dict[str, Any]]
    noise: float
    notes: list[str]
    cost: dict[str, int]
    versions: dict[str, str]
    machine: dict[str, Any]
    seed: int
    command: str
    pareto: list[int] | None
    seconds: float = 0.0
    best: Best | None = None
    layers: list[dict[str, Any]] | None = None
