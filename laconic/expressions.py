"""Python expressions that are parsed and never evaluated: calls of known classes, and spelling hints."""

import ast
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from laconic.errors import SchemeError

T = TypeVar("T")


def parsed(what: str, text: str) -> ast.expr:
    """The expression in a text; `what` it is of begins the message. Raises: SchemeError when it is no Python expression."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SchemeError(f"{what} {text!r}: not a Python expression: {error.msg} at column {error.offset}") from error


def instance(
    what: str, node: ast.expr, cls: type[T], args: Sequence[ast.expr], keywords: Sequence[ast.keyword], value: Callable[[ast.expr], Any]
) -> T:  # fmt: skip
    """The instance of a class that a call describes, each argument read by `value`.

    Raises: SchemeError naming an argument that the class does not have, with the nearest spelling, or that is given twice.
    """
    name, parameters = cls.__name__, list(inspect.signature(cls).parameters)
    if len(args) > len(parameters):
        raise SchemeError(f"{what}: {name} takes {len(parameters)} arguments, got {len(args)} in {where(node)}")
    values = {parameter: value(arg) for parameter, arg in zip(parameters, args, strict=False)}
    for keyword in keywords:
        if keyword.arg is None or keyword.arg not in parameters:
            raise SchemeError(f"{what}: {name} has no argument {keyword.arg!r}{nearest(str(keyword.arg), parameters)}")
        if keyword.arg in values:
            raise SchemeError(f"{what}: {name} got {keyword.arg!r} twice in {where(node)}")
        values[keyword.arg] = value(keyword.value)
    try:
        return cls(**values)
    except TypeError as error:
        raise SchemeError(f"{what}: {where(node)}: {error}") from error


def where(node: ast.AST) -> str:
    """An expression and the column it begins in."""
    return f"{ast.unparse(node)!r} (column {getattr(node, 'col_offset', 0) + 1})"


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is spelled most like another, or some of all, as the end of a message."""
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known[:8])}"
