"""How easy the package is to read, in figures: `python tools/reading.py [--list WHAT] [ROOM...]`.

Per room: lines, their mean length, lines over 120 characters, functions over 60 lines, calls with more than 5 positional
arguments, and of the public functions that take a tensor the share whose docstring names shapes ("[out, in]", or "any
shape"). States, which are tensors by name, have none; an override without a docstring has that of its interface, and is
not counted. `--list long | functions | calls | shapes` names the places.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1] / "laconic"
LINE, FUNCTION, ARGUMENTS = 120, 60, 5
SHAPE = re.compile(r"\[[a-zA-Z0-9_*]+(?:( or |, | / | x )[^\]]*)?\]|\[\.\.\.[^\]]*\]|\bany shape\b")
STATE = re.compile(r"(dict|Mapping)\[[^\[\]]*Tensor\]")
KINDS = ("long", "functions", "calls", "shapes")


@dataclass
class Figures:
    """What is counted in some files; `places` of each kind in the order they were found."""

    lines: int = 0
    letters: int = 0
    tensors: int = 0
    places: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, file: Path) -> None:
        text = file.read_text()
        name = file.relative_to(ROOT.parent)
        for number, line in enumerate(text.splitlines(), 1):
            self.lines += 1
            self.letters += len(line)
            if len(line) > LINE:
                self.places["long"].append(f"{name}:{number}: {len(line)} characters")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (size := node.end_lineno - node.lineno + 1) > FUNCTION:  # type: ignore[operator]
                self.places["functions"].append(f"{name}:{node.lineno}: {node.name}, {size} lines")
            if isinstance(node, ast.Call) and len(node.args) > ARGUMENTS:
                called = ast.unparse(node.func)
                self.places["calls"].append(f"{name}:{node.lineno}: {called}, {len(node.args)} arguments")
        for function in takers(tree):
            self.tensors += 1
            if not SHAPE.search(ast.get_docstring(function) or ""):
                self.places["shapes"].append(f"{name}:{function.lineno}: {function.name}")

    def row(self, name: str) -> str:
        share = 1 - len(self.places["shapes"]) / self.tensors if self.tensors else 1.0
        mean = self.letters / max(self.lines, 1)
        counts = " ".join(f"{len(self.places[kind]):>9}" for kind in ("long", "functions", "calls"))
        return f"{name:<12} {self.lines:>7} {mean:>7.1f} {counts} {self.tensors:>9} {share:>8.0%}"


def takers(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The public functions and methods that have a parameter whose type names a Tensor."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            if is_taker(node):
                yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and is_taker(inner) and not (node.bases and no_words(inner)):
                    yield inner


def is_taker(function: ast.FunctionDef) -> bool:
    parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    types = [ast.unparse(p.annotation) for p in parameters if p.annotation is not None]
    public = not function.name.startswith("_") and not any(
        "overload" in ast.unparse(d) for d in function.decorator_list
    )
    return public and any(re.search(r"\bTensor\b", STATE.sub("", text)) for text in types)


def no_words(function: ast.FunctionDef) -> bool:
    return ast.get_docstring(function) is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*")
    parser.add_argument("--list", choices=KINDS)
    asked = parser.parse_args()
    whole, rooms = Figures(), dict[str, Figures]()
    for file in sorted(ROOT.rglob("*.py")):
        inside = file.relative_to(ROOT).parts
        room = inside[0] if len(inside) > 1 else "(root)"
        if asked.rooms and room not in asked.rooms:
            continue
        rooms.setdefault(room, Figures()).add(file)
        whole.add(file)
    if asked.list is not None:
        print("\n".join(whole.places[asked.list]))
        return
    print(f"{'':<12} {'lines':>7} {'mean':>7} {'> 120':>9} {'> 60 l.':>9} {'> 5 args':>9} {'tensors':>9} {'shapes':>8}")
    for name, figures in rooms.items():
        print(figures.row(name))
    print(whole.row("all"))


if __name__ == "__main__":
    main()
