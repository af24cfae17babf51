"""What methods share that scale the columns of a matrix by what they know of its inputs, before they round it."""

import torch
from torch import Tensor

from laconic.weights import Dense, Scaled, Uniform

# of the largest size, which smaller ones count as: a sample of inputs cannot tell them apart (AWQ's code bounds s
# likewise)
_LEAST = 1e-4


def bounded(size: Tensor) -> Tensor:
    """Sizes [in] of input columns, none below a ten-thousandth of the largest.

    Columns that no input used (or one that is not finite) get the geometric mean of the others, so that they are
    rounded as they are. All are 1 where nothing was seen.
    """
    used = (size > 0) & size.isfinite()
    if not used.any():
        return torch.ones_like(size)
    size = size.clamp(min=size[used].max() * _LEAST)
    return torch.where(used, size, size[used].log().mean().exp())


def stored_scale(s: Tensor) -> Tensor:
    """The scales [in] nearest to s whose inverses are bfloat16, which is how a weight stores them."""
    return 1 / (1 / s.float()).bfloat16().float()


def scaled(grid: Uniform, s: Tensor) -> Scaled:
    """`grid` for a matrix whose columns are multiplied by s [in], and divided by it again when it is decoded. Nothing
    is fitted yet.

    The factors 1 / s are stored in bfloat16: 16 bits per column.
    """
    factors = Dense((1, len(s)))
    factors.right_inverse(1 / s.float().unsqueeze(0))
    return Scaled(grid.to(s.device), column_scale=factors)
