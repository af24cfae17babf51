"""Where a command's output goes: results to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from laconic.command.console import markup, terminal_console
from laconic.command.shown import shown

err = terminal_console(stderr=True)
out_console = terminal_console()


def emit(value: dict[str, Any]) -> None:
    """Print a result as JSON, on a line of its own."""
    sys.stdout.write(json.dumps(value) + "\n")


def note(text: object) -> None:
    """What the user should know, on stderr."""
    err.print(Text.assemble(("note ", "yellow"), shown(text)), soft_wrap=True)


def print_rows(rows: Sequence[tuple[object, object]], *columns: str) -> None:
    """Names and values as a table on stdout, with a header where columns are named."""
    table = Table(header_style="bold", show_header=bool(columns))
    table.add_column(columns[0] if columns else "")
    table.add_column(columns[1] if columns else "", justify="right")
    for name, value in rows:
        table.add_row(markup(name), markup(value))
    out_console.print(table)
