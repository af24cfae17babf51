"""Weights made of weights: sums, row and column scalings, column permutations, and views of a weight that lives elsewhere."""

from typing import Self

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import ColumnWeight, Spec, Weight, check_matrix, nested, prefixed, shape_of, unpack


class Sum(Weight):
    """W = sum of the terms, each a Weight of the same shape. Bits: those of the terms.

    `right_inverse` projects what the earlier terms leave over onto the next one; it is one pass, so it is not idempotent for lossy terms.
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

    def bits(self) -> int:
        return sum(term.bits() for term in self.terms)

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        packed = [term.pack() for term in self.terms]
        tensors = {name: t for i, (_, part) in enumerate(packed) for name, t in prefixed(str(i), part).items()}
        return {"kind": self.kind, "shape": list(self.shape), "terms": [spec for spec, _ in packed]}, tensors

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        terms = spec.get("terms")
        if not isinstance(terms, list) or any(shape_of(term) != shape for term in terms):
            raise CheckpointError(f"sum: every term should be of shape {shape}")
        return cls(*(unpack(term, nested(tensors, str(i))) for i, term in enumerate(terms)))


class Scaled(ColumnWeight):
    """W = diag(rows) weight diag(columns), each factor an optional Weight of shape [1, out] or [1, in]. Bits: those of all parts."""

    kind = "scaled"

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
        """Fit the inner weight to w / (row x column factor); the factors stay. Errors there count factor**2 as much."""
        factor = self._columns(j, w.shape[1])
        weights = importance if importance is not None else torch.ones(1, device=w.device)
        self._inner.fit(w / factor, j, (weights * factor**2).expand_as(w))

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        factor = self._columns(j, w.shape[1])
        inner = (
            metric
            if metric is None or not isinstance(factor, Tensor) or factor.shape[1] == 1
            else factor[0].unsqueeze(1) * metric
        )
        return self._inner.nearest(w / factor, j, inner) * factor

    @property
    def _inner(self) -> ColumnWeight:
        if not isinstance(self.weight, ColumnWeight):
            raise SchemeError(f"Scaled: {type(self.weight).__name__} has no column-wise nearest values")
        return self.weight

    def bits(self) -> int:
        return sum(part.bits() for part in (self.weight, self.row_scale, self.column_scale) if part is not None)

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        spec: Spec = {"kind": self.kind, "shape": list(self.shape)}
        tensors: dict[str, Tensor] = {}
        for name, part in (("weight", self.weight), ("row_scale", self.row_scale), ("column_scale", self.column_scale)):
            if part is not None:
                spec[name], packed = part.pack()
                tensors |= prefixed(name, packed)
        return spec, tensors

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        names = ("weight", "row_scale", "column_scale")
        parts = {name: unpack(spec[name], nested(tensors, name)) for name in names if name in spec}
        if "weight" not in parts or parts["weight"].shape != shape_of(spec):
            raise CheckpointError(f"scaled: the inner weight should be of shape {spec.get('shape')}")
        try:
            return cls(parts["weight"], row_scale=parts.get("row_scale"), column_scale=parts.get("column_scale"))
        except SchemeError as error:
            raise CheckpointError(f"scaled: the spec is damaged: {error}") from error


class Permuted(Weight):
    """W[:, order] = weight: columns stored in another order, so that a group holds columns that belong together.

    Bits: those of the weight + 16 or 32 per column.
    """

    kind = "permuted"

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

    def bits(self) -> int:
        return self.weight.bits() + 8 * self._dtype.itemsize * self.shape[1]

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        inner, tensors = self.weight.pack()
        order = {"order": self.order.to(self._dtype).cpu()}
        return {"kind": self.kind, "shape": list(self.shape), "weight": inner}, order | prefixed("weight", tensors)

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        shape = shape_of(spec)
        if (
            "order" not in tensors
            or tensors["order"].dtype not in (torch.int16, torch.int32)
            or tensors["order"].shape != (shape[1],)
        ):
            raise CheckpointError(f"permuted: expected an integer tensor 'order' of {shape[1]} columns")
        try:
            self = cls(unpack(spec["weight"], nested(tensors, "weight")), tensors["order"])
        except (KeyError, SchemeError) as error:
            raise CheckpointError(f"permuted: the spec is damaged: {error}") from error
        if self.shape != shape:
            raise CheckpointError(f"permuted: an inner weight of {self.shape} in a weight of {shape}")
        return self


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
        """Project the owner so that this view is W; the rows outside the view keep their values."""
        check_matrix(W, self.shape, "Shared")
        whole = self.owner.forward().detach().clone()
        whole[self.window[0] : self.window[1]] = (W.t() if self.transposed else W).to(whole.dtype)
        return self.owner.right_inverse(whole)

    def bits(self) -> int:
        return 0

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        """The view only. Whoever stores it names the owner in `spec["owner"]`, and hands `resolve` that weight."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "transposed": self.transposed,
            "rows": list(self.window),
        }, {}

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        raise CheckpointError(f"shared: a view needs its owner {spec.get('owner')!r}; use Shared.resolve(spec, owner)")

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
