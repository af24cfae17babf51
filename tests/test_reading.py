"""The package reads as agreed, as far as tools/reading.py can count it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """The figures of every room."""
    spec = importlib.util.spec_from_file_location("reading", ROOT / "tools" / "reading.py")
    assert spec is not None
    assert spec.loader is not None
    reading: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reading)
    rooms: dict[str, Any] = {}
    for file in sorted(reading.ROOT.rglob("*.py")):
        inside = file.relative_to(reading.ROOT).parts
        rooms.setdefault(inside[0] if len(inside) > 1 else "(root)", reading.Figures()).add(file)
    return rooms


def test_public_functions_that_take_a_tensor_say_its_shape(counted: dict[str, Any]) -> None:
    silent = sum(len(figures.places["shapes"]) for figures in counted.values())
    assert silent <= 0.2 * sum(figures.tensors for figures in counted.values())
