"""What one scheme does to a whole file: the embedding rounded to b bits and entropy-coded, against kept, in files of equal bytes.

    python benchmarks/whole_file.py                      # about 5 minutes on one CPU core

books-llama-7m, whose tied embedding is 15 % of its parameters. Every figure is of the stored files. The rate of the matrices is what is
left of a file's bytes when the embedding is stored, so a kept embedding is paid for by the matrices.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import torch
from language import TEXTS, Judge

import laconic as lc
from laconic.disk.load import open_source
from laconic.methods.rtn import RTN
from laconic.model.sites import Site, find_slots

COLUMNS = ("file", "embedding", "rate", "file bytes", "dracula KL", "wikitext2 KL", "dracula ppl", "wikitext2 ppl")
KEPT_RATES = (3.25, 2.25)  # of the matrices beside a kept embedding, which say how large the files are
BITS = (4, 5, 6, 7, 8)


def rounding(bits: int) -> RTN:
    return RTN(bits=bits, group="channel", codec="ans")


def embedding_of(model: Path) -> tuple[dict[int, int], int, int]:
    """The embedding's stored bytes at every width, its bytes as it is, and the entries of the matrices of the body."""
    source = open_source(model)
    slots = find_slots(source.skeleton)
    (slot,) = [slot for slot in slots if slot.role == "embedding"]
    W = slot.view.matrix(source.read([slot.parameter])[slot.parameter].float())
    stored = {bits: rounding(bits)(Site(slot.name, W)).bits() // 8 for bits in BITS}
    return stored, source.nbytes(slot.parameter), sum(slot.entries for slot in slots if slot.role == "body")


def run(model: Path, scheme: str, out: Path, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Compress by a scheme and say what was stored."""
    options |= {"samples": args.samples, "length": 256, "seed": args.seed, "evaluate": False, "overwrite": True}
    report = lc.compress(model, scheme, str(shared(args, "data/books-train.txt")), out=out, **options)
    return {"file bytes": report.stored_bytes, "matrix bits": report.matrix_bits, "seconds": report["seconds"]}


def main() -> None:
    args_parser = parser(__doc__)
    args_parser.add_argument("--tokens", type=int, default=24576, help="of each text, in windows of 256")
    args_parser.add_argument("--samples", type=int, default=128, help="calibration windows of 256 tokens")
    args_parser.add_argument("--threads", type=int, default=1)
    args_parser.add_argument("--every-width", action="store_true", help="the embedding at 4, 5, 7 and 8 bits too")
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    model = shared(args, "models/books-llama-7m")
    judge = Judge(model, {name: shared(args, file) for name, file in TEXTS.items()}, args.tokens)
    stored, kept_bytes, entries = embedding_of(model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kept_rate in KEPT_RATES:
            for bits in (None, 6, *(b for b in BITS if b != 6)):
                if bits not in (None, 6) and not args.every_width:
                    continue
                rate = kept_rate if bits is None else kept_rate + 8 * (kept_bytes - stored[bits]) / entries
                scheme = f"GPTQ(rate={rate:.4f})"
                keep: dict[str, Any] = {"keep": "embedding"} if bits is None else {}
                if bits not in (None, 6):
                    scheme = f"[('*embed*', {rounding(int(bits))!r}), ('*', {scheme})]"
                row = {
                    "file": f"{kept_rate} bits and a kept embedding",
                    "embedding": "bfloat16" if bits is None else f"{bits} bits",
                    "rate": rate,
                }
                row |= (
                    {"scheme": scheme}
                    | keep
                    | run(model, scheme, Path(folder) / "out", args, **keep)
                    | judge.measure(Path(folder) / "out")
                )
                for text in TEXTS:
                    row[f"{text} interval"] = f"{row[f'{text} KL low']:.4f} to {row[f'{text} KL high']:.4f}"
                rows.append(row)
                show(f"{len(rows)}", rows[-1:], COLUMNS)
                record("whole_file", rows, args)
    show("books-llama-7m", rows, COLUMNS)


if __name__ == "__main__":
    main()
