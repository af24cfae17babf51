"""Matrices with zeros: a mask, and a Weight of any entry-wise kind for what survives."""

from typing import Any, Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import ColumnWeight, EntryWeight, Spec, check_matrix, nested, prefixed, shape_of, unpack
from laconic.weights.blocks import Blocks
from laconic.weights.masks import Pattern, check_pattern, choose, mask_bytes, n_of_m, restore_mask, store_mask

_BLOCK = 128  # columns whose mask is chosen together in a sweep; SparseGPT's blocksize B_s


class Sparse(ColumnWeight):
    """W = mask * values: zero outside the mask, and `values` (a Weight that stores a code per entry) inside it.

    `pattern`: 'unstructured', 'n:m' (n kept of m neighbours), a block (rows, columns) or n-D `Blocks`. `sparsity` is the share of zeros that
    `fit` aims at; the mask says what it is. Bits: those of the surviving values + the mask (the cheaper of a bit map and column indices for
    unstructured masks, or a bit per row and column where whole ones were cut; log2 of the number of combinations per n:m group; one per block).
    """

    kind = "sparse"

    def __init__(self, values: EntryWeight, *, pattern: Pattern = "unstructured", sparsity: float = 0.5) -> None:
        super().__init__()
        check_pattern(pattern, values.shape)
        if not 0 <= sparsity <= 1:
            raise SchemeError(f"Sparse: sparsity is the share of zeros, 0 to 1, got {sparsity!r}")
        if values.columns > 1:
            raise SchemeError("Sparse: values must be stored entry by entry, not as vectors of several columns")
        self.shape, self.pattern, self.values = values.shape, pattern, values
        group = n_of_m(pattern)
        self.sparsity = 1 - group[0] / group[1] if group else sparsity
        width = (
            group[1]
            if group
            else 1
            if isinstance(pattern, str)
            else self.shape[1]
            if isinstance(pattern, Blocks)
            else pattern[1]
        )
        self.span = width if group else min(-(-_BLOCK // width) * width, self.shape[1])
        self.register_buffer("mask", torch.ones(self.shape, dtype=torch.bool))

    mask: Tensor

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.values.rows(start, stop)
        return torch.where(self.mask[start:stop], values, torch.zeros((), dtype=values.dtype, device=values.device))

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Sparse")
        return self.values.right_inverse(W)

    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Choose the mask of columns j : j + k: keep the largest importance x w**2; then fit the values' side information to what is kept."""
        if isinstance(self.pattern, Blocks) and w.shape[1] != self.shape[1]:
            raise SchemeError(
                f"Sparse: n-D blocks are chosen over all {self.shape[1]} columns at once, not {w.shape[1]} of them"
            )
        score = w.detach().square()
        kept = choose(score * importance if importance is not None else score, self.pattern, self.sparsity)
        self.set_mask(kept, j)
        if self.values.span is not None:
            self.values.fit(torch.where(kept, w, torch.zeros_like(w)), j, importance)

    def set_mask(self, mask: Tensor, j: int = 0) -> None:
        """Install the mask [out, k] of columns j : j + k."""
        self.mask = self.mask.to(mask.device)
        self.mask[:, j : j + mask.shape[1]] = mask

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        return torch.where(self.mask[:, j : j + 1], self.values.nearest(w, j, metric), torch.zeros_like(w))

    def bits(self) -> int:
        return self.values.bits(self.mask) + 8 * mask_bytes(self.mask, self.pattern)

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        mask_spec, mask = store_mask(self.mask, self.pattern)
        values_spec, values = self.values.pack(self.mask.cpu())
        spec = {
            "kind": self.kind,
            "shape": list(self.shape),
            "pattern": _written(self.pattern),
            "mask": mask_spec,
            "values": values_spec,
        }
        return spec, mask | prefixed("values", values)

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        try:
            pattern = _read(spec["pattern"])
            mask = restore_mask(spec["mask"], tensors, shape, pattern)
            values = unpack(spec["values"], nested(tensors, "values"), mask)
            self = cls(values, pattern=pattern, sparsity=1 - float(mask.float().mean()))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"sparse: the spec is damaged: {error}") from error
        if self.shape != shape:
            raise CheckpointError(f"sparse: values of {values.shape} in a weight of {shape}")
        self.mask = mask
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, pattern={self.pattern}"


def _written(pattern: Pattern) -> Any:
    """A pattern as JSON: a string, [rows, columns], or {"dims": ..., "block": ...}."""
    if isinstance(pattern, Blocks):
        return {"dims": list(pattern.dims), "block": list(pattern.block)}
    return pattern if isinstance(pattern, str) else list(pattern)


def _read(pattern: Any) -> Pattern:
    """The inverse of `_written`."""
    if isinstance(pattern, dict):
        return Blocks(tuple(pattern["dims"]), tuple(pattern["block"]))
    return pattern if isinstance(pattern, str) else (int(pattern[0]), int(pattern[1]))
