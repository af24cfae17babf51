"""Weights in a rotated basis: randomised Hadamard transforms on either side, for any size."""

import math
from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import Packed, Weight, check_matrix
from laconic.weights.codes import dense_bytes, pack_dense, unpack_dense
from laconic.weights.forms import Grid, Table
from laconic.weights.spec import Spec


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] times an orthonormal symmetric n x n matrix: Sylvester's for the power of two in n, a DCT-like one for
    the odd rest.

    For n = 2**k m with m odd the matrix is H_(2**k) kron C_m with C_m[i, j] = (cos + sin)(2 pi i j / m) / sqrt(m), the
    discrete Hartley transform, which is orthonormal and its own inverse, as H is; so the whole is its own inverse.
    Cost: O(n (k + m)) per row.
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
    """n independent signs, +1 or -1, float [n]."""
    return torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0


class Rotated(Weight):
    """W = S_o H weight H S_i: the inner weight lives in a basis in which W looks Gaussian; S are random signs, H
    orthonormal Hadamard.

    A side without signs is not rotated. Bits: those of the weight + one per sign. Decoding costs O(log n) per entry.
    Source: QuIP# section 3 (randomised Hadamard transform); sizes that are not powers of two by a Kronecker factor, see
    `hadamard`.
    """

    kind = "rotated"
    part_names = ("weight",)

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

    def grid_form(self) -> Grid | None:
        return self.weight.grid_form() if not self._signs() else None

    def table_form(self) -> Table | None:
        return self.weight.table_form() if not self._signs() else None

    def _signs(self) -> dict[str, Tensor]:
        """The signs of the sides that are rotated, by name."""
        sides = {"row_signs": self.row_signs, "column_signs": self.column_signs}
        return {name: signs for name, signs in sides.items() if signs is not None}

    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        signs = self._signs()
        return {"sides": list(signs)}, {name: pack_dense((side > 0).int(), 1) for name, side in signs.items()}

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        sides = spec.get("sides", [])
        if not isinstance(sides, list):
            raise CheckpointError(f"rotated: sides should be a list, got {type(sides).__name__}")
        return tuple(name for name in ("row_signs", "column_signs") if name in sides)

    @classmethod
    def read(cls, packed: Packed) -> Self:
        lengths = dict(zip(("row_signs", "column_signs"), packed.shape, strict=True))
        signs: dict[str, Tensor] = {}
        for name in cls.tensors_in(packed.spec):
            data = packed.tensor(name, torch.uint8, (dense_bytes(lengths[name], 1),))
            signs[name] = unpack_dense(data, 1, lengths[name]) * 2.0 - 1.0
        return cls(packed.part("weight"), **signs)


def rotate_columns(W: Tensor, signs: Tensor | None) -> Tensor:
    """W [..., in] S H along the last dimension with signs [in], or W itself without signs."""
    return hadamard(W * signs.to(W)) if signs is not None else W
