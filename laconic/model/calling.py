"""Calling a model: with one batch, in evaluation mode, and with data it does not take, which is told in one line before
any work.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from laconic.errors import DataError, LaconicError
from laconic.model.batches import Batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without caches of its own, in which one call would leave what the next one sees;
    all is put back.
    """
    training, modes = model.training, {module: module.training for module in model.modules()}
    every: dict[int, Any] = {
        id(config): config for module in modes if (config := getattr(module, "config", None)) is not None
    }
    configs = [config for config in every.values() if getattr(config, "use_cache", None) is True]
    model.eval()
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True
        for module in model.modules():
            # a module that came inside (an installed weight) takes the model's
            module.training = modes.get(module, training)


LOGITS = 1 << 24  # that one forward pass of a language model may hold
COMPARED = 1 << 22  # logits compared at a time

_MISMATCHES = (
    TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, NotImplementedError, AssertionError,
)  # fmt: skip
"""What models raise for an argument that is missing, of another shape or type, or beyond what they take."""


@contextmanager
def called_with(model: nn.Module, batch: Batch, name: str) -> Iterator[None]:
    """Around the first call of a model with data of the user's. Raises: DataError naming the data for what the model
    does not take.
    """
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
