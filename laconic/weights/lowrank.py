"""Products of two thin matrices."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import Spec, Weight, check_matrix, nested, prefixed, shape_of, unpack
from laconic.weights.dense import Dense


class LowRank(Weight):
    """W = left @ right with left [out, rank] and right [rank, in], both Weights. Bits: those of the factors.

    `right_inverse` is the truncated SVD of W (Eckart-Young), its singular values split evenly over the factors, each factor then projected.
    """

    kind = "lowrank"

    def __init__(self, left: Weight, right: Weight) -> None:
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise SchemeError(f"LowRank: factors {left.shape} and {right.shape} do not multiply")
        self.left, self.right = left, right
        self.shape, self.rank = (left.shape[0], right.shape[1]), left.shape[1]

    @classmethod
    def of(cls, left: Tensor, right: Tensor, dtype: str = "bfloat16") -> Self:
        """The product of two given factors stored in `dtype`."""
        factors = Dense((left.shape[0], left.shape[1]), dtype=dtype), Dense((right.shape[0], right.shape[1]), dtype=dtype)
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

    def bits(self) -> int:
        return self.left.bits() + self.right.bits()

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        left_spec, left = self.left.pack()
        right_spec, right = self.right.pack()
        spec = {"kind": self.kind, "shape": list(self.shape), "left": left_spec, "right": right_spec}
        return spec, prefixed("left", left) | prefixed("right", right)

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        try:
            self = cls(unpack(spec["left"], nested(tensors, "left")), unpack(spec["right"], nested(tensors, "right")))
        except (KeyError, SchemeError) as error:
            raise CheckpointError(f"lowrank: the spec is damaged: {error}") from error
        if self.shape != shape:
            raise CheckpointError(f"lowrank: the factors give {self.shape}, the spec says {shape}")
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, rank={self.rank}"
