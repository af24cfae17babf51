"""Networks that no graph can be traced through: rows as channels of their own."""

import sys

import pytest
import torch
from torch import Tensor, nn

from tests.needs import extra

extra("torch_pruning")

from laconic.errors import SurgeryError
from laconic.surgery import couple, couple_or_mask, masks
from tests.recover.nets import seeded, untouched
from tests.search.digits import Branching


def test_masks_without_a_graph() -> None:
    """Rows are numbered one by one; those that reach the output, and what the output does not depend on, stay."""
    net = seeded(Branching)
    net.spare = nn.Linear(3, 3)
    with untouched(net):
        coupling = couple_or_mask(net, torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert {name: ids.tolist() for name, ids in coupling.channels.items()} == {
        "first": list(range(8)), "second": list(range(8, 16)), "last": [-1] * 10, "spare": [-1] * 3,
    }  # fmt: skip
    assert coupling.groups == coupling.ports == ()
    assert coupling.refused[1:] == [
        "last: its rows reach the model's output",
        "spare: the output does not depend on it on the example",
    ]


class Stream(nn.Module):
    """Words whose vector a block adds to; no layer behind it, or one that shares the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.up, self.down, self.tied = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 6), tied
        self.memory = nn.GRU(6, 6, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(torch.relu(self.up(self.memory(x)[0])))
        return nn.functional.linear(x, self.words.weight) if self.tied else x


def test_masks_find_the_last_layers() -> None:
    ids = torch.arange(6).view(2, 3)
    free = {
        tied: {name for name, ids_ in masks(Stream(tied), ids).channels.items() if (ids_ >= 0).all()}
        for tied in (True, False)
    }
    assert free == {True: {"up", "down"}, False: {"up"}}
    with pytest.raises(SurgeryError, match="no tensor of its output can be traced back"):
        masks(Sign(), torch.rand(2, 3))
    with pytest.raises(SurgeryError, match="Sign: its forward pass breaks on the example: RuntimeError: mat1 and mat2"):
        masks(Sign(), torch.rand(2, 4))


class Sign(nn.Module):
    """A class, and no way back from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(1)


def test_a_network_that_can_be_traced_keeps_its_groups() -> None:
    net, x = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
        torch.rand(5, 4, generator=torch.Generator().manual_seed(0)),
    )
    one, other = couple(net, x), couple_or_mask(net, x)
    assert {name: ids.tolist() for name, ids in one.channels.items()} == {
        name: ids.tolist() for name, ids in other.channels.items()
    }
    assert len(other.groups) == 1
    assert "reach the model's output" in other.refused[0]


def test_a_missing_torch_pruning_is_no_reason_to_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SurgeryError, match=r"pip install 'laconic\[surgery\]'"):
        couple_or_mask(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(2, 3))
