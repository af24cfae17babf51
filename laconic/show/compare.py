"""Several compressed models of one original side by side: a table and a plot, as one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from laconic.disk.files import write_text
from laconic.engine.report import Report
from laconic.show.page import fill_page, inline_svg


def row_of(report: Report, family: str, link: str = "") -> dict[str, Any]:
    """What a comparison shows of one run. `family` names the runs that one line of the plot joins."""
    m = report.metrics
    return {
        "family": family,
        "scheme": report["scheme"],
        "stored_bytes": report.stored_bytes,
        "bits_per_weight": report.bits_per_weight,
        "matrix_bits": report.matrix_bits,
        "perplexity": m["perplexity"],
        "perplexity_interval": m["perplexity_interval"],
        "kl": m["kl"],
        "kl_interval": m["kl_interval"],
        "top1": m["top1"],
        "seconds": report["seconds"],
        "link": link,
    }


def quality_plot(rows: Sequence[dict[str, Any]], x: str = "matrix_bits", y: str = "kl") -> str:
    """KL divergence (log axis) against stored bits per weight as inline SVG; a line per family, through its rows in
    order of size.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(row["family"] for row in rows))
    for i, family in enumerate(families):
        points = sorted((row[x], row[y]) for row in rows if row["family"] == family)
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "os^Dv*P"[i % 7] + "-",
            color=f"C{i % 10}",
            label=family,
            markersize=6,
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight in the compressed matrices, scales and tables included")
    axes.set_ylabel("KL from the original, nats per token")
    axes.grid(color="0.88", linewidth=0.6, which="both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return inline_svg(figure)


def write_comparison(
    file: Path,
    title: str,
    facts: dict[str, str],
    reference: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    words: list[str],
) -> None:
    """Write the page. `facts` are shown as a small table (model, data, command, versions), `words` as paragraphs before
    the table.
    """
    values = {
        "title": title,
        "facts": facts,
        "reference": reference,
        "rows": rows,
        "words": words,
        "plot": quality_plot(rows),
    }
    write_text(file, fill_page("comparison.html.j2", **values))
