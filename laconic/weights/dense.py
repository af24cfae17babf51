"""Plain values in a float type."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import EntryWeight, Spec, check_matrix, expect, parameter, shape_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Cast(torch.autograd.Function):
    """x rounded to a storage dtype and back; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Dense(EntryWeight):
    """Every entry in `dtype`: W = values. Bits: 16 or 32 per entry.

    The values are kept in the computing precision and rounded at every decode, so what is computed is what is stored, also after training.
    """

    kind = "dense"

    def __init__(self, shape: tuple[int, int], *, dtype: str = "bfloat16") -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise SchemeError(f"Dense: dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        self.shape, self.dtype = (int(shape[0]), int(shape[1])), dtype
        self.values = parameter(torch.zeros(self.shape))

    def forward(self) -> Tensor:
        stored = DTYPES[self.dtype]
        if self.values.dtype in (stored, torch.float64):  # float64 is the tests' gradcheck, never a stored model
            return self.values
        return Cast.apply(self.values, stored)

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Dense")
        rounded = W.detach().to(DTYPES[self.dtype])
        if not torch.isfinite(rounded).all():
            raise SchemeError(
                f"Dense: values up to {W.abs().max().item():.3g} do not fit {self.dtype}; use bfloat16 or float32"
            )
        self.values.data = rounded.to(W.dtype).clone()
        return ()

    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Nothing to fit."""

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        return w.to(DTYPES[self.dtype]).to(w.dtype)

    def bits(self, keep: Tensor | None = None) -> int:
        count = self.shape[0] * self.shape[1] if keep is None else int(keep.sum())
        return 8 * DTYPES[self.dtype].itemsize * count

    def pack(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]:
        stored = self.values.detach().to(DTYPES[self.dtype]).cpu()
        values = stored[keep] if keep is not None else stored.contiguous()
        return {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}, {"values": values}

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Self:
        shape, dtype = shape_of(spec), spec.get("dtype")
        if dtype not in DTYPES:
            raise CheckpointError(f"dense: unknown dtype {dtype!r}")
        stored = expect(tensors, "values", DTYPES[dtype], shape if keep is None else (int(keep.sum()),), "dense")
        self = cls.__new__(cls)
        super(Dense, self).__init__()
        self.shape, self.dtype = shape, dtype
        values = stored
        if keep is not None:
            values = torch.zeros(shape, dtype=stored.dtype)
            values[keep] = stored
        self.values = parameter(values.to(torch.float32) if dtype != "float64" else values)
        return self
