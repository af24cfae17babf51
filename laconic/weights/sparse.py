"""Matrices with zeros: a mask, and a Weight of any entry-wise kind for what survives."""

from typing import Any, Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import ColumnWeight, EntryWeight, Packed, Weight, check_matrix
from laconic.weights.blocks import Blocks
from laconic.weights.forms import Grid, Table
from laconic.weights.masks import (
    Pattern,
    check_pattern,
    choose,
    mask_bytes,
    mask_tensors,
    n_of_m,
    restore_mask,
    store_mask,
)
from laconic.weights.spec import Spec

_BLOCK = 128  # columns whose mask is chosen together in a sweep; SparseGPT's blocksize B_s
_DIMS = 8  # of a tensor whose blocks a damaged spec may name: more would be padded dimension by dimension


class Sparse(ColumnWeight):
    """W = mask * values: zero outside the mask, and `values` (a Weight that stores a code per entry) inside it.

    `pattern`: 'unstructured', 'n:m' (n kept of m neighbours), a block (rows, columns) or n-D `Blocks`. `sparsity` is
    the share of zeros that `fit` aims at; the mask says what it is. Bits: those of the surviving values + the mask (the
    cheaper of a bit map and column indices for unstructured masks, or a bit per row and column where whole ones were
    cut; log2 of the number of combinations per n:m group; one per block).
    """

    kind = "sparse"
    part_names = ("values",)

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
        width = _columns_of(pattern, self.shape[1])
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
        """Choose the mask of columns j : j + k of w [out, k]: keep the largest importance x w**2; then fit the values'
        side information to what is kept."""
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

    def grid_form(self) -> Grid | None:
        inner = self.values.grid_form()
        return None if inner is None else inner.masked(self.mask)

    def table_form(self) -> Table | None:
        inner = self.values.table_form()
        return None if inner is None else inner.masked(self.mask)

    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        mask_spec, tensors = store_mask(self.mask, self.pattern)
        return {"pattern": _written(self.pattern), "mask": mask_spec}, tensors

    def own_bits(self) -> int:
        return 8 * mask_bytes(self.mask, self.pattern)

    def part_bits(self, name: str, part: Weight) -> int:
        return self.values.bits(self.mask)

    def pack_part(self, name: str, part: Weight) -> tuple[Spec, dict[str, Tensor]]:
        return self.values.pack(self.mask.cpu())

    def nonzero_bits(self) -> int:
        """What survives the mask; the mask does not count."""
        return self.values.nonzero_bits(self.mask)

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        blocks = spec.get("pattern")
        if isinstance(blocks, dict) and any(isinstance(side, list) and len(side) > _DIMS for side in blocks.values()):
            raise CheckpointError(f"sparse: blocks of a tensor of more than {_DIMS} dimensions")
        return mask_tensors(spec.get("mask"))

    @classmethod
    def read(cls, packed: Packed) -> Self:
        pattern = _read(packed.spec["pattern"])
        mask = restore_mask(packed.spec["mask"], packed.tensors, packed.shape, pattern)
        self = cls(packed.survivors("values", mask), pattern=pattern, sparsity=1 - float(mask.float().mean()))
        self.mask = mask
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, pattern={self.pattern}"


def _columns_of(pattern: Pattern, columns: int) -> int:
    """The least number of columns that a mask is chosen for together."""
    if isinstance(pattern, Blocks):
        return columns
    if isinstance(pattern, str):
        group = n_of_m(pattern)
        return group[1] if group else 1
    return pattern[1]


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
