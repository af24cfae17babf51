"""`dkm_decode`: weights by differentiable k-means, with an exact gradient and nothing saved for it but the weight and
the first centroids.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, library, nn

from laconic.clustering import blocks, table
from laconic.clustering.recursion import Iteration, Reduce
from laconic.errors import SchemeError

Way = Literal["auto", "table", "blocks"]

_COLD = "towards 0 the nearest centroid is taken"

_TABLE_FROM = 1 << 14  # entries per table from which counting 65,536 codes costs less than treating every entry


def dkm_decode(
    weight: Tensor,
    centroids: Tensor,
    *,
    tau: float | Tensor,
    iterations: int,
    tolerance: float = 0.0,
    zero: bool = False,
    rows_per_table: int | None = None,
    scale: Tensor | None = None,
    rounded: torch.dtype | None = None,
    way: Way = "auto",
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """The weight as differentiable k-means decodes it, and the centroids it ends with; both exactly differentiable,
    once.

    A = softmax(-|w - c|^2 / tau), c <- A^T w / sum A, `iterations` times or until no centroid of a table moves by more
    than `tolerance` (0: all of them); decoded = A c, in the weight's dtype and shape. Gradients flow to the weight and
    to the starting centroids. Detach the centroids that are returned before they are carried to the next step.

    A `tau` that is a tensor of one number (a constant) may change between calls of a compiled function without
    compiling it again. `weight` [out, ...]; `centroids` [K], [K, d] or [tables, K, d], where d neighbouring columns are
    one vector and a table serves `rows_per_table` rows (None: one table for all). `zero` keeps the first centroid of
    every table at exactly 0. `scale` [out], a constant: row r is clustered as w / scale[r], in the weight's dtype, and
    multiplied back. `rounded`: float32 weights are clustered as this 16-bit type has them, and the gradient passes
    straight through the rounding. `way`: "table" (distinct 16-bit values, d = 1), "blocks" (every entry), or what
    suits. `group`: the weight is this process's rows of a matrix that the group's processes share
    (`scale` is of these rows); centroids and their gradients are the same everywhere.

    Fewer distinct values than centroids are fine: several centroids then meet at one value. 16-bit weights are computed
    in float64 by table and in float32 by blocks, under autocast too.
    Raises: SchemeError for arguments that cannot be carried out, and for weights that are not finite.
    Source: Cho et al. 2022 (DKM) section 3; Cho et al. 2023 (eDKM) section 2; the gradient is derived in docs/edkm.md.
    Cost: "table": a count, a look-up, a scatter-add and a look-up over the entries and O(65,536 K iterations);
    "blocks": O(entries K iterations). Saved for the backward pass: `weight` itself, `centroids`, and `scale` and `tau`
    where they are tensors.
    """
    shape = centroids.shape
    weight, group, restore = _local(weight, group)
    tables = centroids
    if centroids.dim() == 1:
        tables = centroids.reshape(1, -1, 1)
    elif centroids.dim() == 2:
        tables = centroids.unsqueeze(0)
    warmth = tau.detach() if isinstance(tau, Tensor) else None
    how = _How(
        tau=1.0 if isinstance(tau, Tensor) else tau,
        iterations=iterations,
        tolerance=tolerance,
        zero=zero,
        rows_per_table=rows_per_table or 0,
        rounded=rounded,
        by_table=False,
        group=group.group_name if group is not None else "",
    )
    how.check(weight, tables, scale, warmth, shared=group is not None)
    how = replace(how, by_table=_by_table(weight, tables, rounded, way, shared=group is not None))
    decoded, last = _Decode.apply(weight, tables, scale, warmth, how)
    return restore(decoded), last.reshape(shape)


@dataclass(frozen=True)
class _How:
    """All settings; `flat` in the order the operators take them, which know the rows of a table by the number of
    tables.
    """

    tau: float
    iterations: int
    tolerance: float
    zero: bool
    rows_per_table: int
    rounded: torch.dtype | None
    by_table: bool
    group: str

    @property
    def flat(self) -> tuple[Any, ...]:
        return (self.tau, self.iterations, self.tolerance, self.zero, self.rounded, self.by_table, self.group)

    def check(self, weight: Tensor, tables: Tensor, scale: Tensor | None, warmth: Tensor | None, shared: bool) -> None:
        """Whether the shapes and numbers fit together. Raises: SchemeError."""
        if not 0 < self.tau < math.inf or (warmth is not None and warmth.numel() != 1):
            raise SchemeError(
                f"dkm_decode: tau must be a positive number, got {self.tau if warmth is None else list(warmth.shape)}; "
                f"{_COLD}"
            )
        if self.iterations < 0 or not self.tolerance >= 0:
            raise SchemeError(
                f"dkm_decode: iterations and tolerance must be 0 or more, got {self.iterations} and {self.tolerance}"
            )
        if not weight.is_floating_point() or weight.dim() == 0 or not tables.is_floating_point():
            raise SchemeError(
                f"dkm_decode: expected a float tensor with rows, got {weight.dtype} {list(weight.shape)}, centroids "
                f"{tables.dtype}"
            )
        if tables.dim() != 3 or 0 in tables.shape:
            raise SchemeError(f"dkm_decode: centroids must be [K], [K, d] or [tables, K, d], got {list(tables.shape)}")
        count, K, d = tables.shape
        rows = len(weight)
        columns = weight.numel() // rows if rows else math.prod(weight.shape[1:])
        served = self.rows_per_table or rows
        if shared and count > 1:
            raise SchemeError(f"dkm_decode: a group shares one table; {count} tables of whole rows need no group")
        if count * served != rows or self.rows_per_table < 0:
            raise SchemeError(
                f"dkm_decode: {count} tables of {served} rows do not serve {rows} rows; give rows_per_table = rows / "
                "tables"
            )
        if (columns if weight.dim() > 1 else rows) % d:
            raise SchemeError(
                f"dkm_decode: vectors of {d} do not divide {columns if weight.dim() > 1 else rows} columns"
            )
        if not shared and served * columns // d < K:
            raise SchemeError(
                f"dkm_decode: {K} centroids for {served * columns // d} weights or vectors; use fewer bits"
            )
        if scale is not None and (scale.shape != (rows,) or scale.requires_grad):
            raise SchemeError(
                f"dkm_decode: scale must be a constant [{rows}], one number per row, got {list(scale.shape)}"
            )
        if self.rounded not in (None, *table.HALVES):
            raise SchemeError(f"dkm_decode: rounded must be torch.bfloat16 or torch.float16, got {self.rounded}")


def _by_table(weight: Tensor, tables: Tensor, rounded: torch.dtype | None, way: Way, shared: bool) -> bool:
    """Whether the work is done per distinct value; processes that share a weight decide alike, whatever the size of
    their parts.
    """
    dtype, d = rounded or weight.dtype, tables.shape[2]
    if way == "table":
        if d > 1:
            raise SchemeError(f"dkm_decode: way='table' needs scalars, got vectors of {d}")
        if dtype == torch.float32:
            raise SchemeError(
                "dkm_decode: way='table' needs 16-bit weights, got float32; rounded=torch.bfloat16 clusters them as "
                "bfloat16 has them"
            )
        if shared and dtype not in table.HALVES:
            raise SchemeError(
                f"dkm_decode: processes count values of 16 bits together, got {dtype}; way='blocks' shares any"
            )
        return True
    if way not in ("auto", "blocks"):
        raise SchemeError(f"dkm_decode: way must be 'auto', 'table' or 'blocks', got {way!r}")
    return (
        way == "auto" and d == 1 and dtype in table.HALVES and (shared or weight.numel() // len(tables) >= _TABLE_FROM)
    )


def _local(weight: Tensor, group: "dist.ProcessGroup | None") -> tuple[Tensor, "dist.ProcessGroup | None", Any]:
    """A plain tensor, the processes that share it, and what makes a result of its kind again: a DTensor split by rows
    is taken as its shard.
    """
    if type(weight) in (Tensor, nn.Parameter):
        return weight, group, lambda decoded: decoded
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return weight, group, lambda decoded: decoded
    mesh, placements, size, stride = weight.device_mesh, weight.placements, weight.shape, weight.stride()
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise SchemeError(
            f"dkm_decode: a DTensor must be split by rows over one mesh dimension, got {placements} over {mesh.ndim}"
        )
    return (
        weight.to_local(),
        group or mesh.get_group(),
        lambda decoded: DTensor.from_local(decoded, mesh, placements, run_check=False, shape=size, stride=stride),
    )


class _Decode(torch.autograd.Function):
    """Two opaque operators, so that a compiler sees one node forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tables: Tensor, scale: Tensor | None, warmth: Tensor | None, how: _How
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, tables, scale, warmth)
        ctx.how = how
        return _forward(weight, tables, scale, warmth, *how.flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, tables, scale, warmth = ctx.saved_tensors
        grad_weight, grad_tables = _backward(weight, tables, scale, warmth, grads[0], grads[1], *ctx.how.flat)
        return grad_weight, grad_tables, None, None, None


@library.custom_op("laconic::dkm_forward", mutates_args=())
def _forward(
    weight: Tensor, tables: Tensor, scale: Tensor | None, warmth: Tensor | None,
    tau: float, iterations: int, tolerance: float, zero: bool, rounded: torch.dtype | None, by_table: bool, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values, start = _clustered(weight, tables, scale, rounded), tables.to(_precision(weight, by_table))
    rule, decode = (
        Iteration(_number(tau, warmth), iterations, tolerance, zero),
        table.forward if by_table else blocks.forward,
    )
    # products in 16 bits would be neither exact nor those of the backward pass
    with torch.autocast(weight.device.type, enabled=False):
        decoded, last = decode(values, start, rule, _sum_over(group), weight.dtype)
    if not (bool(last.isfinite().all()) and (by_table or bool(decoded.isfinite().all()))):
        raise SchemeError(
            "dkm_decode: the weight or the centroids hold NaN or infinity, or numbers whose squares overflow"
        )
    decoded = decoded.view(weight.shape)
    if scale is not None:
        decoded.mul_(_per_row(scale, weight))
    return decoded, last.to(tables.dtype)


@library.custom_op("laconic::dkm_backward", mutates_args=())
def _backward(
    weight: Tensor, tables: Tensor, scale: Tensor | None, warmth: Tensor | None, grad: Tensor, grad_last: Tensor,
    tau: float, iterations: int, tolerance: float, zero: bool, rounded: torch.dtype | None, by_table: bool, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values, start = _clustered(weight, tables, scale, rounded), tables.to(_precision(weight, by_table))
    grad = (grad if scale is None else grad * _per_row(scale, weight)).reshape(values.shape)
    rule, backward = (
        Iteration(_number(tau, warmth), iterations, tolerance, zero),
        table.backward if by_table else blocks.backward,
    )
    with torch.autocast(weight.device.type, enabled=False):
        into, first = backward(values, start, grad, grad_last.to(start.dtype), rule, _sum_over(group), weight.dtype)
    into = into.view(weight.shape)
    if scale is not None:
        into.div_(_per_row(scale, weight))
    return into, first.to(tables.dtype)


@_forward.register_fake
@_backward.register_fake
def _shapes(weight: Tensor, tables: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What both operators return, for a compiler."""
    return weight.new_empty(weight.shape), tables.new_empty(tables.shape)


def _clustered(weight: Tensor, tables: Tensor, scale: Tensor | None, rounded: torch.dtype | None) -> Tensor:
    """What is clustered, as vectors [tables, n, d]: the weight, divided by its rows' scales and rounded where that is
    asked for.
    """
    values = weight.detach()
    values = values if scale is None else values / _per_row(scale, weight)
    values = values if rounded is None else values.to(rounded)
    count, _, d = tables.shape
    return values.reshape(count, weight.numel() // (count * d), d).contiguous()


def _number(tau: float, warmth: Tensor | None) -> float:
    """The temperature; that of a tensor is read here, behind the compiler's back."""
    if warmth is None:
        return tau
    found = float(warmth)
    if not 0 < found < math.inf:
        raise SchemeError(f"dkm_decode: tau must be a positive number, got a tensor of {found}; {_COLD}")
    return found


def _per_row(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.to(weight.dtype).reshape(-1, *(1,) * (weight.dim() - 1))


def _precision(weight: Tensor, by_table: bool) -> torch.dtype:
    """The type of centroids and attentions: tables are small enough for float64 where the device has it."""
    if weight.dtype == torch.float64 or (by_table and weight.device.type != "mps"):
        return torch.float64
    return torch.float32


def _sum_over(group: str) -> Reduce:
    """Sums a tensor over the group of that name; operators take names, because their arguments are plain values."""
    if not group:
        return lambda sums: sums
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    processes = _resolve_process_group(group)  # type: ignore[arg-type]

    def reduce(sums: Tensor) -> Tensor:
        sums = sums.contiguous()
        dist.all_reduce(sums, group=processes)
        return sums

    return reduce
