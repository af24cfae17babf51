"""The run report: the numbers as JSON, and the same as one HTML page that needs nothing else."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from laconic.coverage import coverage_line
from laconic.files import write_json, write_text
from laconic.load import Checkpoint, load, load_tokenizer
from laconic.modality import most_positions
from laconic.residence import Residence
from laconic.units import human_bytes

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
_PROMPT, _ANSWER = 24, 60  # tokens of the generation sample
_WORST = 10
_DERIVED = ("bits_per_weight", "matrix_bits", "worst", "by_class")  # of the values


@dataclass(frozen=True)
class Report:
    """Everything a run measured, as plain values (`report["metrics"]`), with the few figures people ask for as properties."""

    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def sites(self) -> list[dict[str, Any]]:
        """A record per compressed site: name, shape, method, bits, relative output error, notes."""
        return self.values["sites"]

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured of the stored model against the original."""
        return self.values["metrics"]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the model's files; of a module in memory, what `save` will write, but for file headers."""
        return self.values.get("stored_bytes", self.values["expected_bytes"])

    @property
    def bits_per_weight(self) -> float:
        """Stored bytes x 8 / the original's parameters."""
        return 8 * self.stored_bytes / self.values["parameters"]

    @property
    def matrix_bits(self) -> float:
        """Stored bits per weight of the compressed matrices of the body, scales, tables and indices included; without any, of all sites."""
        body = [site for site in self.sites if site["role"] == "body"] or self.sites
        entries = sum(site["shape"][0] * site["shape"][1] for site in body)
        return sum(site["bits"] for site in body) / max(entries, 1)

    @property
    def coverage(self) -> str:
        """What share of the parameters is compressed, kept by choice and not compressible, in a sentence."""
        return coverage_line(self.values["coverage"])

    @property
    def worst(self) -> list[dict[str, Any]]:
        """The sites with the largest relative output error."""
        return sorted(self.sites, key=lambda site: -site["error"])[:_WORST]

    @property
    def notes(self) -> list[str]:
        """What the user must hear: fallbacks, experts without tokens."""
        return self.values["notes"] + [note for site in self.sites for note in site["notes"]]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self.values | {
            "bits_per_weight": self.bits_per_weight, "matrix_bits": self.matrix_bits, "worst": [site["name"] for site in self.worst],
            "by_class": by_class(self), "coverage_line": self.coverage,
        }  # fmt: skip


def by_class(report: Report) -> list[dict[str, Any]]:
    """Bytes before and after by tensor class; the rows add up to the files."""
    rows: dict[str, list[float]] = {}

    def add(name: str, before: float, after: float) -> None:
        row = rows.setdefault(name, [0.0, 0.0])
        row[0] += before
        row[1] += after

    for site in report.sites:
        label = {"embedding": "embeddings, compressed", "head": "output head, compressed"}.get(site["role"], "matrices, compressed")
        add(label, site.get("original_bytes", 2.0 * site["shape"][0] * site["shape"][1]), site["bits"] / 8)
    for kept in report.values.get("kept", []):
        matrix = len(kept.get("shape", [])) > 1
        add("matrices and embeddings kept as they are" if matrix else "norms, biases and buffers", kept["bytes"], kept["bytes"])
    before, after = sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())
    if "stored_bytes" in report.values:
        add("file headers and manifest", max(report["original_bytes"] - before, 0), report.stored_bytes - after)
    return [{"class": name, "before": round(b), "after": round(a)} for name, (b, a) in rows.items()]


def write_report(out: Path, report: Report, samples: list[dict[str, str]]) -> None:
    """Write report.json and report.html into the model's directory."""
    values = report.as_dict() | {"samples": samples}
    write_json(out / REPORT_JSON, values, indent=1)
    write_text(out / REPORT_HTML, render(Report(report.values | {"samples": samples})))


