"""Weights made of weights: sums, row and column scalings, column permutations, and views of a weight that lives
elsewhere."""

from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import COLUMN_SCALE, ColumnWeight, Packed, Weight, check_matrix
from laconic.weights.forms import Form, Grid, Table
from laconic.weights.spec import Spec, shape_of

F = TypeVar("F", bound=Form)


class Sum(Weight):
    """W = sum of the terms, each a Weight of the same shape. Bits: those of the terms.

    `right_inverse` projects what the earlier terms leave over onto the next one; it is one pass, so it is not
    idempotent for lossy terms.
    """

    kind = "sum"

    def __init__(self, *terms: Weight) -> None:
        super().__init__()
        if not terms or any(term.shape != terms[0].shape for term in terms):
            raise SchemeError(f"Sum: terms need one shape, got {[term.shape for term in terms]}")
        self.list, self.shape = nn.ModuleList(terms), terms[0].shape

    @property
    def terms(self) -> list[Weight]:
        """The weights that are added."""
        return [term for term in self.list if isinstance(term, Weight)]

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        total: Tensor = self.terms[0].rows(start, stop)
        for term in self.terms[1:]:
            total = total + term.rows(start, stop)
        return total

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Sum")
        left = W.detach()
        for term in self.terms:
            term.right_inverse(left)
            left = left - term.forward().detach().to(left.dtype)
        return ()

    def parts(self) -> dict[str, Weight]:
        return {str(i): term for i, term in enumerate(self.terms)}

    @classmethod
    def parts_in(cls, spec: Spec) -> dict[str, Any]:
        terms = spec.get("terms")
        return {str(i): term for i, term in enumerate(terms if isinstance(terms, list) else ())}

    @classmethod
    def with_parts(cls, specs: dict[str, Spec]) -> Spec:
        return {"terms": list(specs.values())}

    @classmethod
    def read(cls, packed: Packed) -> Self:
        return cls(*packed.all_parts().values())

    def grid_form(self) -> Grid | None:
        return self.terms[0].grid_form() if len(self.terms) == 1 else None

    def table_form(self) -> Table | None:
        return self.terms[0].table_form() if len(self.terms) == 1 else None


