"""Products of two thin matrices."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import Spec, Weight, check_matrix, nested, prefixed, shape_of, unpack
from laconic.weights.dense import Dense


class LowRank(Weight):
    """W = left @ right with left [out, rank] and right [rank, in], both Weights. Bits: those of the parts.

    `bias` [1, out], if any, is what the layer adds to its outputs, so that the weight stands for x -> left right x + bias.
    `right_inverse` leaves it as it is, and is the truncated SVD of W (Eckart-Young), its singular values split evenly over the factors, each
    factor then projected.
    """

    kind = "lowrank"

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
        """The product of two given factors stored in `dtype`."""
        factors = (
            Dense((left.shape[0], left.shape[1]), dtype=dtype),
            Dense((right.shape[0], right.shape[1]), dtype=dtype),
        )
        factors[0].right_inverse(left)
        factors[1].right_inverse(right)
        return cls(*factors)

    def forward(self) -> Tensor:
        return self.left.forward() @ self.right.forward()

    def output_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.forward().flatten()

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
        return self.left.bits() + self.right.bits() + (self.bias.bits() if self.bias is not None else 0)

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        left_spec, left = self.left.pack()
        right_spec, right = self.right.pack()
        spec = {"kind": self.kind, "shape": list(self.shape), "left": left_spec, "right": right_spec}
        tensors = prefixed("left", left) | prefixed("right", right)
        if self.bias is not None:
            spec["bias"], bias = self.bias.pack()
            tensors |= prefixed("bias", bias)
        return spec, tensors

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        try:
            left, right = (unpack(spec[side], nested(tensors, side)) for side in ("left", "right"))
            self = cls(left, right, unpack(spec["bias"], nested(tensors, "bias")) if "bias" in spec else None)
        except (KeyError, SchemeError) as error:
            raise CheckpointError(f"lowrank: the spec is damaged: {error}") from error
        if self.shape != shape:
            raise CheckpointError(f"lowrank: the factors give {self.shape}, the spec says {shape}")
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, rank={self.rank}"
