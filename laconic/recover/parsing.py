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
from laconic.scheme.expressions import instance, nearest, parsed


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
    found = _build(parsed("recovery", text))
    if not isinstance(found, Recovery):
        known = [name for name in known_recoveries() if name not in ("LC", "FineTune")]
        raise SchemeError(
            f"recovery {text!r}: expected LC(...), FineTune(...) or another recovery ({', '.join(known)})"
        )
    return found


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        return _loss(node)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise _unexpected(node) from error
    known: dict[str, type[Any]] = {**known_recoveries(), **known_values()}
    made = known.get(node.func.id)
    if made is None:
        raise SchemeError(f"recovery: unknown {node.func.id!r}{nearest(node.func.id, list(known))}")
    return instance("recovery", node, made, node.args, node.keywords, _build)


def _loss(node: ast.BinOp) -> Any:
    """A weighted sum of losses."""
    try:
        left, right = _build(node.left), _build(node.right)
    except SchemeError as error:
        raise _unexpected(node) from error
    if isinstance(node.op, ast.Add) and isinstance(left, Loss) and isinstance(right, Loss):
        return left + right
    if isinstance(node.op, ast.Mult) and type(left) in (int, float) and isinstance(right, Loss):
        return left * right
    raise _unexpected(node)


def _unexpected(node: ast.expr) -> SchemeError:
    known = ", ".join([*known_recoveries(), *known_values()])
    return SchemeError(f"recovery: expected a number, a text or one of {known}, got {ast.unparse(node)!r}")


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
