"""The record of a run: everything it measured, as plain values."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.disk.ours import REPORT_JSON
from laconic.engine.coverage import coverage_line
from laconic.host.told import SiteRecord

_WORST = 10
_DERIVED = ("bits_per_weight", "matrix_bits", "worst", "by_class")  # of the values


@dataclass(frozen=True)
class Report:
    """Everything a run measured, as plain values (`report["metrics"]`), with the few figures people ask for as
    properties.
    """

    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def sites(self) -> list[dict[str, Any]]:
        """A record per compressed site, as JSON: name, shape, method, bits, relative output error, notes."""
        return self.values["sites"]

    @property
    def records(self) -> list[SiteRecord]:
        """The same as values. Raises: CheckpointError for sites of a report that are not whole."""
        return [SiteRecord.from_json(site) for site in self.sites]

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
        """Stored bits per weight of the compressed matrices of the body, scales, tables and indices included; without
        any, of all sites.
        """
        records = self.records
        body = [record for record in records if record.role == "body"] or records
        return sum(record.bits for record in body) / max(sum(record.entries for record in body), 1)

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
            "bits_per_weight": self.bits_per_weight,
            "matrix_bits": self.matrix_bits,
            "worst": [site["name"] for site in self.worst],
            "by_class": by_class(self),
            "coverage_line": self.coverage,
        }


def by_class(report: Report) -> list[dict[str, Any]]:
    """Bytes before and after by tensor class; the rows add up to the files."""
    rows: dict[str, list[float]] = {}

    def add(name: str, before: float, after: float) -> None:
        row = rows.setdefault(name, [0.0, 0.0])
        row[0] += before
        row[1] += after

    for record in report.records:
        label = {"embedding": "embeddings, compressed", "head": "output head, compressed"}.get(
            record.role, "matrices, compressed"
        )
        before = record.original_bytes if record.original_bytes is not None else 2.0 * record.entries
        add(label, before, record.bits / 8)
    for kept in report.values.get("kept", []):
        matrix = len(kept.get("shape", [])) > 1
        add(
            "matrices and embeddings kept as they are" if matrix else "norms, biases and buffers",
            kept["bytes"],
            kept["bytes"],
        )
    before, after = sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())
    if "stored_bytes" in report.values:
        add("file headers and manifest", max(report["original_bytes"] - before, 0), report.stored_bytes - after)
    return [{"class": name, "before": round(b), "after": round(a)} for name, (b, a) in rows.items()]


def read_report(out: Path) -> dict[str, Any] | None:
    """What `write_report` was given, as `report` (its values) and `samples`; None where there is none, or a damaged
    one.
    """
    try:
        told = json.loads((out / REPORT_JSON).read_text(encoding="utf-8"))
        samples = told.pop("samples")
        for key in _DERIVED:
            del told[key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {"report": told, "samples": samples}
