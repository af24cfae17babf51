"""Condensa's Table 2: each network compressed by a search for its sparsity, under an accuracy floor 2 % (of 1) below the reference.

A row is one `lc.search` from the trained reference: its s*, test score, r_c (bytes of the non-zero parameters, as the paper counts them), the
ratio of real files, multiply-accumulates, and throughput measured side by side with the reference. A row that was finished before is read from
its folder in `benchmarks/work/`; one that was interrupted goes on. `--paper` takes the paper's numbers of iterations (for a GPU).
"""

import copy
import json
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from common import RESULTS, parser, record, shared, show

import tasks
import torch
from torch import nn

import laconic as lc
from laconic.goals import Goal
from laconic.machine import pick_device
from laconic.objectives import Throughput, flops, stored_bytes
from laconic.progress import Log
from laconic.recover.text import text_task
from laconic.search import SearchOptions, search_task
from laconic.search.profiles import profile_picture
from laconic.timing import side_by_side
from laconic.weights import baked

WORK = tasks.WORK / "condensa"
FREE = "sparsity=Free(0, 1)"


@dataclass(frozen=True)
class Row:
    """One line of the table. `effort` scales the minibatches of the row's recovery."""

    network: str
    label: str
    scheme: str
    goal: Goal
    margin: float = 0.02
    effort: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.network}-{self.label}"


P_Q = "Magnitude(sparsity=Free(0.5, 1), scope='model') >> Cast('float16')"
P_Q_HIGH = P_Q.replace("Free(0.5, 1)", "Free(0.8, 1)")
P_Q4 = P_Q.replace("Cast('float16')", "RTN(bits=4, group='channel', symmetric=True)")
P_Q_SCALED = P_Q.replace("scope='model'", "scope='model', scale='layer'")  # an embedding's entries are ten times as large as a matrix's
FILTER = f"FilterPrune({FREE}, scale='layer')"
SMALL, FAST = lc.Minimize(stored_bytes), lc.Maximize(Throughput(batch=128))
ROWS = [
    Row("resnet20", "P+Q", P_Q, SMALL),
    Row("resnet20", "Filter", FILTER, FAST),
    Row("resnet56", "P+Q", P_Q_HIGH, SMALL, effort=3),
    Row("resnet56", "P+Q4", P_Q4, SMALL, effort=1.5),
    Row("resnet56", "Filter", FILTER, FAST),
    Row("vgg", "P+Q", P_Q, SMALL),
    Row("vgg", "Filter", FILTER, FAST),
    Row("lstm", "P+Q", f"[('*', {P_Q_SCALED})]", SMALL, margin=0.05),
    Row("lstm", "Block(5)", f"[('embedding', Keep()), ('*', BlockPrune({FREE}, block=5))]", lc.Minimize(flops), margin=0.05),
    Row("books-llama-7m", "prune + 4 bits", f"Magnitude({FREE}, scope='model') >> RTN(bits=4, group=64)", SMALL, margin=0.05),
]


def recovery(row: Row, paper: bool) -> lc.LC:
    """The L-C run of a row. Short L-steps need a larger mu than the paper's long ones: what counts is mu x learning rate x minibatches."""
    images = row.network.startswith(("resnet", "vgg"))
    if paper and images:
        return lc.LC(steps=50, minibatches=4500, first=30_000, learn=lc.Steps(lr=0.1, lr_end=1e-5))
    if paper:
        return lc.LC(steps=5, minibatches=4500, first=7000, learn=lc.Steps(optimizer="adam", lr=1e-4, lr_end=1e-4))
    if images:
        learn, tail = (lc.Steps(lr=0.03, lr_end=end, precision="bfloat16", distill=0.9) for end in (0.01, 5e-4))
        return lc.LC(
            steps=4, minibatches=int(25 * row.effort), a=1.6, learn=learn, norm_batches=8,
            then=lc.FineTune(int(240 * row.effort), tail, checks=2, norm_batches=8),
        )  # fmt: skip
    known = row.network == "books-llama-7m"  # it was trained on these books: their labels have nothing more to say to it
    lr, share = (3e-4, 1.0) if known else (1e-3, 0.0)
    learn, tail = (lc.Steps(optimizer="adam", lr=lr, lr_end=lr * part, distill=share, temperature=1.0) for part in (0.3, 0.05))
    return lc.LC(
        steps=4, minibatches=int(25 * row.effort), mu=0.05, a=2.0, learn=learn, then=lc.FineTune(int(150 * row.effort), tail, checks=2),
    )  # fmt: skip


