"""What a model is called with and what it answers: tensors anywhere inside mappings, lists and tuples."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laconic.errors import DataError

Batch = Any
"""What a model is called with: a tensor, a dict of keyword arguments, or a tuple whose first entry is the input
(the rest are targets).
"""


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors of any shape anywhere inside mappings (which become dicts), lists and tuples, changed; everything else as
    it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, change) for item in value]
        # a named tuple takes its fields one by one
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor anywhere inside mappings, lists and tuples, in order."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: (found.append(tensor), tensor)[1])  # type: ignore[func-returns-value]
    return found


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors anywhere inside dicts, lists and tuples, moved."""
    return mapped(value, lambda tensor: tensor.to(device))


def examples_in(batch: Batch) -> int:
    """The number of examples in a batch: the length of its first tensor."""
    return len(next(iter(tensors_in(batch)), batch))


def usable(value: Any) -> Any:
    """A batch in which tensors made under `torch.inference_mode` are copies that gradients can pass through."""
    return mapped(value, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


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
            "expected a batch (a tensor, a dict of tensors, or a tuple whose first entry is the input), got a "
            f"{type(batch).__name__}"
        )
    return found
