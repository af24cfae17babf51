"""A recovery as text: `LC(steps=10, minibatches=50, then=FineTune(200))`, parsed and never evaluated."""

import ast
from typing import Any

from laconic.errors import SchemeError
from laconic.recover.call import How
from laconic.recover.finetune import Direct, FineTune
from laconic.recover.lc import LC
from laconic.recover.train import Steps
from laconic.scheme.expressions import instance, nearest, parsed

_KNOWN: dict[str, Any] = {"LC": LC, "FineTune": FineTune, "Direct": Direct, "Steps": Steps}


def parse_recovery(text: str) -> How:
    """The recovery a Python expression describes: calls of LC, FineTune, Direct and Steps with literals.

    Raises: SchemeError naming what was not understood, with the nearest spelling of an unknown name.
    """
    found = _build(parsed("recovery", text))
    if not isinstance(found, LC | FineTune | Direct):
        raise SchemeError(f"recovery {text!r}: expected LC(...), FineTune(...) or Direct()")
    return found


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise SchemeError(
                f"recovery: expected a number, a text or one of {', '.join(_KNOWN)}, got {ast.unparse(node)!r}"
            ) from error
    made = _KNOWN.get(node.func.id)
    if made is None:
        raise SchemeError(f"recovery: unknown {node.func.id!r}{nearest(node.func.id, list(_KNOWN))}")
    return instance("recovery", node, made, node.args, node.keywords, _build)
