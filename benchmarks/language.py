"""What the language model benchmarks share: one judge for every candidate, schemes at the size of a peer's groups, the plot of quality."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.data.text import Windows, evaluation_windows, read_text
from laconic.disk.load import load_tokenizer, open_source
from laconic.measure.quality import compare, outputs, windows_at_once
from laconic.model.sites import find_slots

TEXTS = {"dracula": "data/dracula.txt", "wikitext2": "data/wikitext2-test.txt"}
ODD = "*.down_proj"  # 704 columns, which a group of 128 does not divide


def grouped(method: str, group: int, **arguments: Any) -> str:
    """The scheme `method(group=..., ...)`; with groups of 128 the matrices of 704 columns take groups of 64, as a plan."""
    text = "".join(f", {name}={value!r}" for name, value in arguments.items())
    if group == 128:
        return f"[('*embed*', Keep()), ('{ODD}', {method}(group=64{text})), ('*', {method}(group=128{text}))]"
    return f"{method}(group={group}{text})"


class Judge:
    """Measures models against one original on the same windows of both texts; the original's logits are computed once.

    The windows follow the protocol of the evaluate command: the text tokenised once, windows that do not overlap, positions 2 to `length`.
    """

    def __init__(self, original: Path, texts: dict[str, Path], tokens: int, length: int = 256) -> None:
        self.original = open_source(original)
        tokenizer = load_tokenizer(original)
        self.windows = {
            name: evaluation_windows(read_text(file), tokenizer, length, tokens, name) for name, file in texts.items()
        }
        self.logits = {name: self._logits(self.original, windows) for name, windows in self.windows.items()}
        self.slots = [slot for slot in find_slots(self.original.skeleton) if slot.role not in ("embedding", "head")]
        self.matrices = self.original.read([slot.parameter for slot in self.slots])

    @staticmethod
    def _logits(source: Any, windows: Windows) -> list[Tensor]:
        batches = windows.batches(windows_at_once(source, windows))
        return [output.logits for output in outputs(source, batches, torch.float32, torch.device("cpu"))]

    def measure(self, folder: Path) -> dict[str, float]:
        """Perplexity and KL on each text with 95 % intervals, and the relative squared error of the weights, of what `folder` stores."""
        source = open_source(folder)
        row: dict[str, float] = {}
        for name, windows in self.windows.items():
            quality = compare(windows, self._logits(source, windows), self.logits[name])
            assert quality.kl is not None
            assert quality.kl_interval is not None
            row |= {f"{name} ppl": quality.perplexity, f"{name} KL": quality.kl}
            row |= {f"{name} KL low": quality.kl_interval[0], f"{name} KL high": quality.kl_interval[1]}
        decoded = source.read([slot.parameter for slot in self.slots])
        row["weight error"] = self._weight_error(decoded)
        return row

    def _weight_error(self, decoded: dict[str, Tensor]) -> float:
        """Mean over the entries of |w - q|^2 / the variance of their matrix."""
        total, entries = 0.0, 0
        for name, W in self.matrices.items():
            left = (W.double() - decoded[name].double()).square().sum() / W.double().square().sum()
            total, entries = total + float(left) * W.numel(), entries + W.numel()
        return total / entries


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """KL and weight error against stored bits per weight, a line per family, as SVG; beside the error the bound 2^-2R of a Gaussian source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.2), layout="constrained")
    quality, error = figure.subplots(1, 2, sharex=True)
    families = list(dict.fromkeys(row["family"] for row in rows))
    for i, family in enumerate(families):
        points = sorted((row for row in rows if row["family"] == family), key=lambda row: row["matrix bits"])
        bits = [row["matrix bits"] for row in points]
        style = {"color": f"C{i % 10}", "marker": "os^Dv*PXh<>"[i % 11], "markersize": 5, "linewidth": 1.2}
        own = family.removeprefix("laconic ").startswith("GPTQ(rate")
        style |= {"linewidth": 2.4, "zorder": 5} if own else {}
        quality.plot(bits, [row["dracula KL"] for row in points], label=family, **style)
        error.plot(bits, [row["weight error"] for row in points], **style)
    low, high = min(row["matrix bits"] for row in rows), max(row["matrix bits"] for row in rows)
    bound = [low + (high - low) * k / 50 for k in range(51)]
    error.plot(bound, [math.pow(2, -2 * r) for r in bound], "--", color="0.4", label="Gaussian rate-distortion bound")
    error.legend(frameon=False, loc="upper right")
    for axes, label in (
        (quality, "KL from the original on dracula, nats per token"),
        (error, "weight error / variance"),
    ):
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_xlabel("stored bits per weight of the matrices")
        axes.grid(color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*quality.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    temporary.replace(file)