class Scaled(ColumnWeight):
    """W = diag(rows) weight diag(columns), each factor an optional Weight of shape [1, out] or [1, in]. Bits: those of
    all parts."""

    kind = "scaled"
    part_names = ("weight", "row_scale", COLUMN_SCALE)
    side_names = ("row_scale", COLUMN_SCALE)

    def __init__(self, weight: Weight, *, row_scale: Weight | None = None, column_scale: Weight | None = None) -> None:
        super().__init__()
        self.shape, self.weight, self.row_scale, self.column_scale = weight.shape, weight, row_scale, column_scale
        for factor, length in ((row_scale, weight.shape[0]), (column_scale, weight.shape[1])):
            if factor is not None and factor.shape != (1, length):
                raise SchemeError(f"Scaled: a factor of shape {factor.shape} should be (1, {length})")
        if isinstance(weight, ColumnWeight):
            self.columns, self.span = weight.columns, weight.span

    def _factor(self, start: int, stop: int) -> Tensor | float:
        rows = self.row_scale.forward().t()[start:stop] if self.row_scale is not None else 1.0
        return rows * self.column_scale.forward() if self.column_scale is not None else rows

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(start, stop) * self._factor(start, stop)

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Scaled")
        with torch.no_grad():
            factor = self._factor(0, self.shape[0])
        return self.weight.right_inverse(W.detach() / factor)

    def _columns(self, j: int, width: int) -> Tensor | float:
        with torch.no_grad():
            rows = self.row_scale.forward().t() if self.row_scale is not None else 1.0
            return rows * self.column_scale.forward()[:, j : j + width] if self.column_scale is not None else rows

    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Fit the inner weight to w [out, k] / (row x column factor); the factors stay. Errors there count factor**2 as
        much."""
        factor = self._columns(j, w.shape[1])
        weights = importance if importance is not None else torch.ones(1, device=w.device)
        self._inner.fit(w / factor, j, (weights * factor**2).expand_as(w))

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        factor = self._columns(j, w.shape[1])
        if metric is not None and isinstance(factor, Tensor) and factor.shape[1] > 1:
            metric = factor[0].unsqueeze(1) * metric
        return self._inner.nearest(w / factor, j, metric) * factor

    @property
    def _inner(self) -> ColumnWeight:
        if not isinstance(self.weight, ColumnWeight):
            raise SchemeError(f"Scaled: {type(self.weight).__name__} has no column-wise nearest values")
        return self.weight

    def grid_form(self) -> Grid | None:
        return self._scaled(self.weight.grid_form())

    def table_form(self) -> Table | None:
        return self._scaled(self.weight.table_form())

    def _scaled(self, form: F | None) -> F | None:
        if form is not None and self.row_scale is not None:
            form = form.times_rows(self.row_scale.forward().flatten())
        if form is not None and self.column_scale is not None:
            form = form.times_columns(self.column_scale.forward().flatten())
        return form


class Permuted(Weight):
    """W[:, order] = weight: columns stored in another order, so that a group holds columns that belong together.

    Bits: those of the weight + 16 or 32 per column.
    """

    kind = "permuted"
    part_names = ("weight",)

    def __init__(self, weight: Weight, order: Tensor) -> None:
        super().__init__()
        self.shape, self.weight = weight.shape, weight
        columns = self.shape[1]
        if order.shape != (columns,) or not torch.equal(order.sort().values.cpu().long(), torch.arange(columns)):
            raise SchemeError(f"Permuted: order must be a permutation of {columns} columns")
        self.register_buffer("order", order.to(torch.int64))

    order: Tensor

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(start, stop)[:, self.order.argsort()]

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Permuted")
        return self.weight.right_inverse(W[:, self.order])

    @property
    def _dtype(self) -> torch.dtype:
        return torch.int16 if self.shape[1] <= 2**15 else torch.int32

    def grid_form(self) -> Grid | None:
        inner = self.weight.grid_form()
        return None if inner is None else inner.reordered(self.order.argsort())

    def table_form(self) -> Table | None:
        inner = self.weight.table_form()
        return None if inner is None else inner.reordered(self.order.argsort())

    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        return {}, {"order": self.order.to(_order_dtype(self.shape[1])).cpu()}

    def nonzero_bits(self) -> int:
        """Those of the weight; the order does not count."""
        return self.weight.nonzero_bits()

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        return ("order",)

    @classmethod
    def read(cls, packed: Packed) -> Self:
        columns = packed.shape[1]
        return cls(packed.part("weight"), packed.tensor("order", _order_dtype(columns), (columns,)))


def _order_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 2**15 else torch.int32


class Shared(Weight):
    """A view of another weight: some of its rows, or its transpose. Bits: none, the owner stores them.

    A plain tie needs no Shared: it is the same Weight object, installed twice.
    """

    kind = "shared"

    def __init__(self, owner: Weight, *, transposed: bool = False, rows: tuple[int, int] | None = None) -> None:
        super().__init__()
        start, stop = rows or (0, owner.shape[0])
        if not 0 <= start < stop <= owner.shape[0]:
            raise SchemeError(f"Shared: rows {start}:{stop} are not rows of a weight of {owner.shape}")
        self.owner, self.transposed, self.window = owner, transposed, (start, stop)
        shape = (stop - start, owner.shape[1])
        self.shape = (shape[1], shape[0]) if transposed else shape

    def forward(self) -> Tensor:
        view = self.owner.rows(*self.window)
        return view.t() if self.transposed else view

    def right_inverse(self, W: Tensor) -> tuple[()]:
        """Project the owner so that this view is W [out, in]; the rows outside the view keep their values."""
        check_matrix(W, self.shape, "Shared")
        whole = self.owner.forward().detach().clone()
        whole[self.window[0] : self.window[1]] = (W.t() if self.transposed else W).to(whole.dtype)
        return self.owner.right_inverse(whole)

    def grid_form(self) -> Grid | None:
        inner = None if self.transposed else self.owner.grid_form()
        return None if inner is None else inner.cut(*self.window)

    def table_form(self) -> Table | None:
        inner = None if self.transposed else self.owner.table_form()
        return None if inner is None else inner.cut(*self.window)

    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        """The view only. Whoever stores it names the owner in `spec["owner"]`, and hands `resolve` that weight."""
        return {"transposed": self.transposed, "rows": list(self.window)}, {}

    @classmethod
    def read(cls, packed: Packed) -> Self:
        owner = packed.spec.get("owner")
        raise CheckpointError(f"shared: a view needs its owner {owner!r}; use Shared.resolve(spec, owner)")

    @classmethod
    def resolve(cls, spec: Spec, owner: Weight) -> Self:
        """The stored view of `owner`. Raises: CheckpointError when the view does not fit."""
        shape, rows = shape_of(spec), spec.get("rows")
        if not (isinstance(rows, list) and len(rows) == 2 and all(isinstance(n, int) for n in rows)):
            raise CheckpointError(f"shared: rows must be two integers, got {rows!r}")
        try:
            self = cls(owner, transposed=bool(spec.get("transposed")), rows=(rows[0], rows[1]))
        except SchemeError as error:
            raise CheckpointError(str(error)) from error
        if self.shape != shape:
            raise CheckpointError(f"shared: a view of shape {self.shape}, the spec says {shape}")
        return self
