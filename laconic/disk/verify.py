"""Whether what lies on the disk is what was computed: one reading back for every writer."""

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from laconic.disk.store import Compressed, same_tensor
from laconic.disk.tensors import is_finite
from laconic.errors import SchemeError, VerificationError
from laconic.weights import Weight
from laconic.weights.inputs import Inputs

_ROWS = 2048  # decoded at a time for a checksum
_PART = 1 << 27  # bytes compared at a time


@dataclass(frozen=True)
class Computed:
    """What a weight was when it was computed: the CRC-32 of what it decodes to, and how it asks inputs to be
    rounded.
    """

    checksum: int
    inputs: Inputs | None = None

    @classmethod
    def of(cls, weight: Weight) -> Self:
        """Cost: it is decoded once."""
        return cls(checksum(weight), weight.inputs)


def checksum(weight: Weight, name: str = "") -> int:
    """CRC-32 of the decoded matrix and output bias as float32, a few rows at a time, decoded on the CPU, where every
    reader decodes them.

    Raises: SchemeError when the site is named and a decoded value is not finite, as where 16 bits cannot hold it.
    """
    tensors = [*weight.parameters(), *weight.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        weight = copy.deepcopy(weight).cpu()
    value = 0
    with torch.no_grad():
        for start in range(0, weight.shape[0], _ROWS):
            rows = weight.rows(start, min(start + _ROWS, weight.shape[0])).float().contiguous()
            if name and not is_finite(rows):
                raise SchemeError(
                    f"{name}: decodes to values that are not finite: the type its values are stored in does not hold "
                    "them"
                )
            value = zlib.crc32(rows.numpy().data, value)
        if (bias := weight.output_bias()) is not None:
            value = zlib.crc32(bias.float().contiguous().numpy().data, value)
    return value


def verify(
    stored: Compressed,
    weights: Mapping[str, Computed],
    plain: Mapping[str, Callable[[], Tensor]],
    heard: Callable[[str], object] = lambda name: None,
) -> None:
    """Read a finished directory back: every weight decodes to what was computed, every plain tensor is what it should
    be, bit for bit.

    `plain`: for a stored name, who gives the tensor.
    `heard` is called with the name of every weight that was compared.
    Raises: VerificationError naming the first that is missing or differs. Cost: every weight is decoded once.
    """
    for name, computed in weights.items():
        if name not in stored.weights:
            raise VerificationError(f"{stored.path}: {name} was not stored")
        weight = stored.weight(name)
        if Computed.of(weight) != computed:
            raise VerificationError(f"{stored.path}: {name} does not decode to what was computed")
        heard(name)
    for name, give in plain.items():
        if name not in stored.files.tensors:
            raise VerificationError(f"{stored.path}: {name} was not stored")
        _compare(stored, name, give)


def _compare(stored: Compressed, name: str, give: Callable[[], Tensor]) -> None:
    """One plain tensor, a few rows at a time. Raises: VerificationError."""
    expected = give()
    many = expected.dim() > 0 and len(expected) > 0
    step = max(1, _PART // max(1, expected[:1].nbytes)) if many else 1
    for start in range(0, len(expected) if many else 1, step):
        rows = slice(start, start + step) if many else ...
        with stored.files.open() as reader:  # mapped anew for every part, so that both need not stay in memory
            if not same_tensor(reader.get(name)[rows], expected[rows]):
                raise VerificationError(f"{stored.path}: {name} is not what was to be stored")
