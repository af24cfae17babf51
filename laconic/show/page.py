"""The run report on disk: the numbers as JSON, and the same as one HTML page that needs nothing else."""

import io
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure

from laconic.disk.files import write_json, write_text
from laconic.disk.ours import REPORT_HTML, REPORT_JSON
from laconic.engine.report import Report, by_class
from laconic.host.told import SiteRecord
from laconic.host.units import human_bytes


def write_report(out: Path, report: Report, samples: list[dict[str, str]]) -> None:
    """Write report.json and report.html into the model's directory."""
    values = report.as_dict() | {"samples": samples}
    write_json(out / REPORT_JSON, values, indent=1)
    write_text(out / REPORT_HTML, render(Report(report.values | {"samples": samples})))


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    return fill_page(
        "report.html.j2",
        r=report,
        v=report.values,
        m=report.metrics,
        classes=by_class(report),
        plot=_plot(report.records),
        experts=_experts(report),
        notes=report.notes,
    )


def fill_page(template: str, **values: Any) -> str:
    """One of the package's templates as an HTML page; every value is escaped unless the template calls it safe."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "g": lambda x: f"{x:.4g}", "count": lambda x: f"{x:,}"}
    return environment.from_string(
        (resources.files("laconic.show") / "templates" / template).read_text(encoding="utf-8")
    ).render(**values)


def inline_svg(figure: Figure) -> str:
    """A figure as an SVG element to stand in a page, the same bytes at any time."""
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": "laconic"}):  # without one, the names of shapes are drawn anew each time
        figure.savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _experts(report: Report) -> list[dict[str, Any]]:
    """The packed experts' sites, with those no calibration token reached."""
    found = [(record.name, record.expert_tokens) for record in report.records if record.expert_tokens is not None]
    return [
        {"name": name, "expert_tokens": tokens, "missing": [i for i, seen in enumerate(tokens) if seen == 0]}
        for name, tokens in found
    ]


def _plot(sites: list[SiteRecord]) -> str:
    """Bits per weight and relative output error of every site in the model's order, as inline SVG; a colour per kind of
    layer.
    """
    if not sites:
        return ""
    kinds = list(dict.fromkeys(_layer_kind(site.name) for site in sites))
    colours = {kind: f"C{i % 10}" for i, kind in enumerate(kinds)}
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    bits, error = figure.subplots(2, 1, sharex=True)
    for kind in kinds:
        at = [i for i, site in enumerate(sites) if _layer_kind(site.name) == kind]
        bits.bar(
            at,
            [sites[i].bits_per_weight for i in at],
            color=colours[kind],
            label=kind.replace("$", r"\$"),
            width=0.8,
        )
        error.plot(at, [max(sites[i].error, 1e-12) for i in at], "o", color=colours[kind], markersize=4)
    bits.set_ylabel("bits per weight")
    error.set_ylabel("relative output error")
    error.set_yscale("log")
    error.set_xlabel("site, in the model's order")
    for axes in (bits, error):
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for i in _block_starts(sites):
            axes.axvline(i - 0.5, color="0.8", linewidth=0.6, zorder=0)
    if len(kinds) <= 14:
        figure.legend(loc="outside upper center", ncols=min(len(kinds), 7), frameon=False)
    return inline_svg(figure)


def _layer_kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _block_starts(sites: list[SiteRecord]) -> Iterator[int]:
    block = None
    for i, site in enumerate(sites):
        number = next((part for part in site.name.split(".") if part.isdigit()), None)
        if number != block and i:
            yield i
        block = number
