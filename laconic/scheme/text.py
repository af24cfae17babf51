"""Schemes: which method each site gets, written as Python values or as text that is parsed and never evaluated."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import laconic.methods
from laconic.errors import SchemeError
from laconic.host.foreign import run_file
from laconic.methods.base import Method
from laconic.methods.free import Free
from laconic.model.sites import Slot
from laconic.scheme.expressions import Language, parsed, where
from laconic.scheme.keep import UNCOMPOSED, Keep
from laconic.scheme.spelling import scheme_called

Predicate = Callable[[Slot], bool]
Choice = Method | Keep
"""What becomes of one site: a method compresses it, or it stays as it is."""
Rule = tuple[str | Predicate, Choice]
Scheme = Choice | Sequence[Rule] | Callable[[Slot], Choice]
"""A method for the model, of which `engine.resolve` makes what every site needs; a plan of rules (pattern or predicate,
choice) of which the first that matches wins; or a function from a site's description to a choice. In a plan or
function, nothing is left out: say `Keep()`."""


@cache
def known_methods() -> dict[str, type[Method]]:
    """Every method by its class name, found by walking `laconic.methods`; a module that does not import is an error,
    not a gap."""
    found: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(laconic.methods.__path__):
        module = importlib.import_module(f"laconic.methods.{module_info.name}")
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and issubclass(cls, Method) and cls.__module__ == module.__name__
            if own and not inspect.isabstract(cls) and name not in ("Then", "Plus"):
                found[name] = cls
    return dict(sorted(found.items()))


def vocabulary() -> dict[str, type[Choice]]:
    """Every name that a scheme can call for a site: the methods, and `Keep`."""
    return dict(sorted({**known_methods(), Keep.__name__: Keep}.items()))


def parse(text: str) -> Scheme:
    """The scheme a Python expression describes. Only method calls, literals, `+`, `>>`, plans and conditions on a site
    are understood.

    Examples: `GPTQ(bits=3) + EoRA(rank=16)`; `[("lm_head", Keep()), (columns > 1000, GPTQ(bits=4)), ("*",
    GPTQ(bits=3))]`; `GPTQ(bits=4) if "v_proj" in name or block < 2 else GPTQ(bits=3)`. Conditions may use name, rows,
    columns, entries, block and role. Raises: SchemeError naming what was not understood and where, with the nearest
    spelling of an unknown name.
    """
    if isinstance(text, str) and text.strip() not in vocabulary() and (meant := scheme_called(text)) is not None:
        raise SchemeError(f"scheme {text!r}: did you mean {meant}?")
    node = parsed("scheme", text)
    if isinstance(node, ast.List | ast.Tuple):
        return [_rule(item) for item in node.elts]
    if isinstance(node, ast.IfExp):
        return _conditional(node)
    return _choice(node)


def load_plan(file: Path) -> Scheme:
    """The variable `scheme` of a Python file, which is run: a plan file is a program of the user's own.

    Raises: SchemeError when there is no such file, where and how it fails, and when the variable is missing or not a
    scheme.
    """
    names = run_file(file, SchemeError, "plan")
    expected = f"{file}: expected a variable named 'scheme' (a method, a list of rules or a function)"
    if "scheme" not in names:
        raise SchemeError(f"{expected}, found none")
    scheme = names["scheme"]
    if isinstance(scheme, type):
        raise SchemeError(f"{expected}, got the class {scheme.__name__}: write {scheme.__name__}(...)")
    if isinstance(scheme, str):
        raise SchemeError(
            f"{expected}, got a text: give that to --scheme, or write scheme = laconic.parse({scheme[:100]!r})"
        )
    if not (isinstance(scheme, Method | Keep | list | tuple) or callable(scheme)):
        raise SchemeError(f"{expected}, got a {type(scheme).__name__}")
    return scheme


def describe(scheme: Scheme) -> str:
    """The text of a scheme: what `parse` reads back, or a function's name."""
    if isinstance(scheme, Method | Keep):
        return repr(scheme)
    if callable(scheme):
        return getattr(scheme, "text", f"function {getattr(scheme, '__name__', 'scheme')}")
    rules = (
        f"({getattr(p, 'text', None) or (repr(p) if isinstance(p, str) else 'predicate')}, {m!r})" for p, m in scheme
    )
    return f"[{', '.join(rules)}]"


