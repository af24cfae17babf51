"""A stored model run from where it is stored: as a chain of blocks that come into memory one at a time, or as a
whole.
"""

from contextlib import suppress
from typing import Protocol

import torch
from torch import nn

from laconic.model.batches import Batch, to_device
from laconic.model.blocks import BlockModel, ChainError, find_chain, open_chain
from laconic.model.calling import call, called_with
from laconic.model.residence import Provider, Residence


class StoredModel(Provider, Protocol):
    """A provider that has the module whose tensors it hands out."""

    @property
    def skeleton(self) -> nn.Module:
        """The module, on the meta device."""


def open_blocks(
    source: StoredModel, dtype: torch.dtype | None, device: torch.device, batch: Batch | None = None
) -> tuple[BlockModel | None, Residence, str]:  # fmt: skip
    """The source as a chain of blocks that come into memory one at a time, or None and why it is none; what `batch`
    shows is looked at too.
    """
    path = find_chain(source.skeleton)
    residence = Residence(source.skeleton, source, path, dtype, device)
    blocks, why = open_chain(residence, path, batch)
    if blocks is None:
        residence.chain = None
    return blocks, residence, why


def check_call(source: StoredModel, batch: Batch, name: str) -> None:
    """Call the model with one batch, of a chain only what comes before it and its first block.

    Raises: DataError when it cannot be called so: an argument is missing, of another shape, or beyond what the model
    takes.
    """
    device = torch.device("cpu")
    blocks, residence, _ = open_blocks(source, torch.float32, device)
    with (
        called_with(source.skeleton, batch, name),
        suppress(ChainError),
    ):  # no chain after all: whoever runs the blocks says so
        if blocks is not None:
            blocks.capture([batch])
        else:
            with residence.hold(""), torch.no_grad():
                call(source.skeleton, to_device(batch, device))
