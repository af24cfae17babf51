"""The rooms of the package and what every file in them is, by its own first sentence: `python tools/rooms.py [ROOM...]`.

Rooms come in the order in which they build on each other (tests/test_rooms.py), the lowest first.
"""

import argparse
import ast
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.test_rooms import ROOMS, ROOT


def sentence(file: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*")
    asked = parser.parse_args().rooms
    for room in ROOMS:
        if asked and room not in asked:
            continue
        folder = ROOT / room
        if not folder.is_dir():
            continue
        print(f"\n{room}/  {sentence(folder / '__init__.py')}")
        for file in sorted(folder.glob("*.py")):
            if file.stem != "__init__":
                print(
                    textwrap.fill(
                        sentence(file), 118, initial_indent=f"    {file.stem:<14} ", subsequent_indent=" " * 19
                    )
                )


if __name__ == "__main__":
    main()
