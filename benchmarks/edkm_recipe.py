"""eDKM's own recipe on books-llama-7m: `laconic recover --method dkm` as it is, at 3 bits, the embedding in 256 clusters.

    python benchmarks/edkm_recipe.py --threads 1      # about 15 minutes on one core

AdamW at a constant 5e-5, betas 0.9 and 0.95, no weight decay, gradients clipped at 1, two epochs, 64 windows of 256 tokens a step, learning from
labels. Scaled to 7 million weights in one thing: `--tokens` of the books instead of Alpaca's 52,000 examples. Half as many as the rows of
`edkm_lm.py`, so that two epochs see as many.
"""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from typing import Any

from common import parser, record, shared, show

import tasks
import torch
from language import TEXTS, Judge

import laconic as lc
from laconic.disk.store import stored_bytes
from laconic.host.progress import Log
from laconic.recover.deliver import recover_directory
from laconic.recover.recipes import dkm
from laconic.recover.text import text_task

WORK = tasks.WORK / "edkm_recipe"
BATCH = 8  # windows in memory at a time


def made(args: Namespace) -> dict[str, Any]:
    """The row, from training and the stored file."""
    recipe, out = dkm(args.bits), WORK / f"{args.bits}-{args.tokens}"
    source, books = (str(shared(args, file)) for file in ("models/books-llama-7m", "data/books-train.txt"))
    module, task = text_task(
        source,
        books,
        train_tokens=args.tokens,
        check_tokens=16_384,
        length=recipe.length,
        batch=BATCH,
        seed=args.seed,
        dtype="auto",
    )
    how = replace(recipe.how, checks=2, learn=replace(recipe.how.learn, accumulate=recipe.batch // BATCH))
    shutil.rmtree(out, ignore_errors=True)
    result = recover_directory(
        module, lc.parse(recipe.scheme), how, task, out, source=source, resume=False, overwrite=False, seed=args.seed, command="", progress=Log(),
    )  # fmt: skip
    judge = Judge(
        shared(args, "models/books-llama-7m"), {name: shared(args, file) for name, file in TEXTS.items()}, args.judged
    )
    figures = judge.measure(out)
    return {
        "bits": args.bits, "method": "eDKM's recipe", "learns from": "books", "scheme": recipe.scheme, "recovery": result["recovery"],
        "steps": result["minibatches"], "file bytes": stored_bytes(out), "seconds": result["seconds"], **figures,
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=int, default=3)
    options.add_argument("--tokens", type=int, default=256_000, help="of an epoch, of which there are two")
    options.add_argument("--judged", type=int, default=24_576, help="tokens of each test text")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    row = made(args)
    print(json.dumps(row), flush=True)
    record("edkm_recipe", [row], args)
    show(
        "eDKM's recipe",
        [row],
        ("bits", "file bytes", "dracula ppl", "wikitext2 ppl", "dracula KL", "wikitext2 KL", "steps", "seconds"),
    )


if __name__ == "__main__":
    main()
