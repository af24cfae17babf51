"""What a test needs beside the package: skipped without it, or failed where the environment says that it has to be there.

LACONIC_REQUIRE names what must not be missing, separated by commas: `extras` (packages that `make setup` installs), `shared` (the team's
models and data). Continuous integration requires the extras, so that no test is skipped there for want of one.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

KINDS = ("extras", "shared")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def is_required(kind: str) -> bool:
    named = [word.strip() for word in os.environ.get("LACONIC_REQUIRE", "").split(",") if word.strip()]
    unknown = set(named) - set(KINDS)
    assert not unknown, f"LACONIC_REQUIRE names {sorted(unknown)}; known: {', '.join(KINDS)}"
    return kind in named


def extra(package: str) -> ModuleType:
    """A package of one of the extras. Without it the test, or the file that asks for it as a whole, is skipped, or fails."""
    if is_required("extras"):
        return importlib.import_module(package)
    module: ModuleType = pytest.importorskip(package, reason=f"{package} is not installed: make setup")
    return module


def shared_folder(folder: Path = SHARED) -> Path:
    """The team's models and data. Without them the test is skipped, or fails."""
    if not (folder / "models").is_dir():
        (pytest.fail if is_required("shared") else pytest.skip)(f"{folder}: no models and data of the team's there")
    return folder
