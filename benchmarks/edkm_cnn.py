"""Clusters of 1, 2 and 3 bits in ResNet-20 and ResNet-56 on CIFAR-10: k-means afterwards, k-means by L-C, straight through, and DKM.

Every row starts from the same reference and, if it trains, takes the same number of minibatches of 128 with the same learning rates and a share of
distillation. All matrices are clustered, a table each; batch norms stay float32. Accuracy is that of the stored file on 3,000 test images
that decide nothing; 2,000 others choose the best of four checks. A second run reads finished rows.
"""

import json
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import parser, record, show

import tasks
import torch

import laconic as lc
from laconic.disk.store import stored_bytes
from laconic.recover import LC, Direct, FineTune, Steps, recover_task

WORK = tasks.WORK / "edkm_cnn"
METHODS = ("after training", "straight through", "L-C", "DKM")
COLUMNS = (
    "network",
    "bits",
    "method",
    "test",
    "validation",
    "reference",
    "file bytes",
    "ratio",
    "minibatches",
    "minutes",
)


def way(method: str, bits: int, args: Namespace) -> tuple[str, Any]:
    """The scheme and the recovery of a row."""
    total, norms = args.minibatches, 8
    learn = Steps("adamw", args.lr, args.lr / 50, clip=5.0, precision="bfloat16", distill=0.9)
    if method == "after training":
        return f"KMeans({bits})", Direct(norm_batches=norms)
    if method == "L-C":
        steps = 8
        half = total // 2 // steps
        sgd = Steps(lr=0.03, lr_end=0.01, precision="bfloat16", distill=0.9)
        tail = FineTune(total - half * steps, learn, checks=4, norm_batches=norms)
        return f"KMeans({bits})", LC(steps, half, a=1.4, learn=sgd, norm_batches=norms, then=tail)
    how = FineTune(total, learn, checks=4, norm_batches=norms)
    return (f"KMeans({bits})" if method == "straight through" else f"DKM({bits})"), how


def run(network: str, method: str, bits: int, args: Namespace) -> dict[str, Any]:
    """A row: from an earlier run, or made now."""
    file = WORK / f"{network}-{method.replace(' ', '')}-{bits}-{args.minibatches}-{args.seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    model, task = tasks.task(network, args)
    task, started = task.checked(), time.time()
    scheme, how = way(method, bits, args)
    compressed, found = recover_task(model, f"[('*', {scheme})]", how, task, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder:
        lc.save(compressed, folder)
        stored = lc.load_into(tasks.task(network, args)[0], folder).eval()
        size = stored_bytes(Path(folder))
        row = {
            "network": network, "bits": bits, "method": method, "test": task.judge(stored, task.test or []).score, "validation": found.score,
            "reference": task.judge(model, task.test or []).score, "file bytes": size,
            "ratio": 4 * sum(p.numel() for p in model.parameters()) / size, "minibatches": found.minibatches,
            "minutes": (time.time() - started) / 60, "recovery": repr(how), "scheme": scheme,
        }  # fmt: skip
    WORK.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row))
    return row


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"], choices=["resnet20", "resnet56"])
    made.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3])
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    made.add_argument("--minibatches", type=int, default=352, help="of every method that trains; 352 are one pass")
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for network in args.networks:
        for bits in args.bits:
            for method in args.methods:
                rows.append(run(network, method, bits, args))
                show(time.strftime("%H:%M:%S"), rows[-1:], COLUMNS)
    show("Clusters in CIFAR-10 networks", rows, COLUMNS)
    record("edkm_cnn", rows, args)


if __name__ == "__main__":
    main()
