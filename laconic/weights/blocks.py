"""n-D blocks of a tensor, kept or dropped whole; the blocks at the far edges may be smaller."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.errors import SchemeError


@dataclass(frozen=True)
class Blocks:
    """A tensor of shape `dims` cut into blocks of shape `block` (edge blocks are what is left), of which W [out, in] is
    a reshape.

    W's rows are the first dimensions of the tensor, in order: `dims` of a 2-D convolution are (out, in / groups,
    height, width). Raises: SchemeError unless both are as many positive integers.
    """

    dims: tuple[int, ...]
    block: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (*self.dims, *self.block)
        if len(self.dims) != len(self.block) or not self.dims or not all(type(n) is int and n > 0 for n in sizes):
            raise SchemeError(
                f"blocks: expected as many positive integers as the tensor has dimensions, got {self.block} for "
                f"{self.dims}"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks lie along each dimension."""
        return tuple(-(-n // b) for n, b in zip(self.dims, self.block, strict=True))

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix of this shape is a reshape of the tensor, with the first dimensions as rows."""
        rows = {math.prod(self.dims[:lead]) for lead in range(len(self.dims) + 1)}
        return shape[0] in rows and shape[0] * shape[1] == math.prod(self.dims)

    def reduce(self, x: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
        """One number per block [grid] from non-negative entries x (of W's or the tensor's shape); `how(x, dim)` is a
        sum or a maximum."""
        x = x.reshape(self.dims)
        for i, (n, b, g) in enumerate(zip(self.dims, self.block, self.grid, strict=True)):
            width = min(b, n)
            if g * width > n:
                x = F.pad(x, [0, 0] * (x.dim() - 1 - i) + [0, g * width - n])
            x = how(x.unflatten(i, (g, width)), i + 1)
        return x

    def sizes(self) -> Tensor:
        """The entries of every block, int64 [grid]."""
        total = torch.ones(self.grid, dtype=torch.int64)
        for i, (n, b, g) in enumerate(zip(self.dims, self.block, self.grid, strict=True)):
            lengths = (n - b * torch.arange(g)).clamp(max=b)
            total *= lengths.view(-1, *(1,) * (len(self.grid) - 1 - i))
        return total

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        """A value per block [grid] given to all its entries, as a matrix of `shape`."""
        for i, (n, b) in enumerate(zip(self.dims, self.block, strict=True)):
            values = values.repeat_interleave(min(b, n), i).narrow(i, 0, n)
        return values.reshape(shape)

    def corners(self, mask: Tensor) -> Tensor:
        """The first entry of every block of a mask [out, in], as [grid]: the inverse of `spread`."""
        return mask.reshape(self.dims)[tuple(slice(None, None, b) for b in self.block)]
