"""Every family of schemes on books-llama-7m: perplexity and KL on two held-out texts, stored bytes and seconds, side by side in one run.

    python benchmarks/lm_quality.py                      # all rows, about 20 minutes on 2 CPU cores
    python benchmarks/lm_quality.py --only g128

Every figure is of the stored files: the run's directory is opened again and decoded. All matrices but the tied embedding are compressed.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, parser, record, shared, show

import torch
from language import TEXTS, Judge, grouped, plot

import laconic as lc

COLUMNS = (
    "scheme",
    "matrix bits",
    "file bytes",
    "dracula ppl",
    "wikitext2 ppl",
    "dracula KL",
    "wikitext2 KL",
    "weight error",
    "seconds",
)


def schemes() -> list[tuple[str, str]]:
    """(family, scheme) of every row."""
    rows = []
    for group in (64, 128):
        for bits in (4, 3, 2):
            rows.append((f"RTN g{group}", grouped("RTN", group, bits=bits)))
            rows.append((f"RTN clipped g{group}", grouped("RTN", group, bits=bits, clip="mse")))
            rows.append((f"GPTQ g{group}", grouped("GPTQ", group, bits=bits)))
    rows += [("GPTQ(rate)", f"GPTQ(rate={rate})") for rate in (4.25, 3.25, 2.25, 1.75, 1.5)]
    rows += [("GPTQ(rate), each matrix", f"GPTQ(rate={rate}, over='matrix')") for rate in (4.25, 3.25, 2.25)]
    for bits in (4, 3, 2):
        rows.append(("KMeans", f"KMeans(bits={bits})"))
        rows.append(("KMeans, Fisher (SqueezeLLM)", f"KMeans(bits={bits}, weights='fisher')"))
        rows.append(("GPTVQ, pairs", f"GPTVQ(bits={2 * bits}, dimension=2)"))
        rows.append(("SpQR", f"SpQR(bits={bits})"))
        rows.append(("GPTQ + EoRA(8)", f"GPTQ(bits={bits}) + EoRA(rank=8)"))
        rows.append(("Hadamard(RTN)", f"Hadamard(RTN(bits={bits}))"))
        rows.append(("Hadamard(GPTQ)", f"Hadamard(GPTQ(bits={bits}))"))
    return rows


def run(model: Path, scheme: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compress by a scheme and say what was stored and how long it took, evaluation not included."""
    options = {"samples": args.samples, "length": 256, "seed": args.seed, "evaluate": False, "overwrite": True}
    options |= {} if "*embed*" in scheme else {"keep": "embedding"}
    report = lc.compress(model, scheme, str(shared(args, "data/books-train.txt")), out=out, **options)
    return {"matrix bits": report.matrix_bits, "file bytes": report.stored_bytes, "seconds": report["seconds"]}


def main() -> None:
    args_parser = parser(__doc__)
    args_parser.add_argument("--tokens", type=int, default=24576, help="of each text, in windows of 256")
    args_parser.add_argument("--samples", type=int, default=128, help="calibration windows of 256 tokens")
    args_parser.add_argument("--only", default="", help="only families whose name contains this; recorded apart")
    args_parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    model = shared(args, "models/books-llama-7m")
    judge = Judge(model, {name: shared(args, file) for name, file in TEXTS.items()}, args.tokens)
    rows: list[dict[str, Any]] = [
        {"family": "original", "scheme": "original, bfloat16", "matrix bits": 16.0} | judge.measure(model)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for family, scheme in schemes():
            if args.only.lower() not in family.lower():
                continue
            rows.append(
                {"family": family, "scheme": scheme}
                | run(model, scheme, Path(folder) / "out", args)
                | judge.measure(Path(folder) / "out")
            )
            show(f"{len(rows) - 1} of {len(schemes())}", rows[-1:], COLUMNS)
    show("books-llama-7m", rows, COLUMNS)
    name = f"lm_quality-{args.only}" if args.only else "lm_quality"
    record(name, rows, args)
    plot(rows[1:], RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
