"""Weights in a rotated basis: randomised Hadamard transforms on either side, for any size."""

import math
from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import Spec, Weight, check_matrix, expect, nested, prefixed, shape_of, unpack
from laconic.weights.codes import dense_bytes, pack_dense, unpack_dense


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] times an orthonormal symmetric n x n matrix: Sylvester's for the power of two in n, a DCT-like one for the odd rest.

    For n = 2**k m with m odd the matrix is H_(2**k) kron C_m with C_m[i, j] = (cos + sin)(2 pi i j / m) / sqrt(m), the discrete Hartley
    transform, which is orthonormal and its own inverse, as H is; so the whole is its own inverse. Cost: O(n (k + m)) per row.
    """
    n = x.shape[-1]
    odd = n // (n & -n)
    y = x.reshape(-1, n // odd, odd)
    if odd > 1:
        count = torch.arange(odd, device=y.device)
        angle = torch.outer(count, count).remainder(odd).double() * (2 * math.pi / odd)
        y = y @ ((angle.cos() + angle.sin()) / math.sqrt(odd)).to(y)
    step = 1
    while step < n // odd:
        y = y.unflatten(1, (-1, 2, step))
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), 2).flatten(1, 3)
        step *= 2
    return (y / math.sqrt(n // odd)).reshape(x.shape)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """n independent signs, +1 or -1."""
    return torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0


class Rotated(Weight):
    """W = S_o H weight H S_i: the inner weight lives in a basis in which W looks Gaussian; S are random signs, H orthonormal Hadamard.

    A side without signs is not rotated. Bits: those of the weight + one per sign. Decoding costs O(log n) per entry.
    Source: QuIP# section 3 (randomised Hadamard transform); sizes that are not powers of two by a Kronecker factor, see `hadamard`.
    """

    kind = "rotated"

    def __init__(self, weight: Weight, *, row_signs: Tensor | None = None, column_signs: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.weight = weight.shape, weight
        for signs, length in ((row_signs, self.shape[0]), (column_signs, self.shape[1])):
            if signs is not None and (signs.shape != (length,) or not bool((signs.abs() == 1).all())):
                raise SchemeError(f"Rotated: signs must be {length} values of +1 or -1")
        self.register_buffer("row_signs", row_signs.float() if row_signs is not None else None)
        self.register_buffer("column_signs", column_signs.float() if column_signs is not None else None)

    row_signs: Tensor | None
    column_signs: Tensor | None

    def rotate(self, W: Tensor) -> Tensor:
        """W [out, in] in the inner basis: H S_o W S_i H."""
        W = rotate_columns(W, self.column_signs)
        return rotate_columns(W.t(), self.row_signs).t() if self.row_signs is not None else W

    def forward(self) -> Tensor:
        W = self.weight.forward()
        if self.column_signs is not None:
            W = hadamard(W) * self.column_signs.to(W)
        if self.row_signs is not None:
            W = (hadamard(W.t()) * self.row_signs.to(W)).t()
        return W

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Rotated")
        return self.weight.right_inverse(self.rotate(W.detach()))

    def bits(self) -> int:
        return self.weight.bits() + sum(
            8 * dense_bytes(len(s), 1) for s in (self.row_signs, self.column_signs) if s is not None
        )

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        inner, tensors = self.weight.pack()
        tensors = prefixed("weight", tensors)
        for name, signs in (("row_signs", self.row_signs), ("column_signs", self.column_signs)):
            if signs is not None:
                tensors[name] = pack_dense((signs > 0).int(), 1)
        sides = [name for name in ("row_signs", "column_signs") if name in tensors]
        return {"kind": self.kind, "shape": list(self.shape), "sides": sides, "weight": inner}, tensors

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        signs: dict[str, Tensor] = {}
        for name, length in (("row_signs", shape[0]), ("column_signs", shape[1])):
            if name in spec.get("sides", ()):
                signs[name] = (
                    unpack_dense(expect(tensors, name, torch.uint8, (dense_bytes(length, 1),), "rotated"), 1, length)
                    * 2.0
                    - 1.0
                )
        try:
            self = cls(unpack(spec["weight"], nested(tensors, "weight")), **signs)
        except (KeyError, SchemeError) as error:
            raise CheckpointError(f"rotated: the spec is damaged: {error}") from error
        if self.shape != shape:
            raise CheckpointError(f"rotated: an inner weight of {self.shape} in a weight of {shape}")
        return self


def rotate_columns(W: Tensor, signs: Tensor | None) -> Tensor:
    """W S H along the last dimension, or W itself without signs."""
    return hadamard(W * signs.to(W)) if signs is not None else W
