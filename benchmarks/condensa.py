"""Condensa's Table 2: each network compressed by a search for its sparsity, under an accuracy floor 2 % (of 1) below the reference.

A row is one `lc.search` from the trained reference: its s*, test score, r_c (bytes of the non-zero parameters, as the paper counts them), the
ratio of real files, multiply-accumulates, and throughput measured side by side with the reference. A row that was finished before is read from
its folder in `benchmarks/work/`; one that was interrupted goes on; rows of earlier results stay where this run has none of their own.

`--paper` is the paper's search and recovery and nothing of ours, for a GPU: mu 1e-3 and a 1.1, its numbers of iterations, labels only, DR-UCB as
published over sparsities from 0 to 1, every trial from the reference and to its end, one threshold without scales, norms as training left them.
The rows of VGG-16 on ImageNet need the data, which nobody may hand out:

    python benchmarks/condensa.py --rows vgg16-P+Q vgg16-Filter --imagenet FOLDER --paper --device cuda
"""

import copy
import json
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, parser, record, shared, show

import tasks
import torch
from torch import nn

import laconic as lc
from laconic.host.machine import pick_device
from laconic.host.progress import Log
from laconic.measure.goals import Goal
from laconic.measure.objectives import Throughput, flops, stored_bytes
from laconic.measure.timing import side_by_side
from laconic.recover.text import text_task
from laconic.search import SearchOptions, search_task
from laconic.show.search_profiles import profile_picture
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
P_Q_SCALED = P_Q.replace(
    "scope='model'", "scope='model', scale='layer'"
)  # an embedding's entries are ten times as large as a matrix's
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
    Row(
        "lstm",
        "Block(5)",
        f"[('embedding', Keep()), ('*', BlockPrune({FREE}, block=5))]",
        lc.Minimize(flops),
        margin=0.05,
    ),
    Row("vgg16", "P+Q", P_Q_HIGH, SMALL),
    Row("vgg16", "Filter", FILTER, FAST),
    Row(
        "books-llama-7m",
        "prune + 4 bits",
        f"Magnitude({FREE}, scope='model') >> RTN(bits=4, group=64)",
        SMALL,
        margin=0.05,
    ),
]


def recovery(row: Row, paper: bool) -> lc.LC:
    """The L-C run of a row. Short L-steps need a larger mu than the paper's long ones: what counts is mu x learning rate x minibatches."""
    images = row.network.startswith(("resnet", "vgg"))
    if paper:
        return published(row.network, images)
    if images:
        learn, tail = (lc.Steps(lr=0.03, lr_end=end, precision="bfloat16", distill=0.9) for end in (0.01, 5e-4))
        return lc.LC(
            steps=4, minibatches=int(25 * row.effort), a=1.6, learn=learn, norm_batches=8,
            then=lc.FineTune(int(240 * row.effort), tail, checks=2, norm_batches=8),
        )  # fmt: skip
    known = (
        row.network == "books-llama-7m"
    )  # it was trained on these books: their labels have nothing more to say to it
    lr, share = (3e-4, 1.0) if known else (1e-3, 0.0)
    learn, tail = (
        lc.Steps(optimizer="adam", lr=lr, lr_end=lr * part, distill=share, temperature=1.0) for part in (0.3, 0.05)
    )
    return lc.LC(
        steps=4, minibatches=int(25 * row.effort), mu=0.05, a=2.0, learn=learn, then=lc.FineTune(int(150 * row.effort), tail, checks=2),
    )  # fmt: skip


