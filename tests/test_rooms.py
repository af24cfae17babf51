"""The rooms of the package: imports go one way, in no circle, and nothing that computes imports what draws."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "laconic"
ROOMS = (
    "errors", "version", "host", "weights", "model", "solvers", "clustering", "methods", "scheme", "disk", "data", "surgery", "engine",
    "measure", "offload", "recover", "show", "search", "conclude", "pipeline", "api", "laconic", "demo", "command", "__main__",
)  # fmt: skip
"""Every room and every file of the root, each of which imports only from those before it."""
DRAWN = ("laconic.show", "matplotlib", "jinja2")
DRAWERS = ("laconic.show", "laconic.command", "laconic.demo", "laconic.conclude", "laconic.search.call")
"""Who may import what draws: pages themselves, and those who carry finished figures to them."""
TERMINAL = ("rich", "typer")


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; `typing` if only type checkers see it."""

    module: str
    target: str
    typing: bool


@cache
def modules() -> dict[str, Path]:
    found = {}
    for file in ROOT.rglob("*.py"):
        name = ".".join(("laconic", *file.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = file
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package, those inside functions too."""
    return tuple(one for name, file in modules().items() for one in _of(name, ast.parse(file.read_text()), False))


def _of(module: str, node: ast.AST, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{module}: a relative import"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(module, inner if inner in modules() else str(child.module), typing)
        only_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _of(module, child, typing or only_types)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def test_every_room_is_known() -> None:
    assert {room(module) for module in modules()} == set(ROOMS)


def test_imports_go_one_way_from_room_to_room() -> None:
    against = [
        f"{one.module} imports {one.target}"
        for one in imports()
        if one.target.startswith("laconic.") and ROOMS.index(room(one.module)) < ROOMS.index(room(one.target))
    ]
    assert against == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count: an import that waits is a circle all the same. Those of type checkers alone do not."""
    edges: dict[str, set[str]] = {module: set() for module in modules()}
    for one in imports():
        if not one.typing and one.target in edges and one.target != one.module:
            edges[one.module].add(one.target)
    left = dict(edges)
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    assert left == {}, "these, or some of these, import each other"


def test_nothing_that_computes_imports_what_draws() -> None:
    drawing = [one for one in imports() if is_in(one.target, DRAWN) and not is_in(one.module, DRAWERS)]
    assert drawing == []


def test_only_commands_draw_on_a_terminal() -> None:
    drawing = [one for one in imports() if is_in(one.target, TERMINAL) and room(one.module) != "command"]
    assert drawing == []


def test_weights_import_nothing_but_the_tensor_libraries() -> None:
    """A weight can be read where no other library of models is installed."""
    foreign = [
        one
        for one in imports()
        if room(one.module) == "weights" and is_in(one.target, ("transformers", "huggingface_hub"))
    ]
    assert foreign == []