def read_report(out: Path) -> dict[str, Any] | None:
    """What `write_report` was given, as `report` (its values) and `samples`; None where there is none, or a damaged one."""
    try:
        told = json.loads((out / REPORT_JSON).read_text(encoding="utf-8"))
        samples = told.pop("samples")
        for key in _DERIVED:
            del told[key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {"report": told, "samples": samples}


def render(report: Report) -> str:
    """The report as one self-contained HTML page."""
    return fill_page(
        "report.html.j2", r=report, v=report.values, m=report.metrics, classes=by_class(report), plot=_plot(report.sites),
        experts=_experts(report), notes=report.notes,
    )  # fmt: skip


def fill_page(template: str, **values: Any) -> str:
    """One of the package's templates as an HTML page; every value is escaped unless the template calls it safe."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "g": lambda x: f"{x:.4g}", "count": lambda x: f"{x:,}"}
    return environment.from_string((resources.files("laconic") / "templates" / template).read_text(encoding="utf-8")).render(**values)


def inline_svg(figure: Figure) -> str:
    """A figure as an SVG element to stand in a page, the same bytes at any time."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


def _experts(report: Report) -> list[dict[str, Any]]:
    """The packed experts' sites, with those no calibration token reached."""
    found = [site for site in report.sites if "expert_tokens" in site]
    return [site | {"missing": [i for i, tokens in enumerate(site["expert_tokens"]) if tokens == 0]} for site in found]


def _plot(sites: list[dict[str, Any]]) -> str:
    """Bits per weight and relative output error of every site in the model's order, as inline SVG; a colour per kind of layer."""
    if not sites:
        return ""
    kinds = list(dict.fromkeys(_layer_kind(site["name"]) for site in sites))
    colours = {kind: f"C{i % 10}" for i, kind in enumerate(kinds)}
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    bits, error = figure.subplots(2, 1, sharex=True)
    for kind in kinds:
        at = [i for i, site in enumerate(sites) if _layer_kind(site["name"]) == kind]
        bits.bar(at, [sites[i]["bits_per_weight"] for i in at], color=colours[kind], label=kind.replace("$", r"\$"), width=0.8)
        error.plot(at, [max(sites[i]["error"], 1e-12) for i in at], "o", color=colours[kind], markersize=4)
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


def _block_starts(sites: list[dict[str, Any]]) -> Iterator[int]:
    block = None
    for i, site in enumerate(sites):
        number = next((part for part in site["name"].split(".") if part.isdigit()), None)
        if number != block and i:
            yield i
        block = number


def samples_fit(checkpoint: Checkpoint) -> bool:
    """Whether the model writes text, and takes no more than a quarter of the free memory as a whole in float32."""
    size = sum(p.numel() for p in checkpoint.skeleton.parameters()) * 4
    return hasattr(checkpoint.skeleton, "generate") and size * 4 <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def generation_samples(checkpoint: Checkpoint, out: Path, tokens: torch.Tensor, device: torch.device) -> list[dict[str, str]]:
    """What the original and the stored model write after the same prompt, greedily, each as a whole in memory in its turn."""
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    limit = most_positions(checkpoint.skeleton) or _PROMPT + _ANSWER
    prompt = tokens[:1, : min(_PROMPT, limit // 2)].to(device)
    more = min(_ANSWER, limit - prompt.shape[1])
    samples = [{"model": "prompt", "text": tokenizer.decode(prompt[0])}]
    with Residence(checkpoint.skeleton, checkpoint, None, torch.float32, device).hold(""):
        samples.append({"model": "original", "text": _greedy(checkpoint.skeleton, tokenizer, prompt, more)})
    stored = load(out, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code)
    samples.append({"model": "compressed", "text": _greedy(stored.to(device), tokenizer, prompt, more)})
    return samples


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompt: torch.Tensor, more: int) -> str:
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=more, pad_token_id=tokenizer.eos_token_id or 0
    )  # fmt: skip
    return str(tokenizer.decode(ids[0, prompt.shape[1] :]))


def original_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the original's safetensors files, headers included."""
    return sum(file.stat().st_size for file in {stored.file for stored in checkpoint.files.tensors.values()})
