"""`laconic inspect`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from laconic.command.console import markup
from laconic.command.group import guard
from laconic.command.options import JsonOption
from laconic.command.output import emit, out_console


def inspect(
    path: Annotated[Path, typer.Argument(help="A compressed directory.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every tensor and compare it with its checksum, about a second per GB."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List every weight of a compressed model with its kind, bits, bytes and error; the rows add up to the files."""

    def work() -> None:
        from laconic.show.inspect import inspect_directory

        found = inspect_directory(path, verify=verify)
        if as_json:
            emit(found)
            return
        table = Table(title=markup(f"{path}: {found['scheme']}"), title_justify="left", header_style="bold")
        for name in ("weight", "kind"):
            table.add_column(name, overflow="fold")
        for name in ("shape", "bits", "bytes", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in found["weights"]:
            error = "" if row["error"] is None else f"{row['error']:.2e}"
            table.add_row(
                markup(row["name"]),
                markup(row["kind"]),
                " x ".join(map(str, row["shape"])),
                f"{row['bits_per_weight']:.3f}",
                f"{row['bytes']:,}",
                error,
            )
        for row in found["plain"]:
            table.add_row(
                markup(row["name"]),
                markup(row["kind"]),
                " x ".join(map(str, row["shape"])),
                "",
                f"{row['bytes']:,}",
                "",
            )
        table.add_row("headers, index and manifest", "container", "", "", f"{found['container_bytes']:,}", "")
        table.add_row("[bold]model[/]", "", "", "", f"[bold]{found['bytes']:,}[/]", "")
        for name, size in found["other_files"].items():
            table.add_row(f"[dim]{markup(name)}[/]", "[dim]not counted[/]", "", "", f"[dim]{size:,}[/]", "")
        out_console.print(table)
        if found["plan"]:
            plan = Table(title="plan", title_justify="left", header_style="bold")
            plan.add_column("sites", overflow="fold")
            plan.add_column("method", overflow="fold")
            for name, text in found["plan"].items():
                plan.add_row(markup(name), markup(text))
            out_console.print(plan)
        if verify:
            none = "not verified: written by an earlier version, without checksums"
            out_console.print(
                f"verified: {found['verified']:,} bytes are those that were written" if found["verified"] else none
            )

    guard(work)
