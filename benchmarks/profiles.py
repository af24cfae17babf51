"""Sparsity profiles: the validation score that L-C recovers at many sparsities, every point a cold run of its own, as in figures 3 and 4.

Recorded for `search_samples.py`, which counts how many samples a search needs on them, in `results/condensa-profile.json`. The digits are
scikit-learn's (1,797 images of 8 x 8), the network a small convolutional one: a point takes seconds. `--network` records others.
"""

import json
from argparse import Namespace
from typing import Any

from common import RESULTS, parser, record, show

import torch
from condensa import ROWS, problem, recovery
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import laconic as lc
from laconic.model.sites import find_slots
from laconic.recover import recover_task
from laconic.scheme.filling import fix, free_of
from laconic.scheme.text import parse

SCHEMES = {
    "P+Q": "Magnitude(sparsity=Free(0, 1), scope='model') >> Cast('float16')",
    "Structure": "StructurePrune(sparsity=Free(0, 1), scale='layer')",
    "3 bits": "Magnitude(sparsity=Free(0, 1), scope='model') >> KMeans(bits=3)",
}
HOW = lc.LC(
    steps=4, minibatches=20, mu=0.5, a=1.5, learn=lc.Steps(lr=0.05), then=lc.FineTune(60, lc.Steps(lr=0.02), checks=2)
)


def digits(seed: int) -> tuple[nn.Module, lc.Task]:
    """A trained network and its data: 1,000 images to train, 500 for validation, 297 for test."""
    stored = load_digits()
    order = torch.randperm(len(stored.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(stored.images / 16, dtype=torch.float32)[order, None], torch.tensor(stored.target)[order]
    cut = {"train": (0, 1000, 50), "validation": (1000, 1500, 250), "test": (1500, 1797, 297)}
    data = {name: list(zip(x[a:b].split(n), y[a:b].split(n), strict=True)) for name, (a, b, n) in cut.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            for images, labels in data["train"]:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
    return model.eval(), lc.Task(data["train"], data["validation"], data["test"])


def profile(
    name: str,
    model: nn.Module,
    task: lc.Task,
    scheme: str,
    how: lc.LC,
    sparsities: list[float],
    margin: float,
    seed: int,
) -> dict[str, Any]:
    """The recovered and the direct validation score at every sparsity."""
    reference, parsed = task.judge(model, task.validation).score, parse(scheme)
    (key,) = free_of(parsed, find_slots(model))
    points = []
    for s in sparsities:
        found = recover_task(model, fix(parsed, {key: s}), how, task, seed=seed)[1]
        points.append({"sparsity": round(s, 4), "score": found.score, "direct": found.direct})
        print(name, points[-1], flush=True)
    return {
        "name": name,
        "reference": reference,
        "level": reference - margin,
        "scheme": scheme,
        "recovery": repr(how),
        "points": points,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--points", type=int, default=41)
    options.add_argument("--margin", type=float, default=0.02)
    options.add_argument(
        "--network",
        nargs="*",
        default=[],
        choices=[row.name for row in ROWS],
        help="rows of the Condensa table to record as well",
    )
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "condensa-profile.json"
    kept = {p["name"]: p for p in json.loads(file.read_text())["profiles"]} if file.is_file() else {}
    model, task = digits(args.seed)
    at = [i / args.points for i in range(1, args.points)]
    for label, scheme in SCHEMES.items():
        name = f"digits {label}"
        kept[name] = profile(name, model, task, scheme, HOW, at, args.margin, args.seed)
        _write(kept, args)
    for row in ROWS:
        if row.name in args.network:
            kept[row.name] = profile(
                row.name, *problem(row, args), row.scheme, recovery(row, False), at, row.margin, args.seed
            )
            _write(kept, args)
    show(
        "Sparsity profiles",
        [{"name": p["name"], "level": p["level"], "points": len(p["points"])} for p in kept.values()],
    )


def _write(kept: dict[str, Any], args: Namespace) -> None:
    rows = [{"name": p["name"], "level": p["level"], "points": len(p["points"])} for p in kept.values()]
    record("condensa-profile", rows, args, profiles=list(kept.values()))


if __name__ == "__main__":
    main()
