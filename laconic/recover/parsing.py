"""A recovery as text: `LC(steps=10, minibatches=50, then=FineTune(200))`, parsed and never evaluated."""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from laconic.errors import SchemeError
from laconic.recover import losses, schedules
from laconic.recover.base import Recovery
from laconic.recover.losses import Loss
from laconic.recover.optimizers import Optimizer
from laconic.recover.schedules import Schedule
from laconic.recover.steps import Steps
from laconic.scheme.expressions import Language, parsed


@cache
def known_recoveries() -> dict[str, type[Recovery]]:
    """Every recovery by its class name, found by walking this folder; a module that does not import is an error, not a
    gap.
    """
    found: dict[str, type[Recovery]] = {}
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"laconic.recover.{module_info.name}")
        found |= _classes_in(module, Recovery)
    return dict(sorted(found.items()))


@cache
def known_values() -> dict[str, type[Any]]:
    """What a recovery's hyper-parameters may be beside literals: steps, optimizers, schedules and losses, by class
    name.
    """
    found: dict[str, type[Any]] = {"Steps": Steps, "Optimizer": Optimizer}
    return found | _classes_in(schedules, Schedule) | _classes_in(losses, Loss)


def parse_recovery(text: str) -> Recovery:
    """The recovery a Python expression describes: calls of recoveries, Steps, Optimizer, schedules and losses
    (`0.1 * TaskLoss() + KL()`) with literals.

    Raises: SchemeError naming what was not understood, with the nearest spelling of an unknown name.
    """
    found = _LANGUAGE.value(parsed("recovery", text))
    if not isinstance(found, Recovery):
        known = [name for name in known_recoveries() if name not in ("LC", "FineTune")]
        raise SchemeError(
            f"recovery {text!r}: expected LC(...), FineTune(...) or another recovery ({', '.join(known)})"
        )
    return found


def _sum(left: Any, right: Any) -> Any:
    """A sum of losses. Raises: TypeError for anything else."""
    if not (isinstance(left, Loss) and isinstance(right, Loss)):
        raise TypeError("only losses are added")
    return left + right


def _weighted(weight: Any, loss: Any) -> Any:
    """A number times a loss. Raises: TypeError for anything else."""
    if type(weight) not in (int, float) or not isinstance(loss, Loss):
        raise TypeError("only a loss is weighted, by a number before it")
    return weight * loss


def _vocabulary() -> dict[str, type[Any]]:
    return {**known_recoveries(), **known_values()}


def _expected() -> str:
    return f"a number, a text or one of {', '.join(_vocabulary())}"


_LANGUAGE = Language(
    what="recovery",
    vocabulary=_vocabulary,
    operators={ast.Add: _sum, ast.Mult: _weighted},
    expected=_expected,
    literal=_expected,
    factors=True,
)


def _classes_in(module: Any, base: type[Any]) -> dict[str, type[Any]]:
    """The concrete subclasses of a class that a module defines, by name; those whose names begin with "_" are its own
    affair.
    """
    return {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, base)
        and cls.__module__ == module.__name__
        and not inspect.isabstract(cls)
        and not name.startswith("_")
    }