def _then(first: Any, second: Any) -> Method:
    return _part(first) >> _part(second)


def _plus(first: Any, second: Any) -> Method:
    return _part(first) + _part(second)


def _part(value: Any) -> Method:
    """A method that is a part of another. Raises: TypeError for anything else, SchemeError for `Keep()`."""
    if isinstance(value, Keep):
        raise SchemeError(f"scheme: {UNCOMPOSED}")
    if not isinstance(value, Method):
        raise TypeError(f"no method: {value!r}")
    return value


_LANGUAGE = Language(
    what="scheme",
    vocabulary=lambda: {**vocabulary(), Free.__name__: Free},
    operators={ast.RShift: _then, ast.Add: _plus},
    expected=lambda: "a method such as GPTQ(bits=4)",
    literal=lambda: "a literal value",
    noun="method ",
    hint="; only methods can be called",
)


def _choice(node: ast.expr) -> Choice:
    made = _LANGUAGE.made(node)
    if not isinstance(made, Method | Keep):
        raise SchemeError(f"scheme: expected a method such as GPTQ(bits=4), got {where(node)}")
    return made


def _rule(node: ast.expr) -> Rule:
    if not (isinstance(node, ast.Tuple) and len(node.elts) == 2):
        raise SchemeError(f"scheme: a rule of a plan is a pair (pattern, method), got {where(node)}")
    test, choice = node.elts
    if isinstance(test, ast.Constant) and isinstance(test.value, str):
        return test.value, _choice(choice)
    return _predicate(test), _choice(choice)


def _conditional(node: ast.IfExp) -> Callable[[Slot], Choice]:
    test, then = _predicate(node.test), _choice(node.body)
    other = _conditional(node.orelse) if isinstance(node.orelse, ast.IfExp) else _choice(node.orelse)

    def choose(slot: Slot) -> Choice:
        if test(slot):
            return then
        return other if isinstance(other, Method | Keep) else other(slot)

    choose.text = ast.unparse(node)  # type: ignore[attr-defined]
    return choose


_FIELDS = ("name", "rows", "columns", "entries", "block", "role")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _predicate(node: ast.expr) -> Predicate:
    """A condition on a site: comparisons of its fields and literals, joined by and, or, not."""
    _evaluate(node, None)  # everything is understood, before it is used

    def test(slot: Slot) -> bool:
        try:
            return bool(_evaluate(node, slot))
        except TypeError as error:
            raise SchemeError(f"scheme: {where(node)} compares things that do not compare: {error}") from error

    test.text = ast.unparse(node)  # type: ignore[attr-defined]
    return test


def _evaluate(node: ast.expr, slot: Slot | None) -> Any:
    """The value of a condition for a slot, or, for None, only a check that every part of it is understood."""
    if isinstance(node, ast.BoolOp):
        values = [_evaluate(value, slot) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _evaluate(node.operand, slot)
    if isinstance(node, ast.Compare):
        values = [_evaluate(value, slot) for value in (node.left, *node.comparators)]
        tests = [_COMPARISONS.get(type(op)) for op in node.ops]
        if all(test is not None for test in tests):
            pairs = zip(tests, values[:-1], values[1:], strict=True)
            return slot is None or all(test(a, b) for test, a, b in pairs if test is not None)
    field = (
        node.attr
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "site"
        else getattr(node, "id", None)
    )
    if field in _FIELDS:
        return None if slot is None else getattr(slot, str(field))
    if isinstance(node, ast.Constant | ast.Tuple | ast.List | ast.UnaryOp):
        return _LANGUAGE.value(node)
    raise SchemeError(f"scheme: a condition compares {', '.join(_FIELDS)} and literals, got {where(node)}")
