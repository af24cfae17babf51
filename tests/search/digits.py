"""What the tests of `lc.search` share: a small conv net that reads digits, and a search with few and short trials."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import laconic as lc
from laconic.measure.objectives import stored_bytes
from laconic.recover import LC, Steps, Task
from laconic.search import Found

Problem = tuple[nn.Module, Task]
PRUNE_AND_CAST = "Magnitude(Free(0, 1), scope='model') >> Cast('float16')"
HOW = LC(4, 4, mu=0.3, a=1.3, learn=Steps(lr=0.05, lr_end=5e-3), norm_batches=2)


class Branching(nn.Module):
    """Two convolutions and a classifier; which way the data goes depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x[:, None]))
        x = x + torch.relu(self.second(x)) if x.mean() >= 0 else -x
        return self.last(x.flatten(1))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def run(problem: Problem, out: Path, scheme: Any = PRUNE_AND_CAST, **changes: Any) -> Found:
    """A search with few and short trials."""
    net, task = problem
    given = {
        "objective": lc.Minimize(stored_bytes), "keep": lc.within(0.03), "recover": HOW, "train": task.train, "validation": task.validation,
        "test": task.test, "out": out, "trials": 4,
    }  # fmt: skip
    return lc.search(net, scheme, **(given | changes))


def sampled(found: Found) -> list[tuple[Any, ...]]:
    """What the trials that were carried out tried and came to."""
    done = [row for row in found.result["trials"] if row["state"] == "complete"]
    return [(row["values"], row["score"], row["objective"], row["minibatches"]) for row in done]
