"""The page on recovery: its example runs, its tables of arguments are the signatures."""

import inspect
import re
from typing import Any

import pytest
import torch

from laconic.recover import LC, AdaRound, Blockwise, Direct, FineTune, Steps
from tests.test_docs import DOCS, blocks, rows

PAGE = DOCS / "recovery.md"


def test_it_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(PAGE, "python"):
            exec(compile(code, PAGE.name, "exec"), names)


def table_below(words: str) -> list[list[str]]:
    """The cells of the first table behind some words of the page."""
    behind = PAGE.read_text(encoding="utf-8").split(words, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", behind, re.M)
    assert table is not None
    return rows(table.group())


@pytest.mark.parametrize("made", [LC, Steps])
def test_tables_of_arguments_are_the_signatures(made: Any) -> None:
    written: dict[str, str] = {}
    for first, second, *_ in table_below(f"`lc.{made.__name__}(...)`:"):
        written |= dict(zip(first.replace("`", "").split(", "), second.replace("`", "").split(", "), strict=False))
    for name, parameter in inspect.signature(made).parameters.items():
        default = "Steps()" if name == "learn" else repr(parameter.default)
        assert written[name] == default, name


@pytest.mark.parametrize(("made", "column"), [(AdaRound, 1), (Blockwise, 2)])
def test_the_table_of_block_reconstruction(made: Any, column: int) -> None:
    """What both have is in the table; what one has of its own is named below it."""
    written = {row[0].strip("`"): row[column] for row in table_below("Arguments of both:")}
    text = PAGE.read_text(encoding="utf-8")
    for name, parameter in inspect.signature(made).parameters.items():
        if name == "learn":
            assert f"`{made().learn.lr}`" in written[name]
        elif name in written:
            assert written[name] == f"`{parameter.default!r}`", name
        else:
            assert f"`{name}={parameter.default!r}`" in text, name


@pytest.mark.parametrize("made", [FineTune, Direct])
def test_signatures_in_the_text(made: Any) -> None:
    shown = ", ".join(
        f"{n}={'Steps()' if n == 'learn' else repr(p.default)}" for n, p in inspect.signature(made).parameters.items()
    )
    assert f"`lc.{made.__name__}({shown})`" in PAGE.read_text(encoding="utf-8")
