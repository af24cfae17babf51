"""The page on recovery: its example runs, its tables of arguments are the signatures."""

import inspect
from typing import Any

import pytest
import torch

from laconic.recover import LC, Direct, FineTune, Steps
from tests.test_docs import DOCS, blocks, rows

PAGE = DOCS / "recovery.md"


def test_it_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(PAGE, "python"):
            exec(compile(code, PAGE.name, "exec"), names)


@pytest.mark.parametrize("made", [LC, Steps])
def test_tables_of_arguments_are_the_signatures(made: Any) -> None:
    written: dict[str, str] = {}
    for first, second, *_ in rows(PAGE.read_text(encoding="utf-8")):
        written |= dict(zip(first.replace("`", "").split(", "), second.replace("`", "").split(", "), strict=False))
    for name, parameter in inspect.signature(made).parameters.items():
        default = "Steps()" if name == "learn" else repr(parameter.default)
        assert written[name] == default, name


@pytest.mark.parametrize("made", [FineTune, Direct])
def test_signatures_in_the_text(made: Any) -> None:
    shown = ", ".join(
        f"{n}={'Steps()' if n == 'learn' else repr(p.default)}" for n, p in inspect.signature(made).parameters.items()
    )
    assert f"`lc.{made.__name__}({shown})`" in PAGE.read_text(encoding="utf-8")
