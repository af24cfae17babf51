"""Python expressions that are parsed and never evaluated: calls of known classes, the types of their arguments, and
spelling hints."""

import ast
import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from laconic.errors import LaconicError, SchemeError
from laconic.methods.arguments import check_values

T = TypeVar("T")
_DEPTH = 64  # levels of an expression; what people write has about ten, and Python's own recursion ends at some hundred
_LETTERS = 100_000  # of an expression
_BITS = 64  # of an integer in it
_SHOWN = 200  # letters of an expression in a message


def parsed(what: str, text: str) -> ast.expr:
    """The expression in a text; `what` it is of begins the message.

    Raises: SchemeError when it is no Python expression, or one that is nested too deeply or holds too large a number
    for anything here.
    """
    if not isinstance(text, str):
        raise SchemeError(f"{what}: expected an expression as text, got {text!r}")
    if len(text) > _LETTERS:
        raise SchemeError(f"{what}: a text of {len(text):,} characters; an expression has at most {_LETTERS:,}")
    shown = _shown(text)
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python, about how a number or an escape is written
            body = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SchemeError(f"{what} {shown}: not a Python expression: {error.msg} at column {error.offset}") from error
    except (
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:  # a NUL byte, half of a surrogate pair, nesting beyond the parser's stack
        raise SchemeError(f"{what} {shown}: not a Python expression: {str(error) or 'nested too deeply'}") from error
    level: list[ast.AST] = [body]
    for _ in range(_DEPTH):
        for node in level:
            if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value.bit_length() > _BITS:
                raise SchemeError(
                    f"{what} {shown}: a number of {node.value.bit_length():,} bits at column {node.col_offset + 1}"
                )
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return body
    raise SchemeError(f"{what} {shown}: nested more than {_DEPTH} levels deep")


def instance(
    what: str,
    node: ast.expr,
    cls: type[T],
    args: Sequence[ast.expr],
    keywords: Sequence[ast.keyword],
    value: Callable[[ast.expr], Any],
    typed: bool = True,
) -> T:
    """The instance of a class that a call describes, each argument read by `value` and, if `typed`, of the type the
    class annotates.

    A class whose constructor takes `**arguments` is given any. Raises: SchemeError naming an argument that the class
    does not have, with the nearest spelling, that is given twice or of another type.
    """
    name, signature = cls.__name__, inspect.signature(cls).parameters
    parameters = [one for one in signature if signature[one].kind is not inspect.Parameter.VAR_KEYWORD]
    open_ended = len(parameters) < len(signature)
    if len(args) > len(parameters):
        raise SchemeError(f"{what}: {name} takes {len(parameters)} arguments, got {len(args)} in {where(node)}")
    values = {parameter: value(arg) for parameter, arg in zip(parameters, args, strict=False)}
    for keyword in keywords:
        if keyword.arg is None or (keyword.arg not in parameters and not open_ended):
            raise SchemeError(f"{what}: {name} has no argument {keyword.arg!r}{nearest(str(keyword.arg), parameters)}")
        if keyword.arg in values:
            raise SchemeError(f"{what}: {name} got {keyword.arg!r} twice in {where(node)}")
        values[keyword.arg] = value(keyword.value)
    try:
        made = cls(**values)
    except LaconicError:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:  # a check that met a value of another type
        check_values(f"{what}: {name}", cls, values)
        raise SchemeError(f"{what}: {where(node)}: {error}") from error
    if typed:
        check_values(f"{what}: {name}", cls, values)
    return made


def where(node: ast.AST) -> str:
    """An expression, or its beginning, and the column it begins in."""
    return f"{_shown(ast.unparse(node))} (column {getattr(node, 'col_offset', 0) + 1})"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is spelled most like another, or some of all, as the end of a message."""
    by_letters = {one.lower(): one for one in reversed(known)}
    close = difflib.get_close_matches(word.lower()[:200], by_letters, 1, 0.5)
    return f"; did you mean {by_letters[close[0]]!r}?" if close else f"; known: {', '.join(known[:8])}"
