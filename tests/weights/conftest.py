"""Laws are run for every example of the class they stand in."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The `name` of a case is that of each of the class's `examples`."""
    examples = getattr(metafunc.cls, "examples", None)
    if examples is not None and "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(examples))
