"""Products of two thin matrices."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.weights.base import BIAS, Weight, check_matrix
from laconic.weights.dense import Dense


class LowRank(Weight):
    """W = left @ right with left [out, rank] and right [rank, in], both Weights. Bits: those of the parts.

    `bias` [1, out], if any, is what the layer adds to its outputs, so that the weight stands for x -> left right x +
    bias. `right_inverse` leaves it as it is, and is the truncated SVD of W (Eckart-Young), its singular values split
    evenly over the factors, each factor then projected.
    """

    kind = "lowrank"
    part_names = ("left", "right", BIAS)

    def __init__(self, left: Weight, right: Weight, bias: Weight | None = None) -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise SchemeError(f"LowRank: factors {left.shape} and {right.shape} do not multiply")
        if bias is not None and bias.shape != (1, left.shape[0]):
            raise SchemeError(f"LowRank: a bias of shape {bias.shape}; expected (1, {left.shape[0]})")
        self.left, self.right, self.bias = left, right, bias
        self.shape, self.rank = (left.shape[0], right.shape[1]), left.shape[1]

    @classmethod
    def of(cls, left: Tensor, right: Tensor, dtype: str = "bfloat16") -> Self:
        """The product of two given factors left [out, rank] and right [rank, in], stored in `dtype`."""
        factors = (
            Dense((left.shape[0], left.shape[1]), dtype=dtype),
            Dense((right.shape[0], right.shape[1]), dtype=dtype),
        )
        factors[0].right_inverse(left)
        factors[1].right_inverse(right)
        return cls(*factors)

    def forward(self) -> Tensor:
        return self.left.forward() @ self.right.forward()

    def rows(self, start: int, stop: int) -> Tensor:
        return self.left.rows(start, stop) @ self.right.forward()

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "LowRank")
        U, S, Vh = torch.linalg.svd(W.detach().float(), full_matrices=False)
        root = S[: self.rank].sqrt()
        self.left.right_inverse(U[:, : self.rank] * root)
        self.right.right_inverse(root.unsqueeze(1) * Vh[: self.rank])
        return ()

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, rank={self.rank}"
