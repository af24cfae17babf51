"""Values from a table: scalar clusters (d = 1) or vectors of d neighbouring columns."""

from typing import Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import codes
from laconic.weights.base import EntryWeight, Packed, Weight, check_matrix
from laconic.weights.dense import Dense
from laconic.weights.forms import Table
from laconic.weights.spec import Spec

_DISTANCES = 1 << 24  # distances held at a time while entries are assigned


class Codebook(EntryWeight):
    """W[r, d c : d c + d] = row_scale[r] * table[t, codes[r, c]] with t = r // rows_per_table.

    `bits` 1-16 give tables of 2**bits entries of `dimension` values. One table for the matrix, or one for every
    `rows_per_table` rows. `row_scale=True` stores a bfloat16 factor per row. Bits: bits x entries / dimension (or their
    entropy) + tables x 2**bits x dimension x 16.
    """

    kind = "codebook"
    part_names = side_names = ("table", "row_scale")

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bits: int = 4,
        dimension: int = 1,
        rows_per_table: int | None = None,
        row_scale: bool = False,
        codec: codes.Codec = "dense",
        table_dtype: str = "float16",
    ) -> None:
        super().__init__()
        _check(shape, bits, dimension, rows_per_table, codec)
        self.shape, self.bit_width, self.columns = (int(shape[0]), int(shape[1])), bits, dimension
        self.rows_per_table, self.codec = rows_per_table or self.shape[0], codec
        self.register_buffer(
            "codes",
            torch.zeros(self.shape[0], self.shape[1] // dimension, dtype=torch.uint8 if bits <= 8 else torch.int32),
        )
        tables = self.shape[0] // self.rows_per_table
        self.table: Weight = Dense((tables * 2**bits, dimension), dtype=table_dtype)
        self.row_scale: Weight | None = None
        if row_scale:
            self.row_scale = Dense((1, self.shape[0]))
            self.row_scale.right_inverse(torch.ones(1, self.shape[0]))

    codes: Tensor

    def tables(self) -> Tensor:
        """The decoded tables [tables, 2**bits, dimension]."""
        return self.table.forward().unflatten(0, (-1, 2**self.bit_width))

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        owner = torch.arange(start, stop, device=self.codes.device) // self.rows_per_table
        index = self.codes[start:stop].long() + owner.unsqueeze(1) * 2**self.bit_width
        decoded = self.table.forward()[index].flatten(1)
        return decoded * self.row_scale.forward().t()[start:stop] if self.row_scale is not None else decoded

    def right_inverse(self, W: Tensor) -> tuple[()]:
        """Nearest table entry for every d columns of W [out, in], by Euclidean distance; the tables stay. Cost: entries
        x 2**bits."""
        check_matrix(W, self.shape, "Codebook")
        with torch.no_grad():
            found = self._assign(W.detach().unflatten(1, (-1, self.columns)).float(), None)
        self.codes = found.to(self.codes.dtype)
        return ()

    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Nothing to fit to w [out, k] during a sweep: the tables come from a clustering (see `solvers.tables`)."""

    def set_tables(self, tables: Tensor, row_scale: Tensor | None = None) -> None:
        """Install tables [tables, 2**bits, dimension] and, if this set has them, row scales [rows]."""
        self.table.right_inverse(tables.flatten(0, 1))
        if self.row_scale is not None and row_scale is not None:
            self.row_scale.right_inverse(row_scale.reshape(1, -1))

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        index = self._assign(w.unsqueeze(1), metric).squeeze(1)
        owner = torch.arange(len(w), device=w.device) // self.rows_per_table
        q = self.tables().detach().to(w.dtype)[owner, index]
        return q * self.row_scale.forward().t() if self.row_scale is not None else q

    def _assign(self, vectors: Tensor, metric: Tensor | None) -> Tensor:
        """Index of the nearest entry for vectors [rows, units, dimension]; distances are of vector x metric."""
        tables = self.tables().detach().to(vectors.dtype)
        if self.row_scale is not None:
            vectors = vectors / self.row_scale.forward().t().unsqueeze(-1)
        if metric is not None:
            tables, vectors = tables @ metric, vectors @ metric
        found = torch.empty(vectors.shape[:2], dtype=torch.int64, device=vectors.device)
        scalar = self.columns == 1
        step = max(1, _DISTANCES // (vectors.shape[1] * (1 if scalar else 2**self.bit_width)))
        for t, table in enumerate(tables):
            first, last = t * self.rows_per_table, (t + 1) * self.rows_per_table
            lookup = _Nearest1d(table[:, 0]) if scalar else None
            for start in range(first, min(last, len(vectors)), step):
                part = vectors[start : min(start + step, last)]
                if lookup is not None:
                    found[start : start + len(part)] = lookup(part.squeeze(-1))
                else:
                    # in 16 bits the nearest entry would be another one
                    with torch.autocast(part.device.type, enabled=False):
                        norms = (table * table).sum(1)
                        found[start : start + len(part)] = (norms - 2 * part @ table.t()).argmin(-1)
        return found

    def table_form(self) -> Table | None:
        table = Table(self.codes, self.tables(), self.rows_per_table)
        return table if self.row_scale is None else table.times_rows(self.row_scale.forward().flatten())

    def own(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]:
        if keep is not None and self.columns > 1:
            raise SchemeError("Codebook: a sparse weight stores single entries, so its codebook needs dimension=1")
        fields = {"bits": self.bit_width, "dimension": self.columns, "rows_per_table": self.rows_per_table}
        stored = codes.store(self.codes, low=0, bits=self.bit_width, codec=self.codec, keep=keep)
        return fields | {"codec": self.codec}, stored

    def own_bits(self, keep: Tensor | None = None) -> int:
        return codes.stored_bits(self.codes, self.bit_width, self.codec, keep)

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        return codes.stored_names(spec.get("codec"))

    @classmethod
    def read(cls, packed: Packed) -> Self:
        spec, shape = packed.spec, packed.shape
        bits, dimension, codec = spec["bits"], spec["dimension"], spec["codec"]
        _check(shape, bits, dimension, spec["rows_per_table"], codec)
        table, row_scale = packed.part("table"), packed.optional("row_scale")
        size = (shape[0], shape[1] // dimension)
        restored = codes.restore(packed.tensors, size, low=0, bits=bits, codec=codec, keep=packed.keep)
        self = cls(shape, bits=bits, dimension=dimension, rows_per_table=spec["rows_per_table"], codec=codec)
        if table.shape != self.table.shape or (row_scale is not None and row_scale.shape != (1, shape[0])):
            raise CheckpointError(f"codebook: the table should be {self.table.shape}, found {table.shape}")
        if restored.numel() and not 0 <= int(restored.min()) <= int(restored.max()) < 2**bits:
            raise CheckpointError(f"codebook: a code lies outside the {2**bits} table entries")
        self.table, self.row_scale = table, row_scale
        self.codes = restored.to(self.codes.dtype)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.shape[0]} x {self.shape[1]}, {self.bit_width} bits, dimension={self.columns}, "
            f"rows_per_table={self.rows_per_table}"
        )


class _Nearest1d:
    """Nearest of a set of scalars by binary search: O(log K) an entry instead of O(K)."""

    def __init__(self, table: Tensor) -> None:
        values, self.order = table.sort()
        self.middles = ((values[1:] + values[:-1]) / 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return self.order[torch.bucketize(x.contiguous(), self.middles)]


def codebook_bits(shape: tuple[int, int], bits: int, dimension: int, rows_per_table: int | None) -> int:
    """The bits of a Codebook weight with densely packed codes, from its description alone. Raises: SchemeError as the
    constructor does."""
    _check(shape, bits, dimension, rows_per_table, "dense")
    tables = shape[0] // (rows_per_table or shape[0])
    return 8 * codes.dense_bytes(shape[0] * shape[1] // dimension, bits) + 16 * tables * 2**bits * dimension


def _check(shape: tuple[int, int], bits: int, dimension: int, rows_per_table: int | None, codec: codes.Codec) -> None:
    if not (isinstance(bits, int) and 1 <= bits <= 16):
        raise SchemeError(f"Codebook: bits must be 1 to 16, got {bits!r}")
    if not (isinstance(dimension, int) and dimension >= 1) or shape[1] % dimension:
        raise SchemeError(f"dimension {dimension} does not divide {shape[1]} columns")
    if rows_per_table is not None and (rows_per_table < 1 or shape[0] % rows_per_table):
        raise SchemeError(f"rows_per_table {rows_per_table} does not divide {shape[0]} rows")
    if codec not in codes.CODECS:
        raise SchemeError(f"Codebook: codec must be one of {codes.CODECS}, got {codec!r}")
