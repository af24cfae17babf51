"""Plain values in a float type."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import EntryWeight, Packed, check_matrix, parameter
from laconic.weights.spec import Spec

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

    The values are kept in the computing precision and rounded at every decode, so what is computed is what is stored,
    also after training.
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
        """Nothing to fit to w [out, k]."""

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        return w.to(DTYPES[self.dtype]).to(w.dtype)

    def own(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]:
        stored = self.values.detach().to(DTYPES[self.dtype]).cpu()
        return {"dtype": self.dtype}, {"values": stored[keep] if keep is not None else stored.contiguous()}

    def own_bits(self, keep: Tensor | None = None) -> int:
        count = self.shape[0] * self.shape[1] if keep is None else int(keep.sum())
        return 8 * DTYPES[self.dtype].itemsize * count

    def nonzero_bits(self, keep: Tensor | None = None) -> int:
        nonzero = self.forward() != 0
        return self.own_bits(nonzero if keep is None else nonzero & keep)

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        _dtype_in(spec)
        return ("values",)

    @classmethod
    def read(cls, packed: Packed) -> Self:
        dtype, keep = _dtype_in(packed.spec), packed.keep
        count = packed.shape if keep is None else (int(keep.sum()),)
        values = packed.tensor("values", DTYPES[dtype], count)
        if keep is not None:
            stored, values = values, torch.zeros(packed.shape, dtype=values.dtype)
            values[keep] = stored
        self = cls.__new__(cls)
        super(Dense, self).__init__()
        self.shape, self.dtype = packed.shape, dtype
        self.values = parameter(values.to(torch.float32) if dtype != "float64" else values)
        return self


def _dtype_in(spec: Spec) -> str:
    """The type of the values. Raises: CheckpointError for one that is none of ours."""
    dtype = spec.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"dense: unknown dtype {str(dtype)[:40]!r}")
    return dtype
