"""`laconic methods`."""

from rich.table import Table

from laconic.command.console import markup
from laconic.command.listing import list_methods
from laconic.command.options import JsonOption
from laconic.command.output import emit, out_console


def methods(as_json: JsonOption = False) -> None:
    """List the methods a scheme can use, with one line each."""
    found = list_methods()
    if as_json:
        emit(found)
        return
    table = Table(header_style="bold")
    table.add_column("method")
    table.add_column("what it does, and its arguments")
    for name, entry in found.items():
        table.add_row(name, f"{markup(entry['does'])}\n[dim]{markup(', '.join(entry['arguments']))}[/]")
    out_console.print(table)
