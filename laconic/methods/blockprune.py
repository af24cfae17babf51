"""Pruning of n-D blocks under one threshold over the network."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Pruning
from laconic.methods.channels import is_convolution
from laconic.methods.magnitude import check_scope
from laconic.methods.patterned import check_sparsity, sparse
from laconic.methods.threshold import Threshold
from laconic.model.sites import Site, Stats
from laconic.solvers.scores import Criterion, Scale, block_scores, check_criterion, gradients_for, lowest, relative
from laconic.weights import Weight
from laconic.weights.blocks import Blocks
from laconic.weights.codes import dense_bytes
from laconic.weights.masks import Pattern


@dataclass(frozen=True, repr=False)
class BlockPrune(Pruning):
    """Zeroes n-D blocks of weights, `sparsity` of all entries by one threshold over the network; needs no data by
    default.

    `block`: b for b x b blocks of a matrix and of whole kernels of a convolution, (rows, columns) for the same with two
    sizes, or a size for each of the parameter's own dimensions, such as (2, 2, 3, 3). Blocks at the far edges are what
    is left there. `scope="layer"`: each matrix loses that share. `criterion` and `scale` are those of `Magnitude`.
    Survivors stay in float32; encode them with `>>`.
    Bits: 32 x density + one per block. Raises: SchemeError for a block of more numbers than the parameter has
    dimensions.
    Source: Condensa section 3.1 and Table 1 (BlockPrune). Cost: O(entries), and a sort of the blocks.
    """

    sparsity: float = 0.5
    block: int | tuple[int, ...] = 5
    criterion: Criterion = "l2"
    scale: Scale = "none"
    scope: Literal["layer", "model"] = "model"

    kept: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_sparsity(self, self.sparsity)
        check_criterion(type(self).__name__, self.criterion, self.scale)
        check_scope(self, self.scope)
        sizes = (self.block, self.block) if isinstance(self.block, int) else self.block
        if not isinstance(sizes, tuple) or len(sizes) < 2 or not all(type(n) is int and n > 0 for n in sizes):
            raise SchemeError(
                f"BlockPrune: block should be a size, or a tuple of two or more sizes, from 1, got {self.block!r}"
            )

    @property
    def wants(self) -> Stats:
        return gradients_for(self.criterion)

    def survivors(self, shape: tuple[int, int]) -> float:
        return 1 - self.sparsity

    def mask_bits(self, shape: tuple[int, int]) -> float:
        """Exact for a matrix; of a convolution, whose kernel the shape does not tell, about what whole blocks would
        take.
        """
        sizes = (self.block, self.block) if isinstance(self.block, int) else self.block
        blocks = Blocks(shape, sizes).count if len(sizes) == 2 else math.ceil(shape[0] * shape[1] / math.prod(sizes))
        return 8 * dense_bytes(blocks, 1)

    def blocks(self, site: Site) -> Blocks:
        """The blocks of a site's parameter, seen as [out, in], [out, in, kernel ...] or [experts, out, in]."""
        dims = _layout(site)
        sizes = (self.block, self.block) if isinstance(self.block, int) else self.block
        if len(sizes) == 2 and len(dims) > 2:
            sizes = (*sizes, *dims[2:]) if is_convolution(site) else (1, *sizes)
        if len(sizes) != len(dims):
            raise SchemeError(
                f"{site.name}: a block of {len(sizes)} sizes {sizes} does not fit a parameter of {len(dims)} "
                f"dimensions {dims}"
            )
        return Blocks(dims, sizes)

    def units(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """The scores of the blocks, and the entries of each."""
        blocks = self.blocks(site)
        return relative(block_scores(site, blocks, self.criterion).flatten(), self.scale), blocks.sizes().flatten()

    def __call__(self, site: Site) -> Weight:
        blocks, shape = self.blocks(site), (site.W.shape[0], site.W.shape[1])
        scores, sizes = self.units(site)
        cut = lowest(scores, sizes, self.sparsity * site.W.numel())
        weight = sparse(site, _pattern(blocks, shape), self.sparsity, "float32")
        weight.set_mask(blocks.spread(~cut.view(blocks.grid), shape))
        weight.right_inverse(weight.mask * site.W.float())
        return weight

    def allocation(self) -> Allocation | None:
        return Threshold(self, self.sparsity, self.units) if self.scope == "model" else None


def _layout(site: Site) -> tuple[int, ...]:
    """The parameter's dimensions in the order in which W is a reshape of it, outputs before inputs."""
    rows, columns = site.W.shape
    if len(site.dims) < 3:
        return rows, columns
    return site.dims if is_convolution(site) else (site.dims[0], rows // site.dims[0], columns)


def _pattern(blocks: Blocks, shape: tuple[int, int]) -> Pattern:
    """The blocks as (rows, columns) of the matrix where they are that, for which more than this method has a use."""
    whole = blocks.block[2:] == blocks.dims[2:] and blocks.dims[0] == shape[0]
    if whole and all(n % b == 0 for n, b in zip(blocks.dims, blocks.block, strict=True)):
        return blocks.block[0], blocks.block[1] * math.prod(blocks.block[2:])
    return blocks
