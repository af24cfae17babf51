"""`laconic demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from laconic.command.console import Terminal, markup
from laconic.command.group import guard
from laconic.command.options import JsonOption
from laconic.command.output import emit, err, out_console
from laconic.command.shown import shown
from laconic.host.units import human_bytes


def demo(
    out: Annotated[Path, typer.Option(help="Where the compressed models and reports go.")] = Path("laconic-demo"),
    samples: Annotated[int, typer.Option(min=8, help="Calibration windows.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Compress the small language model that comes with the package at 4, 3 and 2 bits with three schemes, and
    compare.
    """

    def work() -> None:
        from laconic.demo.demo import run_demo

        with Terminal(quiet=as_json, brief=True) as terminal:
            result = run_demo(out, samples, terminal)
        if as_json:
            emit(result)
            return
        out_console.print(comparison(result))
        err.print(f"page: {shown(out / 'index.html')}", markup=False)

    guard(work, "; nothing to clean up: a new demo starts over")


def comparison(result: dict[str, Any]) -> Table:
    """The rows of a demo as a table; the best of each size in bold."""
    table = Table(
        header_style="bold",
        caption="KL from the original in nats per token; ranges: 95 % bootstrap; bold: the least KL at a size",
    )
    table.add_column("scheme", no_wrap=True)
    for name in ("files", "bits/weight", "in matrices", "perplexity", "KL", "same first token", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    r = result["reference"]
    table.add_row(
        markup(r["name"]),
        human_bytes(r["bytes"]),
        f"{r['bits_per_weight']:.3f}",
        "",
        f"{r['perplexity']:.3f}",
        "0",
        "100.0 %",
        "",
    )
    for row in result["rows"]:
        if row["first"]:
            table.add_section()
        low, high = row["kl_interval"]
        table.add_row(
            markup(row["scheme"]),
            human_bytes(row["stored_bytes"]),
            f"{row['bits_per_weight']:.3f}",
            f"{row['matrix_bits']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f} ({low:.4f} to {high:.4f})",
            f"{100 * row['top1']:.1f} %",
            f"{row['seconds']:.0f}",
            style="bold" if row["best"] else None,
        )
    return table