def published(network: str, images: bool) -> lc.LC:
    """The paper's settings: mu_j = 1e-3 x 1.1^j, 50 L-steps for CIFAR-10, 30 and five more of fine-tuning for ImageNet, 5 for text; 4,500
    minibatches each, 30,000 (7,000) in the first. Source: Condensa section 4, "L-C Optimizer Settings"."""
    if not images:
        learn = lc.Steps(optimizer="adam", lr=1e-4, lr_end=1e-4, clip=None)
        return lc.LC(steps=5, minibatches=4500, first=7000, mu=1e-3, a=1.1, learn=learn)
    learn = lc.Steps(lr=0.1, lr_end=1e-5, clip=None)
    if network != "vgg16":
        return lc.LC(steps=50, minibatches=4500, first=30_000, mu=1e-3, a=1.1, learn=learn)
    tail = lc.FineTune(5 * 4500, lc.Steps(lr=1e-3, lr_end=1e-5, clip=None), checks=5)  # its rate is not given
    return lc.LC(steps=30, minibatches=4500, first=30_000, mu=1e-3, a=1.1, learn=learn, then=tail)


def scheme_of(row: Row, paper: bool) -> str:
    """The row's scheme; the paper's searches all sparsities, and scales no layer."""
    if not paper:
        return row.scheme
    return (
        row.scheme.replace("Free(0.5, 1)", "Free(0, 1)")
        .replace("Free(0.8, 1)", "Free(0, 1)")
        .replace(", scale='layer'", "")
    )


def problem(row: Row, args: Namespace) -> tuple[nn.Module, lc.Task]:
    """The reference and its data."""
    if row.network == "books-llama-7m":
        return text_task(
            shared(args, "models/books-llama-7m"), shared(args, "data/books-train.txt"), shared(args, "data/dracula.txt"), length=128, batch=16,
            seed=args.seed, dtype="auto",
        )  # fmt: skip
    model, task = tasks.imagenet(args) if row.network == "vgg16" else tasks.task(row.network, args)
    return model.to(pick_device(args.device)), task


def run(row: Row, args: Namespace) -> dict[str, Any]:
    """The finished row: from its folder, or by a search."""
    out = WORK / (f"{row.name}-paper" if args.paper else row.name)
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if not (out / "row.json").is_file():
        model, task = problem(row, args)
        ours = {} if not args.paper else {"sampler": "drucb", "warm_share": None, "early_stop": False}
        options = SearchOptions(trials=args.trials, minutes=args.minutes, resume=True, seed=args.seed, **ours)  # type: ignore[arg-type]
        found = search_task(
            model,
            scheme_of(row, args.paper),
            task,
            (row.goal,),
            lc.within(row.margin),
            recovery(row, args.paper),
            out,
            options,
            Said(),
        )
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


def recorded(paper: bool) -> list[dict[str, Any]]:
    """The rows in the table's order: those in `benchmarks/work/`, and of the others what the results hold already."""
    file = RESULTS / ("condensa-paper.json" if paper else "condensa.json")
    earlier = json.loads(file.read_text())["rows"] if file.is_file() else []
    known = {(figures["network"], figures["scheme"]): figures for figures in earlier}
    for row in ROWS:
        made = WORK / (f"{row.name}-paper" if paper else row.name) / "row.json"
        if made.is_file():
            known[row.network, row.label] = json.loads(made.read_text())
    return [known[row.network, row.label] for row in ROWS if (row.network, row.label) in known]


def main() -> None:
    options = parser(__doc__)
    usual = [row.name for row in ROWS if row.network != "vgg16"]
    options.add_argument("--rows", nargs="+", default=usual, choices=[row.name for row in ROWS])
    options.add_argument(
        "--imagenet",
        type=Path,
        default=None,
        help="folder of ILSVRC2012: train/CLASS/*.JPEG and val/CLASS/*.JPEG (rows of vgg16)",
    )
    options.add_argument("--trials", type=int, default=10)
    options.add_argument("--minutes", type=float, default=None, help="wall-clock time of each row's search")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--paper", action="store_true", help="the paper's search and recovery, nothing of ours")
    options.add_argument("--fresh", action="store_true", help="forget earlier results of these rows")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for row in ROWS:
        if row.name in args.rows:
            print(row.name, flush=True)
            print(run(row, args), flush=True)
    done = recorded(args.paper)
    record("condensa-paper" if args.paper else "condensa", done, args)
    show("Compression under an accuracy floor", done)


if __name__ == "__main__":
    main()
