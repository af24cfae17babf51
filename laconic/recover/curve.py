"""The learning curve of a recovery: what was judged after how many minibatches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from laconic.errors import CheckpointError
from laconic.host.record import Record, plain

_NUMBERS = ("minibatches", "score", "validation_loss")


@dataclass(frozen=True)
class Point(Record):
    """A compressed model judged on validation data, after all the `minibatches` trained on so far.

    `told` is what the recovery says beside that (its phase, a distance, minibatches skipped); in the JSON, and by key,
    it stands among the others: `point["phase"]`.
    """

    minibatches: int
    score: float
    validation_loss: float
    told: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _NUMBERS}, **plain(self.told)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """The point that `to_json` wrote. Raises: CheckpointError where it is none."""
        if missing := [name for name in _NUMBERS if name not in told]:
            raise CheckpointError(f"a point of a learning curve without {missing[0]!r}: the file is damaged")
        numbers = {name: told[name] for name in _NUMBERS}
        return cls(**numbers, told={key: value for key, value in told.items() if key not in _NUMBERS})
