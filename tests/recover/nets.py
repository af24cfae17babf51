"""What the tests of recovery share: small networks, a small real task, and a check that nothing of the user's was touched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laconic.model.calling import call
from laconic.recover import Task
from tests.needs import extra


class Words(nn.Module):
    """A language model: an embedding tied to the output, an LSTM, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.drop = nn.Embedding(20, 12), nn.LSTM(12, 12, batch_first=True), nn.Dropout(0.3)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.lstm(self.table(tokens))[0]))


def seeded(make: Any, seed: int = 0) -> Any:
    """What `make()` builds from this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(width: int = 24) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4)
        )
    )


def conv() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=True),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )
    )


def vectors(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [number, 16] of four classes that a small network can tell apart."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (number,), generator=g)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 0.7 * torch.randn(number, 16, generator=g), labels


def task(**more: Any) -> Task:
    """Training data in a shuffled loader, as a user has it; validation and test as lists."""
    return Task(
        DataLoader(TensorDataset(*vectors(96, 1)), 16, shuffle=True), [vectors(64, 2)], [vectors(64, 3)], **more
    )


def words_task() -> Task:
    g = torch.Generator().manual_seed(4)

    def tokens(number: int) -> list[tuple[Tensor, Tensor]]:
        ids = (
            torch.randint(20, (number, 1), generator=g) + 3 * torch.arange(9)
        ) % 20  # the next word follows from the last one
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.1, torch.randint(20, ids.shape, generator=g), ids)
        return [(part[:, :-1], part[:, 1:]) for part in ids.split(8)]

    return Task(tokens(64), tokens(16), tokens(16))


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    return {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }


def same(one: nn.Module, other: nn.Module) -> bool:
    return bytes_of(one) == bytes_of(other)


def outputs(model: nn.Module, data: Any) -> Tensor:
    with torch.no_grad():
        found = [call(model, batch) for batch in data]
    return torch.cat([getattr(y, "logits", y) for y in found])


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that a model, its modes, flags and gradients, and the global random states come out as they went in."""
    model.train(model.training)
    before = (
        bytes_of(model),
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
    )
    state, numbers, python = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    yield
    assert before == (
        bytes_of(model),
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
    )
    assert torch.equal(state, torch.get_rng_state())
    assert numbers == np.random.get_state()[1].tobytes()
    assert python == random.getstate()


def digits() -> tuple[DataLoader[Any], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """1,797 real 8 x 8 images of written digits: 1,000 to train on, 300 to validate, 497 to test."""
    datasets = extra("sklearn.datasets")
    given = datasets.load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(given.images / 16, dtype=torch.float32)[order], torch.tensor(given.target)[order]
    return (
        DataLoader(TensorDataset(x[:1000], y[:1000]), 50, shuffle=True),
        [(x[1000:1300], y[1000:1300])],
        [(x[1300:], y[1300:])],
    )


def trained(model: nn.Module, data: Any, minibatches: int = 400) -> nn.Module:
    """A reference, trained by SGD with a falling rate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        taken = 0
        while taken < minibatches:
            for x, y in data:
                optimizer.param_groups[0]["lr"] = 0.1 * 0.01 ** (taken / minibatches)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken += 1
    return model.eval()
