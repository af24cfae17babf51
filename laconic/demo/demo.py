"""The demo: the language model that comes with the package, at 4, 3 and 2 bits with three schemes, measured on held-out
modules.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laconic.demo.corpus import HELD_OUT, held_out_text, training_text
from laconic.disk.files import write_json
from laconic.disk.lock import locked
from laconic.engine.report import Report
from laconic.errors import CheckpointError
from laconic.host.machine import machine, versions
from laconic.host.progress import Progress
from laconic.pipeline import Options, compress_directory
from laconic.scheme.text import parse
from laconic.show.compare import row_of, write_comparison

MODEL = Path(__file__).parent / "model"
GROUP = 64
_TEST_TOKENS = 16384


def schemes() -> Iterator[tuple[int, str, str, str]]:
    """(bits, folder, family, scheme) of every run: rounding, GPTQ on the same grid, and GPTQ at the rate that takes
    exactly as many bytes.

    A group of 64 codes of b bits carries a 16-bit scale and a b-bit zero point: b + (16 + b) / 64 bits per weight. The
    embedding is rounded alike in all of them, so the files of a width are equally large.
    """
    for bits in (4, 3, 2):
        rate = bits + (16 + bits) / GROUP
        yield bits, f"{bits}-bits-rtn", "rounding to nearest", f"RTN(bits={bits}, group={GROUP})"
        yield bits, f"{bits}-bits-gptq", "GPTQ, groups of 64", f"GPTQ(bits={bits}, group={GROUP})"
        yield bits, f"{bits}-bits-rate", "GPTQ at a rate, entropy coded", f"GPTQ(rate={rate:.4f})"


def run_demo(out: Path, samples: int, progress: Progress) -> dict[str, Any]:
    """Compress, measure and compare; writes a directory per run, `index.html` and `demo.json` into `out`, and returns
    what the JSON holds.

    A run that an earlier, interrupted demo finished is made again: together they take about two minutes.
    Raises: CheckpointError when the package was installed without its model; OutputError when `out` holds somebody's
    files.
    """
    if not (MODEL / "config.json").is_file():
        raise CheckpointError(
            f"{MODEL}: the embedded model is missing from this installation; tools/train_reference.py makes it"
        )
    with locked(out):
        return _run(out, samples, progress)


def _run(out: Path, samples: int, progress: Progress) -> dict[str, Any]:
    """`run_demo` in a folder that is ours."""
    calibration, test = out / "calibration.txt", out / "held-out.txt"
    calibration.write_text("\n".join(training_text()), encoding="utf-8")
    test.write_text("\n".join(held_out_text()), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    report: Report | None = None
    for bits, name, family, scheme in schemes():
        options = Options(
            data=str(calibration),
            test=str(test),
            samples=samples,
            test_tokens=_TEST_TOKENS,
            overwrite=True,
            command=shlex.join(
                [
                    "laconic",
                    "compress",
                    str(MODEL),
                    "--scheme",
                    scheme,
                    "--data",
                    str(calibration),
                    "--test",
                    str(test),
                    "--samples",
                    str(samples),
                    "--test-tokens",
                    str(_TEST_TOKENS),
                    "--out",
                    str(out / name),
                ]
            ),
        )
        report = compress_directory(MODEL, parse(scheme), out / name, options, progress)
        rows.append(row_of(report, family, f"{name}/report.html") | {"bits": bits})
    assert report is not None
    return _write(out, rows, report)


def _write(out: Path, rows: list[dict[str, Any]], report: Report) -> dict[str, Any]:
    for bits in {row["bits"] for row in rows}:
        same = [row for row in rows if row["bits"] == bits]
        best = min(row["kl"] for row in same)
        for row in same:
            row |= {"best": row["kl"] == best, "first": row is same[0]}
    m = report.metrics
    parameters = report["parameters"]
    reference = {
        "name": "the original, bfloat16", "bytes": report["original_bytes"], "parameters": parameters,
        "bits_per_weight": 8 * report["original_bytes"] / parameters, "perplexity": m["reference_perplexity"],
    }  # fmt: skip
    training = json.loads((MODEL / "training.json").read_text())
    facts = {
        "model": (
            f"{parameters:,} parameters, Llama architecture, trained on this Python's standard library "
            f"({training['training_tokens']:,} tokens)"
        ),
        "calibration": (
            f"{report['data']['windows'][0]} windows of {report['data']['windows'][1]} tokens of the modules it was "
            "trained on"
        ),
        "measured on": f"{m['tokens']:,} tokens of modules it never saw: {', '.join(HELD_OUT)}",
        "embedding and head": "one tied matrix, at 6 bits entropy-coded in all runs; norms as stored",
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
    }
    by_bits = {(row["bits"], row["family"]): row for row in rows}
    families = list(dict.fromkeys(row["family"] for row in rows))
    words = [
        f"At {bits} bits and equal bytes, {families[2]} has "
        f"{by_bits[bits, families[2]]['kl'] / by_bits[bits, families[1]]['kl']:.2f} of the KL of "
        f"{families[1]} and {by_bits[bits, families[2]]['kl'] / by_bits[bits, families[0]]['kl']:.3f} of that of "
        f"{families[0]}."
        for bits in dict.fromkeys(row["bits"] for row in rows)
    ]
    write_comparison(
        out / "index.html", "Three schemes at 4, 3 and 2 bits", facts=facts, reference=reference, rows=rows, words=words
    )
    result = {"reference": reference, "rows": rows, "facts": facts}
    write_json(out / "demo.json", result, indent=1)
    return result
