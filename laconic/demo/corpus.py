"""The text every Python installation carries: the standard library's sources, docstrings and help topics.

The reference model in `laconic/demo/model` is trained on it, and the demo calibrates and evaluates on it. Whole modules
are held out: nothing of `HELD_OUT` is ever in the training or calibration text, whatever the Python version.
"""

import sysconfig
from pathlib import Path

from laconic.errors import DataError

HELD_OUT = (
    "argparse",
    "bisect",
    "calendar",
    "configparser",
    "csv",
    "fractions",
    "heapq",
    "queue",
    "shlex",
    "statistics",
    "textwrap",
)
"""Modules used for evaluation only. Each is one source file that has been in Python for years."""

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "lib2to3",
    "turtledemo",
}
"""Not the standard library (site-packages), not prose or plain code (encodings' tables), or gone from newer Pythons."""


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder in _SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
            files.append(path)
    if not files:
        raise DataError(
            f"{root}: expected the standard library's .py sources there, found none; pass a text with --data"
        )
    return files


def _is_held_out(path: Path) -> bool:
    return path.stem in HELD_OUT and path.parent == Path(sysconfig.get_paths()["stdlib"])


def training_text() -> list[str]:
    """The sources of every module that is not held out, a string each, in path order.

    Raises: DataError when the interpreter was installed without its sources.
    """
    return [path.read_text(encoding="utf-8", errors="replace") for path in _sources() if not _is_held_out(path)]


def held_out_text() -> list[str]:
    """The sources of the held-out modules, a string each, in path order."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in _sources() if _is_held_out(path)]


def topics_text() -> list[str]:
    """The help topics of `pydoc` (reStructuredText of the language reference), a string each."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
