"""Python expressions that are parsed and never evaluated: calls of known classes, the types of their arguments, and spelling hints."""

import ast
import difflib
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from laconic.errors import LaconicError, SchemeError

T = TypeVar("T")
_DEPTH = 64  # levels of an expression; what people write has about ten, and Python's own recursion ends at some hundred
_LETTERS = 100_000  # of an expression
_BITS = 64  # of an integer in it
_SHOWN = 200  # letters of an expression in a message


def parsed(what: str, text: str) -> ast.expr:
    """The expression in a text; `what` it is of begins the message.

    Raises: SchemeError when it is no Python expression, or one that is nested too deeply or holds too large a number for anything here.
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
    what: str, node: ast.expr, cls: type[T], args: Sequence[ast.expr], keywords: Sequence[ast.keyword], value: Callable[[ast.expr], Any],
    typed: bool = True,
) -> T:  # fmt: skip
    """The instance of a class that a call describes, each argument read by `value` and, if `typed`, of the type the class annotates.

    A class whose constructor takes `**arguments` is given any. Raises: SchemeError naming an argument that the class does not have, with the
    nearest spelling, that is given twice or of another type.
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


def check_values(what: str, cls: type, values: dict[str, Any]) -> None:
    """Raises SchemeError unless every value is of the type that the class annotates; a `Free` may stand for any."""
    hints = _hints(cls)
    for name, value in values.items():
        if name in hints and not _is_free(value) and not _is_of(hints[name], value):
            raise SchemeError(f"{what}: {name} should be {_in_words(hints[name])}, got {value!r}")


def check_types(what: str, value: Any) -> None:
    """`check_values` for a dataclass and all dataclasses in its fields."""
    found = {f.name: getattr(value, f.name) for f in fields(value)}
    check_values(f"{what}: {type(value).__name__}", type(value), found)
    for inner in found.values():
        if is_dataclass(inner) and not isinstance(inner, type) and not _is_free(inner):
            check_types(what, inner)


def _is_free(value: Any) -> bool:
    return type(value).__name__ == "Free"  # whose module builds on this one


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value has a type: those that hyper-parameters have are checked, anything else is let pass."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(one, value) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        return len(wanted) == len(value) and all(map(_is_of, wanted, value))
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and origin is None else True


def _in_words(hint: Any) -> str:
    """A type as a message names it: "int or None", "'dense' or 'ans'"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return (
        "None"
        if hint is types.NoneType
        else getattr(hint, "__name__", str(hint))
        if get_origin(hint) is None
        else str(hint)
    )


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