def problem(row: Row, args: Namespace) -> tuple[nn.Module, lc.Task]:
    """The reference and its data."""
    if row.network == "books-llama-7m":
        return text_task(
            shared(args, "models/books-llama-7m"), shared(args, "data/books-train.txt"), shared(args, "data/dracula.txt"), length=128, batch=16,
            seed=args.seed, dtype="auto",
        )  # fmt: skip
    model, task = tasks.task(row.network, args)
    return model.to(pick_device(args.device)), task


def run(row: Row, args: Namespace) -> dict[str, Any]:
    """The finished row: from its folder, or by a search."""
    out = WORK / row.name
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if not (out / "row.json").is_file():
        model, task = problem(row, args)
        options = SearchOptions(trials=args.trials, minutes=args.minutes, resume=True, seed=args.seed)
        found = search_task(model, row.scheme, task, (row.goal,), lc.within(row.margin), recovery(row, args.paper), out, options, Said())
        original = copy.deepcopy(model).float()  # both compute in float32
        timed = side_by_side({"reference": original, "compressed": baked(found.model)}, task.sample(), repeats=20)
        figures = row_of(row, found.result, timed)
        (out / "row.json").write_text(json.dumps(figures))
        (RESULTS / f"condensa-{row.name.replace(' ', '')}.svg").write_text(profile_picture(found.result))
    return json.loads((out / "row.json").read_text())


class Said(Log):
    """What a search says, on the terminal."""

    def say(self, message: str) -> None:
        print(f"  {time.strftime('%H:%M:%S')} {message}", flush=True)


def row_of(row: Row, result: dict[str, Any], timed: Any) -> dict[str, Any]:
    """The columns of the paper's Table 2, and ours."""
    before, best, layers = result["reference"], result["best"], result["layers"]
    macs = sum(layer["macs_before"] for layer in layers) / max(sum(layer["macs_after"] for layer in layers), 1)
    speed, done = timed[1]["speedup"], [trial for trial in result["trials"] if trial["state"] == "complete"]
    return {
        "network": row.network, "scheme": row.label, "s*": round(next(iter(best["values"].values())), 4),
        "reference": round(before["test_score"], 4), "test": round(best["test_score"], 4), "direct": round(best["direct_test_score"], 4),
        "validation": round(best["score"], 4), "floor": round(result["floor"], 4), "r_c": round(best["nonzero_ratio"], 2),
        "file ratio": round(best["ratio"], 2), "file bytes": best["stored_bytes"], "MACs": round(macs, 2), "throughput": round(speed, 3),
        "trials": len(done), "minibatches": result["cost"]["minibatches"], "ten cold": 10 * done[0]["cold_minibatches"],
        "minutes": round(sum(trial["seconds"] for trial in done) / 60, 1),  # also of a search that was resumed
    }  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    options.add_argument("--trials", type=int, default=10)
    options.add_argument("--minutes", type=float, default=None, help="wall-clock time of each row's search")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--paper", action="store_true", help="the paper's numbers of iterations")
    options.add_argument("--fresh", action="store_true", help="forget earlier results of these rows")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for row in ROWS:
        if row.name in args.rows:
            print(row.name, flush=True)
            print(run(row, args), flush=True)
    done = [json.loads(file.read_text()) for row in ROWS if (file := WORK / row.name / "row.json").is_file()]
    record("condensa", done, args)
    show("Compression under an accuracy floor", done)


if __name__ == "__main__":
    main()
