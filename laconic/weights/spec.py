"""The two halves of a packed weight: a JSON spec, and tensors by name."""

from typing import Any

import torch
from torch import Tensor

from laconic.errors import CheckpointError

Spec = dict[str, Any]
"""The JSON half of a packed weight: its kind and everything that is needed to read its tensors back."""


def shape_of(spec: Spec) -> tuple[int, int]:
    """The [out, in] of a spec. Raises: CheckpointError unless it is two positive integers."""
    shape = spec.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in shape)):
        raise CheckpointError(f"{spec.get('kind')}: shape must be two positive integers, got {shape!r}")
    return shape[0], shape[1]


def expect(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> Tensor:
    """The stored tensor `name`, or CheckpointError when it is absent or not of exactly this type and shape."""
    if name not in tensors:
        raise CheckpointError(f"{kind}: expected a stored tensor {name!r}, found {sorted(tensors)}")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise CheckpointError(f"{kind}: stored tensor {name!r} should be {dtype} {tuple(shape)}, but is {found}")
    return tensor


def nested(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below `name.`, with that prefix removed: what a part of this weight packed."""
    prefix = name + "."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def prefixed(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, named below `name.`."""
    return {f"{name}.{key}": value for key, value in tensors.items()}
