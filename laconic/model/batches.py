"""What a batch holds: the inputs a model is called with, and how many examples."""

from typing import Any

from torch import Tensor

from laconic.errors import DataError
from laconic.model.blocks import Batch


def size_of(batch: Batch) -> int:
    """The examples in a batch. Raises: DataError for a batch without tensors."""
    return len(inputs_in(batch)[0])


def unlabelled(batch: Batch) -> Any:
    """What a model is called with: a batch without its labels."""
    if isinstance(batch, dict):
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch[0] if isinstance(batch, list | tuple) else batch


def inputs_in(batch: Batch) -> list[Tensor]:
    """The tensors of a batch's inputs that have a dimension of examples, in order; a dict's by name."""
    found: list[Tensor] = []
    todo: list[Any] = [unlabelled(batch)]
    while todo:
        value = todo.pop(0)
        if isinstance(value, Tensor) and value.dim():
            found.append(value)
        elif isinstance(value, dict):
            todo[:0] = [value[key] for key in sorted(value)]
        elif isinstance(value, list | tuple):
            todo[:0] = list(value)
    if not found:
        raise DataError(
            f"expected a batch (a tensor, a dict of tensors, or a tuple whose first entry is the input), got a {type(batch).__name__}"
        )
    return found
