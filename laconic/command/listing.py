"""The methods and their arguments, read from their source text: `laconic methods` answers without loading PyTorch."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

_COMPOSED = ("Then", "Plus")  # written as >> and +
_BESIDE = {"laconic.scheme.keep": "Keep"}  # what stands in a scheme where a method does


@dataclass(frozen=True)
class _Class:
    """What a class body says: its own hyper-parameters in order, what it leaves abstract and what it defines."""

    module: str
    node: ast.ClassDef
    arguments: dict[str, str] = field(default_factory=dict)
    abstract: frozenset[str] = frozenset()


def list_methods() -> dict[str, dict[str, Any]]:
    """Of every method, and of `Keep`, by name: `does`, the first sentence of its docstring, and `arguments`, as
    `name: type = default`.

    The names are those of `scheme.text.vocabulary()`, the arguments those of the classes' signatures; aliases of types
    are resolved.
    """
    folder = resources.files("laconic") / "methods"
    modules = sorted(f"laconic.methods.{file.name[:-3]}" for file in folder.iterdir() if file.name.endswith(".py"))
    found = {}
    for module in (*modules, *_BESIDE):
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef) and _is_listed(module, node):
                made = _class(module, node)
                if not made.abstract:
                    found[node.name] = {
                        "does": first_sentence(ast.get_docstring(node) or ""),
                        "arguments": list(made.arguments.values()),
                    }
    return dict(sorted(found.items()))


def first_sentence(text: str) -> str:
    """The first lines of a docstring, up to one that ends with a full stop, as one line."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        lines.append(line.strip())
        if line.endswith("."):
            break
    return " ".join(lines)


def takers(argument: str) -> list[str]:
    """The methods that have an argument of this name."""
    return [
        name
        for name, entry in list_methods().items()
        if any(text.split(":")[0] == argument for text in entry["arguments"])
    ]


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _file(module: str) -> Traversable:
    """A module's source; from the top package, since one in between would be imported, and PyTorch with it."""
    *packages, name = module.split(".")[1:]
    return resources.files("laconic").joinpath(*packages, f"{name}.py")


def _is_listed(module: str, node: ast.ClassDef) -> bool:
    """Whether a class is what a scheme calls by its name."""
    return _BESIDE.get(module) == node.name or (node.name not in _COMPOSED and _is_method(module, node))


def _is_method(module: str, node: ast.ClassDef) -> bool:
    """Whether a class descends from `Method`, which is not one itself."""
    return any(base.node.name == "Method" or _is_method(base.module, base.node) for base in _bases(module, node))


def _class(module: str, node: ast.ClassDef) -> _Class:
    """A class with what it inherits, as `dataclass` and `ABC` put it together."""
    arguments: dict[str, str] = {}
    abstract: set[str] = set()
    for base in _bases(module, node):
        inherited = _class(base.module, base.node)
        arguments |= inherited.arguments
        abstract |= inherited.abstract
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            abstract.discard(item.name)
            if any(isinstance(mark, ast.Name) and mark.id == "abstractmethod" for mark in item.decorator_list):
                abstract.add(item.name)
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and not ast.unparse(item.annotation).startswith("ClassVar")
        ):
            arguments[item.target.id] = f"{item.target.id}: {_spelled(module, item.annotation)}{_default(item.value)}"
    return _Class(module, node, arguments, frozenset(abstract))


def _default(value: ast.expr | None) -> str:
    """A default as the end of an argument's text; of `field(default=...)` what it says there."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    return "" if value is None else f" = {ast.unparse(value)}"


def _bases(module: str, node: ast.ClassDef) -> Iterator[_Class]:
    for base in node.bases:
        home, found = _named(module, ast.unparse(base))
        if isinstance(found, ast.ClassDef):
            yield _Class(home, found)


def _named(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """The statement that gives a module's name its meaning, and the module it stands in; None where that is outside of
    this package.
    """
    for item in _tree(module).body:
        if isinstance(item, ast.ClassDef) and item.name == name:
            return module, item
        if isinstance(item, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in item.targets
        ):
            return module, item
        if (
            isinstance(item, ast.ImportFrom)
            and str(item.module).startswith("laconic.")
            and any(alias.name == name for alias in item.names)
        ):
            return _named(f"{item.module}", name) if _file(str(item.module)).is_file() else (module, None)
    return module, None


def _spelled(module: str, annotation: ast.expr) -> str:
    """A type as text, with names such as `Group` replaced by what they stand for."""

    class Resolve(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            home, found = _named(module, node.id)
            return ast.parse(_spelled(home, found.value), mode="eval").body if isinstance(found, ast.Assign) else node

    return ast.unparse(Resolve().visit(ast.parse(ast.unparse(annotation), mode="eval").body))
