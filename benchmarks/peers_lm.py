"""Ours beside llm-compressor, GPTQModel, AutoRound, HQQ and optimum-quanto: same model, calibration windows, judge and way to count, one run.

    python benchmarks/peers_lm.py                 # installs each peer into an environment of its own (7 GB), then about half an hour on 2 cores
    python benchmarks/peers_lm.py --peers hqq llmcompressor --bits 2

Each peer compresses in its own process and stores its own format; the weights that this format decodes to (checked against the peer's own
model) are measured by our judge. Bits per weight are the bytes of the stored tensors of the compressed matrices, scales and zeros included.
Ours at a rate gets the fewest bits any peer takes at that width. AutoRound trains its rounding; all others are one-shot.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import numpy as np
import torch
from language import TEXTS, Judge, plot

import laconic as lc
from laconic.data.text import calibration_windows, read_text, split_text
from laconic.disk.load import load_tokenizer

FOLDER = Path(__file__).resolve().parent / "peers"
sys.path.append(str(FOLDER))
from install import PEERS, default_root, install  # noqa: E402 - beside the runners, which need it without this package

METHODS = {
    "llmcompressor": ("rtn", "gptq"),
    "gptqmodel": ("gptq",),
    "autoround": ("autoround",),
    "hqq": ("hqq",),
    "quanto": ("max",),
}
NAMES = {
    "llmcompressor": "llm-compressor", "gptqmodel": "GPTQModel", "autoround": "AutoRound", "hqq": "HQQ", "quanto": "optimum-quanto",
}  # fmt: skip
TRAINS = "autoround"
COLUMNS = (
    "scheme",
    "matrix bits",
    "file bytes",
    "dracula ppl",
    "wikitext2 ppl",
    "dracula KL",
    "wikitext2 KL",
    "seconds per layer",
)


def peer_row(
    peer: str, method: str, bits: int, python: Path, work: Path, args: argparse.Namespace, judge: Judge
) -> dict[str, Any]:
    """One peer's row, made in its own environment."""
    out = work / f"{peer}-{method}-{bits}"
    model = shared(args, "models/books-llama-7m")
    command = [python, FOLDER / f"run_{peer}.py", "--model", model, "--calibration", work / "calibration.npy"]
    command += ["--method", method, "--bits", bits, "--group", args.group, "--out", out]
    row: dict[str, Any] = {
        "family": f"{NAMES[peer]} {method}",
        "scheme": f"{NAMES[peer]} {method} {bits} bits",
        "bits": bits,
        "peer": peer,
    }
    if not (args.reuse and (out / "result.json").is_file()):
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=out,
                check=False,
            )
        if done.returncode or not (out / "result.json").is_file():
            return row | {"failed": (out / "log.txt").read_text()[-2000:]}
    result = json.loads((out / "result.json").read_text())
    if result["unsupported"]:
        return row | {"failed": result["unsupported"]}
    dense = out / "dense"
    dense.mkdir(exist_ok=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, dense / file.name)
    shutil.copyfile(out / "dense.safetensors", dense / "model.safetensors")
    return row | {
        "matrix bits": result["bits_per_weight"], "file bytes": result["native_weight_bytes"], "seconds": result["seconds"],
        "seconds per layer": result["seconds_per_layer"], "layers": result["linear_layers"], "version": result["version"],
    } | judge.measure(dense)  # fmt: skip


def own_row(
    family: str, scheme: str, bits: int, work: Path, args: argparse.Namespace, judge: Judge, layers: int, dtype: str = "float32"
) -> dict[str, Any]:  # fmt: skip
    """One row of ours, by the same judge; the seconds are those of the whole run, reading, verifying and reporting included."""
    model, data = shared(args, "models/books-llama-7m"), shared(args, "data/books-train.txt")
    out = work / "laconic"
    report = lc.compress(
        model,
        scheme,
        str(data),
        out=out,
        samples=args.samples,
        seed=args.seed,
        evaluate=False,
        overwrite=True,
        dtype=dtype,
        keep="embedding",
    )
    name = f"laconic {scheme}" + (f", {dtype} passes" if dtype != "float32" else "")
    return {
        "family": family, "scheme": name, "bits": bits, "peer": None, "matrix bits": report.matrix_bits,
        "file bytes": report.stored_bytes, "seconds": report["seconds"], "seconds per layer": report["seconds"] / layers,
    } | judge.measure(out)  # fmt: skip


