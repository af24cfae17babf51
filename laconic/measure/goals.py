"""What a search asks for: a direction for an objective, and the score that may not be fallen below."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from laconic.errors import SearchError
from laconic.measure.candidate import Candidate, Objective


@dataclass(frozen=True)
class _Goal:
    """`function` of a Candidate, any that returns a number; it is called `label` in messages and reports, by default by
    its own name.
    """

    function: Objective
    label: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SearchError(
                f"{type(self).__name__}: expected a function of a Candidate, such as throughput, got {self.function!r}"
            )

    @property
    def name(self) -> str:
        return self.label or str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, candidate: Candidate) -> float:
        """The objective's value. Raises: SearchError when it is not a finite number."""
        return self._number(self.function(candidate))

    def beside(self, candidate: Candidate, standard: float) -> float:
        """The objective's value where the reference's is `standard`: values of one search, measured at different times,
        can be compared.

        A function with a method `relative(candidate)`, the value as a multiple of the reference's, as `Latency` has it,
        is measured by that; any other by itself. Raises: SearchError when it is not a finite number.
        """
        relative = getattr(self.function, "relative", None)
        return self(candidate) if relative is None else standard * self._number(relative(candidate))

    def _number(self, result: Any) -> float:
        single = isinstance(result, torch.Tensor) and result.numel() == 1
        try:
            value = float(result.item() if single else result)
        except (TypeError, ValueError) as error:
            raise SearchError(f"objective {self.name}: expected a number, got {result!r}") from error
        if not math.isfinite(value):
            raise SearchError(f"objective {self.name}: expected a finite number, got {value}")
        return value


@dataclass(frozen=True)
class Maximize(_Goal):
    """The search looks for the largest value of `function(candidate)`. Raises: SearchError (on a call) for NaN or an
    infinity.
    """

    @property
    def direction(self) -> Literal["maximize"]:
        return "maximize"


@dataclass(frozen=True)
class Minimize(_Goal):
    """The search looks for the smallest value of `function(candidate)`. Raises: SearchError (on a call) for NaN or an
    infinity.
    """

    @property
    def direction(self) -> Literal["minimize"]:
        return "minimize"


Goal = Maximize | Minimize


class Floor(Protocol):
    """Says which score is the least that is kept: the level set L."""

    def floor(self, reference_score: float) -> float: ...


@dataclass(frozen=True)
class Within:
    """The reference's score less `margin`: L = accuracy - epsilon. Source: Condensa section 3.2."""

    margin: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise SearchError(f"within: the margin is what the score may lose, 0 or more, got {self.margin!r}")

    def floor(self, reference_score: float) -> float:
        return reference_score - self.margin


@dataclass(frozen=True)
class AtLeast:
    """A score of its own, whatever the reference's is."""

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise SearchError(f"at_least: expected a finite score, got {self.value!r}")

    def floor(self, reference_score: float) -> float:
        return self.value


def within(margin: float) -> Within:
    """Keep the score within `margin` of the reference's, in the score's own units. Raises: SearchError for a margin
    below 0 or not finite.
    """
    return Within(margin)


def at_least(value: float) -> AtLeast:
    """Keep the score at `value` or above. Raises: SearchError for a value that is not finite."""
    return AtLeast(value)
