"""eDKM's Table 3 on books-llama-7m: post-training and training methods at 4, 3 and 2 bits, the embedding at 8 bits in all of them.

    python benchmarks/edkm_lm.py                 # about two hours on 2 CPU cores; a second run reads finished rows

Size, perplexity and KL are of the stored files, opened again. Training methods take the same number of tokens and the same steps of AdamW; what
they learn from is the books (DKM, and the original fine-tuned on them, which is what a gain by training alone would look like), the original's
answers on the books (distilled), or the original's answers on text it wrote itself (LLM-QAT, which is data-free). Groups of 128; the matrices of 704
columns take groups of 64. Learning from the books themselves takes eDKM's rate: the original has learnt from them already, and a larger rate undoes
more of that than compression does. `--epochs 2 --batch 64` are eDKM's other numbers, which belong to 7 billion weights.
"""

import json
import shutil
import time
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import tasks
import torch
from language import ODD, TEXTS, Judge
from torch import nn

import laconic as lc
from laconic.disk.store import stored_bytes
from laconic.host.progress import Log
from laconic.recover import FineTune, Steps
from laconic.recover.deliver import recover_directory
from laconic.recover.text import text_task

WORK = tasks.WORK / "edkm_lm"
COLUMNS = (
    "bits",
    "method",
    "learns from",
    "file bytes",
    "bits per weight",
    "dracula ppl",
    "wikitext2 ppl",
    "dracula KL",
    "wikitext2 KL",
    "seconds",
)
EMBEDDING = "('*embed*', RTN(8, 'channel'))"
CODED = "GPTQ, entropy-coded"
BEFORE = ("RTN", "SmoothQuant", "AWQ", "GPTQ", "KMeans", "KMeans, Fisher", CODED)
DISTILLED = ("LLM-QAT", "DKM, distilled")
TRAINED = {"LLM-QAT": "its own text", "DKM": "books", "DKM, distilled": "answers on books"}


def after_training(method: str, bits: int) -> str:
    """The scheme of a post-training row: one table or one scale per channel, groups of 128, or an entropy-coded grid."""
    if method.startswith("KMeans"):
        return f"[{EMBEDDING}, ('*', KMeans({bits}{', weights=' + repr('fisher') if 'Fisher' in method else ''}))]"
    if method == "SmoothQuant":
        return f"[{EMBEDDING}, ('*', SmoothQuant(bits={bits}, activations=None))]"
    if method == CODED:
        return f"[{EMBEDDING}, ('*', GPTQ(rate={bits}))]"
    return f"[{EMBEDDING}, ('{ODD}', {method}(bits={bits}, group=64)), ('*', {method}(bits={bits}, group=128))]"


def rate(method: str, args: Namespace) -> float:
    """The learning rate: one where the original's answers are learnt, another for the text itself."""
    return args.lr if method in DISTILLED else args.text_lr


def training(method: str, bits: int, args: Namespace) -> tuple[str, FineTune]:
    """The scheme of a training row and how it is trained."""
    share, lr = float(method in DISTILLED), rate(method, args)
    learn = Steps("adamw", lr, lr / 5, momentum=0.9, beta2=0.95, clip=1.0, distill=share, temperature=1.0)
    how = FineTune(epochs=args.epochs, checks=4, learn=learn)
    if method == "fine-tuned":
        return "Cast('bfloat16')", how
    inner = f"RTN({bits}, 'channel', symmetric=True)" if method == "LLM-QAT" else f"DKM({bits})"
    return f"[{EMBEDDING}, ('*', {inner})]", how


@cache
def problem(model: str, data: str, tokens: int, batch: int, seed: int) -> tuple[nn.Module, lc.Task]:
    """The original and what it is trained on; it writes its own text once for all bits."""
    return text_task(
        model, data, train_tokens=tokens, check_tokens=16_384, length=256, batch=batch, seed=seed, dtype="auto"
    )


