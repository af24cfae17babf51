"""What a search asks for: directions with their values, and floors under the score."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from laconic.errors import SearchError
from laconic.measure.candidate import Candidate
from laconic.measure.goals import AtLeast, Goal, Maximize, Minimize, Within, at_least, within


def candidate() -> Candidate:
    network = nn.Linear(2, 3)
    return Candidate(network, network, torch.zeros(1, 2), network)


def weights(made: Candidate) -> int:
    return sum(p.numel() for p in made.network.parameters())


class Speed:
    """A measure of two networks at once: half the reference's."""

    def __call__(self, made: Candidate) -> float:
        return 10.0

    def relative(self, made: Candidate) -> float:
        return 0.5


@pytest.mark.parametrize(("kind", "direction"), [(Maximize, "maximize"), (Minimize, "minimize")])
def test_a_goal_has_a_direction_a_name_and_a_value(kind: Any, direction: str) -> None:
    goal = kind(weights)
    assert isinstance(goal, Goal)
    assert (goal.direction, goal.name, goal(candidate())) == (direction, "weights", 9.0)
    assert kind(weights, "size").name == "size"
    assert kind(Speed()).name == "Speed"


def test_two_goals_are_one_where_function_and_name_are() -> None:
    assert Maximize(weights) == Maximize(weights) != Minimize(weights)
    assert Maximize(weights) != Maximize(weights, "size")


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7), torch.tensor([[7.0]]), True + 6])
def test_whatever_is_one_number_is_a_value(value: Any) -> None:
    assert Minimize(lambda made: value, "n")(candidate()) == 7.0


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "expected a finite number"), (math.inf, "expected a finite number"), (torch.tensor(-math.inf), "expected a finite number"),
     ("many", "expected a number, got 'many'"), (None, "expected a number, got None"), (torch.zeros(2), "expected a number")],
)  # fmt: skip
def test_anything_else_is_refused_by_the_goal_s_name(value: Any, said: str) -> None:
    goal = Maximize(lambda made: value, "strange")
    for measure in (goal, lambda made: goal.beside(made, 3.0)):
        with pytest.raises(SearchError, match=f"objective strange: {said}"):
            measure(candidate())


def test_beside_the_reference_a_ratio_is_a_multiple_of_its_value_and_a_value_is_itself() -> None:
    assert Maximize(Speed()).beside(candidate(), 30.0) == 15.0  # type: ignore[arg-type]
    assert Maximize(weights).beside(candidate(), 30.0) == 9.0


@pytest.mark.parametrize("function", [3.0, "throughput", None])
def test_a_goal_of_no_function_is_refused_at_once(function: Any) -> None:
    with pytest.raises(SearchError, match="Minimize: expected a function of a Candidate, such as throughput"):
        Minimize(function)


def test_floors() -> None:
    assert within(0.02) == Within(0.02)
    assert within(0.02).floor(0.92) == pytest.approx(0.90)
    assert within(0).floor(-4.7) == -4.7
    assert at_least(0.5) == AtLeast(0.5)
    assert {at_least(0.5).floor(score) for score in (-1.0, 0.92)} == {0.5}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_floor_is_a_finite_number(number: float) -> None:
    with pytest.raises(SearchError, match="at_least: expected a finite score"):
        at_least(number)
    with pytest.raises(SearchError, match="within: the margin is what the score may lose, 0 or more"):
        within(number)


def test_a_margin_is_no_gain() -> None:
    with pytest.raises(SearchError, match="0 or more, got -0.01"):
        within(-0.01)
