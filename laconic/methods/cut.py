"""Whole rows and columns set to zero: what a decision about structures comes down to, matrix by matrix."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.errors import SchemeError
from laconic.methods.base import Pruning
from laconic.methods.patterned import sparse
from laconic.model.sites import Site
from laconic.weights import Weight
from laconic.weights.codes import dense_bytes
from laconic.weights.dense import DTYPES
from laconic.weights.masks import Pattern


@dataclass(frozen=True, repr=False)
class Cut(Pruning):
    """Sets the named rows and columns of a matrix to zero and keeps the others as `dtype` values; needs no data.

    Rows are outputs (neurons, filters), columns are inputs (times the kernel, for a convolution). Encode the survivors
    with `>>`.
    Bits: those of the survivors + one per row if rows are cut only, one per column if columns are, one for each of both
    otherwise.
    Raises: SchemeError for an index that is repeated or outside the matrix.
    Source: Condensa section 3.1 (structure pruning); `FilterPrune` and its kin resolve to this. Cost: O(entries).
    """

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    dtype: str = "float32"

    kept: ClassVar[int] = 32

    def __post_init__(self) -> None:
        for name, indices in (("rows", self.rows), ("columns", self.columns)):
            whole = isinstance(indices, tuple) and all(type(i) is int and i >= 0 for i in indices)
            if not whole or len(set(indices)) < len(indices):
                raise SchemeError(f"Cut: {name} should be a tuple of different indices from 0, got {indices!r}")
        if self.dtype not in DTYPES:
            raise SchemeError(f"Cut: dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")

    def _check(self, shape: tuple[int, int]) -> None:
        for name, indices, size in (("row", self.rows, shape[0]), ("column", self.columns, shape[1])):
            if indices and max(indices) >= size:
                raise SchemeError(f"Cut: {name} {max(indices)} lies outside a matrix of {shape[0]} x {shape[1]}")

    def survivors(self, shape: tuple[int, int]) -> float:
        return (1 - len(self.rows) / shape[0]) * (1 - len(self.columns) / shape[1])

    def mask_bits(self, shape: tuple[int, int]) -> float:
        self._check(shape)
        return 8 * dense_bytes(
            (shape[0] if self.rows or not self.columns else 0) + (shape[1] if self.columns else 0), 1
        )

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return 8 * DTYPES[self.dtype].itemsize * self.survivors(shape) * shape[0] * shape[1] + self.mask_bits(shape)

    def _pattern(self, shape: tuple[int, int]) -> Pattern:
        """Blocks of a row or a column each; where both are cut, single entries, whose mask is then stored as rows and
        columns.
        """
        if self.rows and self.columns:
            return "unstructured"
        return (shape[0], 1) if self.columns else (1, shape[1])

    def __call__(self, site: Site) -> Weight:
        shape = (site.W.shape[0], site.W.shape[1])
        self._check(shape)
        weight = sparse(site, self._pattern(shape), 1 - self.survivors(shape), self.dtype)
        mask = torch.ones(shape, dtype=torch.bool, device=site.W.device)
        mask[list(self.rows)] = False
        mask[:, list(self.columns)] = False
        weight.set_mask(mask)
        weight.right_inverse(torch.where(mask, site.W.float(), 0.0))
        return weight
