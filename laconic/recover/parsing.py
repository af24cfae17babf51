"""A recovery as text: `LC(steps=10, minibatches=50, then=FineTune(200))`, parsed and never evaluated."""

import ast
import difflib
import inspect
from typing import Any

from laconic.errors import SchemeError
from laconic.recover.call import How
from laconic.recover.finetune import Direct, FineTune
from laconic.recover.lc import LC
from laconic.recover.train import Steps

_KNOWN: dict[str, Any] = {"LC": LC, "FineTune": FineTune, "Direct": Direct, "Steps": Steps}


def parse_recovery(text: str) -> How:
    """The recovery a Python expression describes: calls of LC, FineTune, Direct and Steps with literals.

    Raises: SchemeError naming what was not understood, with the nearest spelling of an unknown name.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SchemeError(f"recovery {text!r}: not a Python expression: {error.msg} at column {error.offset}") from error
    found = _build(node)
    if isinstance(found, Steps) or not isinstance(found, LC | FineTune | Direct):
        raise SchemeError(f"recovery {text!r}: expected LC(...), FineTune(...) or Direct()")
    return found


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise SchemeError(f"recovery: expected a number, a text or one of {', '.join(_KNOWN)}, got {ast.unparse(node)!r}") from error
    made = _KNOWN.get(node.func.id)
    if made is None:
        raise SchemeError(f"recovery: unknown {node.func.id!r}{_near(node.func.id, list(_KNOWN))}")
    names = list(inspect.signature(made).parameters)
    if len(node.args) > len(names):
        raise SchemeError(f"recovery: {node.func.id} takes {len(names)} arguments, got {len(node.args)}")
    values = {name: _build(arg) for name, arg in zip(names, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg not in names:
            raise SchemeError(f"recovery: {node.func.id} has no argument {keyword.arg!r}{_near(str(keyword.arg), names)}")
        if keyword.arg in values:
            raise SchemeError(f"recovery: {node.func.id} got {keyword.arg!r} twice")
        values[keyword.arg] = _build(keyword.value)
    try:
        return made(**values)
    except TypeError as error:
        raise SchemeError(f"recovery: {ast.unparse(node)!r}: {error}") from error


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