def make(method: str, bits: int, out: Path, args: Namespace) -> dict[str, Any]:
    """Compress into `out`; says how."""
    model = shared(args, "models/books-llama-7m")
    books = shared(args, "data/books-train.txt")
    if method in BEFORE:
        scheme = after_training(method, bits)
        report = lc.compress(
            model, scheme, str(books), out=out, samples=128, length=256, seed=args.seed, evaluate=False, overwrite=True
        )
        return {"scheme": scheme, "seconds": report["seconds"]}
    scheme, how = training(method, bits, args)
    module, task = problem(
        str(model), "self" if method == "LLM-QAT" else str(books), args.tokens, args.batch, args.seed
    )
    result = recover_directory(
        module, lc.parse(scheme), how, task, out, source=str(model), resume=(out / "recovery.safetensors").is_file(), overwrite=False,
        seed=args.seed, command="", progress=Log(),
    )  # fmt: skip
    return {
        "scheme": scheme,
        "recovery": result["recovery"],
        "minibatches": result["minibatches"],
        "seconds": result["seconds"],
    }


def run(method: str, bits: int, args: Namespace, judge: Judge) -> dict[str, Any]:
    """A row: from an earlier run with the same arguments, or made now."""
    folder = WORK / f"{method.replace(', ', '-')}-{bits}-{args.tokens}-{rate(method, args):g}-{args.seed}"
    file = folder / "row.json"
    if not file.is_file():
        if args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        row = make(method, bits, folder / "model", args) | judge.measure(folder / "model")
        row["file bytes"] = stored_bytes(folder / "model")
        file.write_text(json.dumps(row))
    row = json.loads(file.read_text())
    learns = {"fine-tuned": "books"}.get(method, TRAINED.get(method, ""))
    return {"bits": bits, "method": method, "learns from": learns, **row}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DKM trained on the original's answers, by ratios: against the fixed-width post-training row of its bits with the least KL, against the
    entropy-coded one, and against LLM-QAT."""
    found = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        of = {row["method"]: row for row in rows if row["bits"] == bits}
        fixed = [of[method] for method in BEFORE if method in of and method != CODED]
        best = [min(fixed, key=lambda row: row["dracula KL"])] if fixed else []
        for rival in best + [of[method] for method in (CODED, "LLM-QAT") if method in of]:
            if (ours := of.get("DKM, distilled")) is not None:
                ratios = {key: ours[key] / rival[key] for key in ("file bytes", "dracula KL", "wikitext2 KL")}
                found.append(
                    {
                        "bits": bits,
                        "DKM, distilled, against": rival["method"],
                        **ratios,
                        "met": all(r < 1 for r in ratios.values()),
                    }
                )
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    usual = [*BEFORE, *DISTILLED]  # learning the books once more helps nothing here, as "fine-tuned" shows
    made.add_argument("--methods", nargs="+", default=usual, choices=[*BEFORE, *TRAINED])
    made.add_argument(
        "--tokens", type=int, default=512_000, help="training tokens, the same for every method that trains"
    )
    made.add_argument("--epochs", type=int, default=1)
    made.add_argument("--batch", type=int, default=8, help="windows of 256 tokens a step")
    made.add_argument("--lr", type=float, default=3e-4, help="where the original's answers are learnt")
    made.add_argument("--text-lr", type=float, default=5e-5, help="where the text itself is learnt")
    made.add_argument("--judged", type=int, default=24_576, help="tokens of each test text")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--fresh", action="store_true", help="forget unfinished rows")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    original = shared(args, "models/books-llama-7m")
    judge = Judge(original, {name: shared(args, file) for name, file in TEXTS.items()}, args.judged)
    rows = [{"bits": 16, "method": "original", "file bytes": stored_bytes(original), **judge.measure(original)}]
    if set(args.methods) & set(TRAINED):
        rows.append(run("fine-tuned", 16, args, judge))
    for bits in args.bits:
        for method in args.methods:
            rows.append(run(method, bits, args, judge))
            show(f"{time.strftime('%H:%M:%S')}", rows[-1:], COLUMNS)
    weights = sum(p.numel() for p in judge.original.skeleton.parameters())
    rows = [row | {"bits per weight": 8 * row["file bytes"] / weights} for row in rows]
    show("books-llama-7m after and during training", rows, COLUMNS)
    goals = targets(rows)
    show("Targets", goals)
    record("edkm_lm", rows, args, targets=goals)


if __name__ == "__main__":
    main()
