"""Rounding and scales trained block by block after RTN and GPTQ, in groups of 64: KL on two held-out texts, stored
bytes, seconds.

    python benchmarks/blockwise.py                       # about 15 minutes on one CPU core
    python benchmarks/blockwise.py --bits 2 --steps 200

books-llama-7m, everything but the tied embedding compressed. Every figure is of the stored files, read back. The
recoveries see the same minibatches, from which GPTQ has its statistics too; `GPTQ, compress` is the command that reads
as many windows of the same text and takes its statistics from the compressed prefix. Seconds are of compression and
training, not of storing and measuring.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import torch
from language import TEXTS, Judge

import laconic as lc
from laconic.disk.state import half_types
from laconic.disk.store import stored_bytes
from laconic.engine.saved import save
from laconic.model.batches import unlabelled
from laconic.recover import AdaRound, Blockwise, Direct, Recovery, Task, recover_task
from laconic.recover.blockwise import adam
from laconic.recover.text import complete_directory, text_task
from laconic.weights import installed

TEXT = "data/books-train.txt"
LENGTH = 256
COLUMNS = (
    "bits",
    "scheme",
    "trained",
    "matrix bits",
    "file bytes",
    "dracula KL",
    "wikitext2 KL",
    "seconds",
    "blocks left",
)


def recoveries(args: argparse.Namespace) -> list[tuple[str, str, Recovery]]:
    """(method, what trains it in words, the recovery) of every row at a width."""
    common: dict[str, Any] = {"steps": args.steps, "samples": args.samples, "every": 99}
    rounding = common | {"learn": adam(args.lr), "checks": 1}
    return [
        ("RTN", "", Direct()),
        ("GPTQ", "", Direct()),
        ("GPTQ", "AdaRound from its codes", AdaRound(**rounding, start="codes")),
        ("GPTQ", "scales and norms", Blockwise(**common)),
        ("RTN", "AdaRound", AdaRound(**rounding)),
        ("GPTQ", "AdaRound on its grid", AdaRound(**rounding)),
    ]


def recovered(
    model: Any, scheme: str, how: Recovery, task: Task, out: Path, source: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Compress and train a module, store it, and say what was stored and how long it took."""
    calibration = [unlabelled(batch) for _, batch in zip(range(args.samples), task.train, strict=False)]
    started = time.time()
    plan = f"[('*embed*', Keep()), ('*', {scheme})]"
    compressed, found = recover_task(model, plan, how, task, calibration=calibration, seed=args.seed)
    seconds = time.time() - started
    save(compressed, out, types=half_types(model), scheme=found.scheme, recovery=repr(how))
    complete_directory(out, model, source)
    weights = installed(compressed).values()
    bits = sum(weight.bits() for weight in weights) / sum(weight.shape[0] * weight.shape[1] for weight in weights)
    left = [note for note in found.notes if "no check in" in note]
    return {
        "matrix bits": bits, "file bytes": stored_bytes(out), "seconds": seconds, "blocks left": len(left), "recovery": repr(how),
        "notes": found.notes,
    }  # fmt: skip


def compressed(model: Path, scheme: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the compress command makes of as many windows."""
    report = lc.compress(
        model, scheme, str(shared(args, TEXT)), out=out, samples=args.samples * args.batch, length=LENGTH, seed=args.seed,
        evaluate=False, keep="embedding",
    )  # fmt: skip
    return {"matrix bits": report.matrix_bits, "file bytes": report.stored_bytes, "seconds": report["seconds"]}


def main() -> None:
    args_parser = parser(__doc__)
    args_parser.add_argument("--tokens", type=int, default=24576, help="of each text, in windows of 256")
    args_parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    args_parser.add_argument("--steps", type=int, default=100, help="minibatches a block is trained for")
    args_parser.add_argument("--samples", type=int, default=24, help="minibatches of training text")
    args_parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens in a minibatch")
    args_parser.add_argument("--lr", type=float, default=0.06, help="of AdaRound: the fewer steps, the higher")
    args_parser.add_argument("--only", default="", help="only rows whose scheme and training contain this")
    args_parser.add_argument("--threads", type=int, default=1)
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    source = shared(args, "models/books-llama-7m")
    judge = Judge(source, {name: shared(args, file) for name, file in TEXTS.items()}, args.tokens)
    model, task = text_task(
        source, shared(args, TEXT), train_tokens=args.samples * args.batch * LENGTH, check_tokens=2048, length=LENGTH,
        batch=args.batch, seed=args.seed, dtype="auto",
    )  # fmt: skip
    task = Task(task.train, task.validation)
    name = "blockwise" if len(args.bits) > 1 else f"blockwise-{args.bits[0]}bits"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def add(bits: int, scheme: str, trained: str, make: Any) -> None:
            if args.only.lower() not in f"{scheme} {trained}".lower():
                return
            out = Path(folder) / str(len(rows))
            row = {"bits": bits, "scheme": scheme, "trained": trained} | make(out)
            rows.append(row | judge.measure(out))
            show(f"{len(rows)}", rows[-1:], COLUMNS)
            record(name, rows, args)

        for bits in args.bits:
            gptq = f"GPTQ(bits={bits}, group=64)"
            add(bits, f"{gptq}, compress", "", lambda out, gptq=gptq: compressed(source, gptq, out, args))
            for method, trained, how in recoveries(args):
                scheme = f"{method}(bits={bits}, group=64)"
                add(
                    bits, scheme, trained,
                    lambda out, scheme=scheme, how=how: recovered(model, scheme, how, task, out, source, args),
                )  # fmt: skip
    show("books-llama-7m", rows, COLUMNS)


if __name__ == "__main__":
    main()
