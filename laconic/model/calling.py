"""A model that cannot be called with the data it was given is told of in one line, before any work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from laconic.errors import DataError, LaconicError
from laconic.model.blocks import Batch

_MISMATCHES = (
    TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, NotImplementedError, AssertionError,
)  # fmt: skip
"""What models raise for an argument that is missing, of another shape or type, or beyond what they take."""


@contextmanager
def called_with(model: nn.Module, batch: Batch, name: str) -> Iterator[None]:
    """Around the first call of a model with data of the user's. Raises: DataError naming the data for what the model does not take."""
    try:
        yield
    except (LaconicError, torch.OutOfMemoryError):
        raise
    except _MISMATCHES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name}: {type(model).__name__} cannot be called with {_shape(batch)}: {reason}") from error


def _shape(batch: Batch) -> str:
    """A batch in words: its tensors' names and shapes."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key} {list(value.shape)}" for key, value in batch.items() if hasattr(value, "shape"))
    first: Any = batch[0] if isinstance(batch, list | tuple) else batch
    return f"a tensor {list(first.shape)}"