def targets(rows: list[dict[str, Any]], bits: int) -> list[dict[str, Any]]:
    """What was to be reached at one width, and what was: ratios of KL on each text, and of seconds per layer."""
    here = [row for row in rows if row.get("bits") == bits and "failed" not in row]
    one_shot = [row for row in here if row["peer"] not in (None, TRAINS)]
    gptq = [row for row in one_shot if "gptq" in row["scheme"]]
    trained = [row for row in here if row["peer"] == TRAINS]
    rate = next(row for row in here if row["family"] == "laconic GPTQ(rate)")
    plain = next(row for row in here if row["family"] == "laconic GPTQ g64")
    found = []
    for text in TEXTS:
        key = f"{text} KL"
        for name, own, others, limit in (
            ("GPTQ(rate) / best one-shot peer", rate, one_shot, 1 / 3), ("GPTQ(rate) / AutoRound", rate, trained, 2 / 3),
            ("GPTQ g64 / best peer's GPTQ", plain, gptq, 1.0),
        ):  # fmt: skip
            if others:
                ratio = own[key] / min(row[key] for row in others)
                found.append(
                    {"bits": bits, "what": name, "on": text, "ratio": ratio, "target": limit, "met": ratio <= limit}
                )
    slow = [row["seconds per layer"] for row in gptq if row["peer"] == "llmcompressor"]
    half = next(row for row in here if row["family"] == "laconic GPTQ g64 bf16")
    for name, own in (("GPTQ g64", plain), ("GPTQ g64, bfloat16 passes like the peer's", half), ("GPTQ(rate)", rate)):
        if slow:
            ratio = own["seconds per layer"] / min(slow)
            what = f"{name} / llm-compressor's GPTQ"
            found.append(
                {
                    "bits": bits,
                    "what": what,
                    "on": "seconds per layer",
                    "ratio": ratio,
                    "target": 0.5,
                    "met": ratio <= 0.5,
                }
            )
    return found


def main() -> None:
    args_parser = parser(__doc__)
    args_parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    args_parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    args_parser.add_argument("--group", type=int, default=64)
    args_parser.add_argument(
        "--samples", type=int, default=128, help="calibration windows of 256 tokens, the same for all"
    )
    args_parser.add_argument("--tokens", type=int, default=24576, help="of each text, in windows of 256")
    args_parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for all, ours and the peers'"
    )
    args_parser.add_argument("--root", type=Path, default=default_root(), help="where the peers' environments live")
    args_parser.add_argument("--work", type=Path, help="keep the peers' outputs here")
    args_parser.add_argument(
        "--reuse", action="store_true", help="take the results that an interrupted run left in --work"
    )
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    model = shared(args, "models/books-llama-7m")
    judge = Judge(model, {name: shared(args, file) for name, file in TEXTS.items()}, args.tokens)
    pythons = {peer: install(peer, args.root.resolve()) for peer in args.peers}
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        text = split_text(read_text(shared(args, "data/books-train.txt")))[0]
        windows = calibration_windows(text, load_tokenizer(model), args.samples, 256, args.seed, "books-train")
        np.save(work / "calibration.npy", windows.tokens.numpy().astype(np.int64))
        rows: list[dict[str, Any]] = [
            {"family": "original", "scheme": "original, bfloat16", "matrix bits": 16.0} | judge.measure(model)
        ]
        checks: list[dict[str, Any]] = []
        for bits in args.bits:
            mine = [
                peer_row(peer, method, bits, pythons[peer], work, args, judge) for peer in args.peers for method in METHODS[peer]
            ]  # fmt: skip
            done = [row for row in mine if "failed" not in row]
            layers = done[0]["layers"]
            mine.append(
                own_row("laconic RTN g64", f"RTN(bits={bits}, group={args.group})", bits, work, args, judge, layers)
            )
            mine.append(
                own_row("laconic GPTQ g64", f"GPTQ(bits={bits}, group={args.group})", bits, work, args, judge, layers)
            )
            mine.append(
                own_row("laconic GPTQ g64 bf16", f"GPTQ(bits={bits}, group={args.group})", bits, work, args, judge, layers, "bfloat16")
            )  # fmt: skip
            rate = int(min(row["matrix bits"] for row in done) * 1e4) / 1e4
            mine.append(own_row("laconic GPTQ(rate)", f"GPTQ(rate={rate})", bits, work, args, judge, layers))
            rows += mine
            checks += targets(rows, bits)
            show(f"{bits} bits", mine, COLUMNS)
            for row in mine:
                if "failed" in row:
                    print(f"{row['scheme']}: no result: {row['failed'].strip().splitlines()[-1][:300]}")
    show("books-llama-7m", [row for row in rows if "failed" not in row], COLUMNS)
    show("targets", checks)
    record("peers_lm", rows, args, targets=checks)
    plot([row for row in rows[1:] if "failed" not in row], Path(__file__).resolve().parent / "results" / "peers_lm.svg")


if __name__ == "__main__":
    main()
