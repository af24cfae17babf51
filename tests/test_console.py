"""What a run draws on a terminal."""

import io

import pytest
from rich.console import Console

from laconic.command.console import Terminal, markup, terminal_console
from laconic.host.told import SiteRecord

RECORD = SiteRecord(
    name="block.0.[up]",
    aliases=[],
    parameter="block.0.up.weight",
    shape=[4, 8],
    role="body",
    method="RTN(bits=3)",
    kind="uniform",
    bits=100,
    bits_per_weight=3.125,
    error=0.0123,
    weight_error=0.1,
    checksum=0,
    notes=["no token reached it"],
    seconds=0.5,
)


def drawn(terminal: Terminal) -> io.StringIO:
    """Where a terminal draws to from now on."""
    text = io.StringIO()
    terminal.console = Console(file=text, width=200, highlight=False)
    return text


def test_a_site_is_a_line_with_its_notes() -> None:
    terminal = Terminal()
    text = drawn(terminal)
    terminal.site(RECORD)
    line, note = text.getvalue().splitlines()
    assert line.split() == ["block.0.[up]", "3.125", "bits", "output", "error", "1.230e-02", "0.50", "s"]
    assert note == "note no token reached it"


@pytest.mark.parametrize("how", [{"quiet": True}, {"brief": True}])
def test_without_lines_the_notes_are_told_all_the_same(how: dict[str, bool]) -> None:
    terminal = Terminal(**how)
    text = drawn(terminal)
    terminal.site(RECORD)
    terminal.say("the disk is nearly full")
    assert text.getvalue().splitlines() == ["note no token reached it", "note the disk is nearly full"]


def test_the_bar_follows_one_task_after_the_other() -> None:
    terminal = Terminal(quiet=True)
    with terminal:
        terminal.advance(1, "before any task")
        terminal.start("surveying", 4)
        terminal.advance(1.5, "block 1")
        (task,) = terminal.bar.tasks
        assert (task.description, task.completed, task.total, task.fields["note"]) == ("surveying", 1.5, 4, "block 1")
        terminal.start("compressing [all]", 8)
        (task,) = terminal.bar.tasks
        assert (task.description, task.completed, task.total) == (r"compressing \[all]", 0, 8)


def test_outside_a_terminal_a_line_per_site_has_room(capsys: pytest.CaptureFixture[str]) -> None:
    terminal_console().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"


def test_text_from_outside_is_no_style() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(markup("[bold]name[/bold]\x1b[2J"))
    assert text.getvalue() == "[bold]name[/bold]\\x1b[2J\n"
