"""The one parser of expressions: Python that is read and never evaluated, as calls of known classes; spelling hints."""

import ast
import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.errors import LaconicError, SchemeError
from laconic.methods.arguments import check_values

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


@dataclass(frozen=True)
class Language:
    """Expressions of one kind: calls of known classes with literals, tuples and such calls in them, and operations on
    what they make. A class's bare name stands for a call without arguments.

    `what` is read, and begins every message; `noun` is what a class of it is called; `expected` says what a call
    should be, with a `hint` after it, `literal` what stands where none is needed. `vocabulary` gives the classes by
    name. `operators` compute on what was made, and raise TypeError where they cannot; of a language with `factors`, on
    numbers too.
    """

    what: str
    vocabulary: Callable[[], Mapping[str, type[Any]]]
    operators: Mapping[type[ast.operator], Callable[[Any, Any], Any]]
    expected: Callable[[], str]
    literal: Callable[[], str]
    noun: str = ""
    hint: str = ""
    factors: bool = False

    def made(self, node: ast.expr) -> Any:
        """What a call, or an operation on calls, makes. Raises: SchemeError naming what was not understood, and
        where.
        """
        if isinstance(node, ast.BinOp) and type(node.op) in self.operators:
            left, right = self._operand(node.left), self._operand(node.right)
            try:
                return self.operators[type(node.op)](left, right)
            except TypeError as error:
                raise self._refused(self.expected(), node, self.hint) from error
        if isinstance(node, ast.Name):
            return self._instance(node, node.id, [], [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._instance(node, node.func.id, node.args, node.keywords)
        raise self._refused(self.expected(), node, self.hint)

    def value(self, node: ast.expr) -> Any:
        """An argument: a number, a text, a truth value, None, a tuple of arguments, or what a call makes."""
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        if ast.unparse(node) in ("inf", "float('inf')"):
            return float("inf")
        operation = isinstance(node, ast.BinOp) and type(node.op) in self.operators
        return self.made(node) if operation or isinstance(node, ast.Call | ast.Name) else self._literal(node)

    def _operand(self, node: ast.expr) -> Any:
        is_known = isinstance(node, ast.Name) and node.id in self.vocabulary()
        if self.factors and not (is_known or isinstance(node, ast.Call | ast.BinOp)):
            return self._literal(node)
        return self.made(node)

    def _literal(self, node: ast.expr) -> Any:
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError) as error:
            raise self._refused(self.literal(), node) from error
        if isinstance(value, list | dict | set):
            raise self._refused("a number, a text, a truth value, None or a tuple of these", node)
        return value

    def _instance(self, node: ast.expr, name: str, args: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> Any:
        """The instance of a class that a call describes, its arguments of the types the class annotates.

        A class whose constructor takes `**arguments` is given any. Raises: SchemeError naming a class that is not
        known or an argument that the class does not have, with the nearest spelling, that is given twice or of another
        type.
        """
        cls = self._class(node, name, args, keywords)
        signature = inspect.signature(cls).parameters
        parameters = [one for one in signature if signature[one].kind is not inspect.Parameter.VAR_KEYWORD]
        open_ended, what = len(parameters) < len(signature), f"{self.what}: {name}"
        if len(args) > len(parameters):
            raise SchemeError(f"{what} takes {len(parameters)} arguments, got {len(args)} in {where(node)}")
        values = {parameter: self.value(arg) for parameter, arg in zip(parameters, args, strict=False)}
        for keyword in keywords:
            if keyword.arg is None or (keyword.arg not in parameters and not open_ended):
                raise SchemeError(f"{what} has no argument {keyword.arg!r}{nearest(str(keyword.arg), parameters)}")
            if keyword.arg in values:
                raise SchemeError(f"{what} got {keyword.arg!r} twice in {where(node)}")
            values[keyword.arg] = self.value(keyword.value)
        try:
            made = cls(**values)
        except LaconicError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
            check_values(what, cls, values)  # a check of the class's own met a value of another type
            raise SchemeError(f"{self.what}: {where(node)}: {error}") from error
        check_values(what, cls, values)
        return made

    def _class(self, node: ast.expr, name: str, args: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> type[Any]:
        known = self.vocabulary()
        if name in known:
            return known[name]
        unknown = f"{self.what}: unknown {self.noun}{name!r}"
        for right in known:
            if right.upper() == name.upper():
                call = ast.Call(ast.Name(right), list(args), list(keywords))
                raise SchemeError(f"{unknown}; did you mean {right}({ast.unparse(call).partition('(')[2]}?")
        raise SchemeError(f"{unknown} in {where(node)}{nearest(name, list(known))}")

    def _refused(self, expected: str, node: ast.expr, hint: str = "") -> SchemeError:
        return SchemeError(f"{self.what}: expected {expected}, got {where(node)}{hint}")


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
