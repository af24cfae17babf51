"""Uniform grids: integers times a step, with the steps per tensor, per row or per group of columns, and quantizable
themselves."""

from typing import Literal, Self

import torch
from torch import Tensor

from laconic.errors import CheckpointError, SchemeError
from laconic.weights import codes
from laconic.weights.base import EntryWeight, Packed, Weight, check_matrix
from laconic.weights.dense import Dense
from laconic.weights.forms import Grid, bits_needed
from laconic.weights.grid import Clip, fit_grid
from laconic.weights.spec import Spec

Group = int | Literal["channel", "tensor"]
_ROWS = 1 << 22  # entries handled at a time when a large matrix is encoded: bounds the working memory to a few dozen MB


class Uniform(EntryWeight):
    """W[r, c] = scale[g, r] * (codes[r, c] - zero[g, r]), with g = c // group.

    `bits` 1-8, or None for UNBOUNDED integers (entropy-coded: one step, any rate). `group`: columns that share a scale,
    "channel" for one per row, "tensor" for one in all. Symmetric sets have no zero (1 bit symmetric: the two values
    -scale/2 and scale/2). `zero` is an integer of `bits` bits or a float. `second=(bits, columns)` stores scales and
    zeros as Uniform sets of their own, in groups along the rows.

    Bits: bits x entries (or their entropy with codec "ans") + those of scale and zero, two matrices [groups, rows].
    """

    kind = "uniform"
    part_names = side_names = ("scale", "zero")

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bits: int | None = 4,
        group: Group = "channel",
        symmetric: bool = False,
        zero: Literal["integer", "float"] = "integer",
        second: tuple[int, int] | None = None,
        codec: codes.Codec = "dense",
    ) -> None:
        super().__init__()
        _check(shape, bits, group, codec)
        self.shape, self.bit_width, self.group = (int(shape[0]), int(shape[1])), bits, group
        self.symmetric, self.zero_kind, self.second, self.codec = symmetric or bits is None, zero, second, codec
        self.low = -int(2 ** (bits - 1)) if bits is not None else -(2**30)
        self.high = -self.low - 1
        self.span = self.width = group if isinstance(group, int) else self.shape[1]
        side = (self.shape[1] // self.width, 1 if group == "tensor" else self.shape[0])
        self.register_buffer("codes", torch.zeros(self.shape, dtype=torch.int8 if bits is not None else torch.int32))
        self.scale: Weight = (
            _second_level(side, second) if second else Dense(side, dtype="bfloat16" if bits else "float32")
        )
        self.zero: Weight | None = None
        if not self.symmetric:
            self.zero = _second_level(side, second) if second else _zeros(side, bits or 0, zero)
        self._sides: tuple[Tensor, Tensor | float] | None = None

    codes: Tensor

    def _decoded_sides(self) -> tuple[Tensor, Tensor | float]:
        """Scale [groups, rows] and zero as `nearest` and the encoder use them; kept until they change."""
        if self._sides is None:
            with torch.no_grad():
                scale = self.scale.forward()
                zero = (
                    -0.5 * float(self.symmetric and self.bit_width == 1) if self.zero is None else self.zero.forward()
                )
            self._sides = torch.where(scale == 0, torch.ones_like(scale), scale), zero
        return self._sides

    def expanded_sides(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every entry [out, in] (or [1, in] under one step): W = scale (codes - zero)."""
        scale, zero = self._decoded_sides()
        zero = zero if isinstance(zero, Tensor) else torch.full_like(scale, zero)
        return tuple(side.t().repeat_interleave(self.width, 1) for side in (scale, zero))  # type: ignore[return-value]

    def forward(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        scale = self.scale.forward().t()
        per_row = slice(start, stop) if len(scale) > 1 else slice(None)
        part = self.codes[start:stop].to(scale.dtype).unflatten(1, (-1, self.width))
        if self.zero is not None:
            part = part - self.zero.forward().t()[per_row, :, None]
        elif self.bit_width == 1:
            part = part + 0.5
        return (part * scale[per_row, :, None]).flatten(1)

    def right_inverse(self, W: Tensor) -> tuple[()]:
        check_matrix(W, self.shape, "Uniform")
        self._sides = None
        scale, zero = self._decoded_sides()
        self.codes = self.codes.to(W.device)
        step = max(1, _ROWS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step) if scale.shape[1] > 1 else slice(None)
            grouped = W[start : start + step].detach().to(scale.dtype).unflatten(1, (-1, self.width))
            offset = zero.t()[rows, :, None] if isinstance(zero, Tensor) else zero
            integers = (grouped / scale.t()[rows, :, None] + offset).round_().clamp_(self.low, self.high)
            self.codes[start : start + step] = integers.flatten(1).to(self.codes.dtype)
        return ()

    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None, clip: Clip = "minmax") -> None:
        """Fit scales and zeros of columns j : j + k to w [out, k] by the range of each group, or by least weighted
        squared error (`clip="mse"`).

        Unbounded sets keep their step: it is what the rate is chosen by. Raises: SchemeError for columns that are not
        whole groups.
        """
        if self.bit_width is None:
            return
        if j % self.width or w.shape[1] % self.width:
            raise SchemeError(f"Uniform: columns {j} to {j + w.shape[1]} are not whole groups of {self.width}")
        per_tensor = self.group == "tensor"
        step = w.shape[0] if per_tensor else max(1, _ROWS // w.shape[1])
        found = []
        for start in range(0, w.shape[0], step):
            part = w[start : start + step].detach().float()
            grouped = part.reshape(1, 1, -1) if per_tensor else part.unflatten(1, (-1, self.width))
            weights = importance[start : start + step] if importance is not None and len(importance) > 1 else importance
            if weights is not None:
                weights = weights.expand_as(part).reshape(grouped.shape)
            found.append(
                fit_grid(
                    grouped,
                    self.bit_width,
                    symmetric=self.symmetric,
                    integer=self.integer_zero,
                    importance=weights,
                    clip=clip,
                )
            )
        first = j // self.width
        _write(self.scale, first, torch.cat([scale for scale, _ in found]).t())
        if self.zero is not None:
            _write(self.zero, first, torch.cat([zero for _, zero in found]).t())
        self._sides = None

    def forget(self) -> None:
        """Drop what was computed from scales and zeros, which were changed from outside."""
        self._sides = None

    @property
    def integer_zero(self) -> bool:
        """Whether zeros are whole numbers of steps, stored as such."""
        return self.zero_kind == "integer" and self.second is None

    def set_step(self, step: float) -> None:
        """Set one step for the whole matrix (of an unbounded set, most of all)."""
        self.scale.right_inverse(torch.full((1, 1), step, device=self.codes.device))
        self._sides = None

    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        scales, zeros = self._decoded_sides()
        scale = scales[j // self.width].unsqueeze(1)
        zero = zeros[j // self.width].unsqueeze(1) if isinstance(zeros, Tensor) else zeros
        return ((w / scale + zero).round_().clamp_(self.low, self.high) - zero) * scale

    def grid_form(self) -> Grid | None:
        rows = self.shape[0]
        scale = self.scale.forward().t().expand(rows, -1)
        zero = None if self.zero is None else self.zero.forward().t().expand(rows, -1)
        if self.zero is None and self.bit_width == 1:
            zero = torch.full_like(scale, -0.5)
        return Grid(self.codes, scale, zero, group=self.width, bits=self.bit_width or bits_needed(self.codes))

    def own(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]:
        stored = codes.store(self.codes, low=self.low, bits=self.bit_width, codec=self.codec, keep=keep)
        return {"bits": self.bit_width, "group": self.group, "codec": self.codec}, stored

    def own_bits(self, keep: Tensor | None = None) -> int:
        return codes.stored_bits(self.codes, self.bit_width, self.codec, keep)

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        return codes.stored_names(spec.get("codec"))

    @classmethod
    def read(cls, packed: Packed) -> Self:
        spec, shape = packed.spec, packed.shape
        bits, group, codec = spec["bits"], spec["group"], spec["codec"]
        _check(shape, bits, group, codec)
        scale, zero = packed.part("scale"), packed.optional("zero")
        low = -(2 ** (bits - 1)) if bits is not None else 0
        restored = codes.restore(packed.tensors, shape, low=low, bits=bits, codec=codec, keep=packed.keep)
        self = cls(shape, bits=bits, group=group, symmetric=zero is None, codec=codec)
        expected = self.scale.shape
        if scale.shape != expected or (zero is not None and zero.shape != expected):
            found = f"{scale.shape} and {zero.shape if zero else None}"
            raise CheckpointError(f"uniform: scale and zero should be {expected}, found {found}")
        self.scale, self.zero = scale, zero
        self.codes = restored.to(self.codes.dtype)
        self.second = (scale.bit_width or 0, scale.width) if isinstance(scale, Uniform) else None
        self.zero_kind = "float" if isinstance(zero, Dense) else "integer"
        return self

    def extra_repr(self) -> str:
        width = "unbounded" if self.bit_width is None else f"{self.bit_width} bits"
        return (
            f"{self.shape[0]} x {self.shape[1]}, {width}, group={self.group}, "
            f"{'symmetric' if self.symmetric else 'asymmetric'}, {self.codec}"
        )


def uniform_bits(
    shape: tuple[int, int],
    bits: int,
    group: Group,
    *,
    symmetric: bool = False,
    zero: Literal["integer", "float"] = "integer",
    second: tuple[int, int] | None = None,
) -> int:
    """The bits of a Uniform weight with densely packed codes, from its description alone. Raises: SchemeError as the
    constructor does."""
    _check(shape, bits, group, "dense")
    groups = shape[1] // group if isinstance(group, int) else 1
    rows = 1 if group == "tensor" else shape[0]
    entries = 8 * codes.dense_bytes(shape[0] * shape[1], bits)
    if second is not None:
        coarse = _second_group(rows, second[1])
        side = uniform_bits((groups, rows), second[0], coarse, zero="float")
        return entries + side * (1 if symmetric else 2)
    plain = 16 * groups * rows
    if symmetric:
        return entries + plain
    return entries + plain + (plain if zero == "float" else 8 * codes.dense_bytes(groups * rows, max(bits, 2)) + 16)


def _check(shape: tuple[int, int], bits: int | None, group: Group, codec: codes.Codec) -> None:
    if bits is not None and not (isinstance(bits, int) and 1 <= bits <= 8):
        raise SchemeError(f"Uniform: bits must be 1 to 8, or None for unbounded integers, got {bits!r}")
    if not (group in ("channel", "tensor") or (isinstance(group, int) and group > 0)):
        raise SchemeError(f"Uniform: group must be a number of columns, 'channel' or 'tensor', got {group!r}")
    if isinstance(group, int) and shape[1] % group:
        raise SchemeError(f"group {group} does not divide {shape[1]} columns")
    if codec not in codes.CODECS or (bits is None and codec != "ans"):
        raise SchemeError(
            f"Uniform: codec must be one of {codes.CODECS}, and 'ans' for unbounded integers, got {codec!r}"
        )


def _second_level(side: tuple[int, int], second: tuple[int, int]) -> Uniform:
    return Uniform(side, bits=second[0], group=_second_group(side[1], second[1]), zero="float")


def _second_group(rows: int, columns: int) -> Group:
    return columns if rows % columns == 0 and rows > columns else "channel"


def _zeros(side: tuple[int, int], bits: int, zero: str) -> Weight:
    """A place for the zeros: floats, or integers of `bits` bits in the symmetric set whose step is 1."""
    if zero == "float":
        return Dense(side)
    integers = Uniform(side, bits=max(bits, 2), group="tensor", symmetric=True)
    integers.set_step(1.0)
    return integers


def _write(weight: Weight, first: int, rows: Tensor) -> None:
    """Overwrite rows first : first + k of a side matrix. Rows of these sets are independent of each other, except under
    one fixed step."""
    if isinstance(weight, Dense):
        part = Dense((len(rows), weight.shape[1]), dtype=weight.dtype)
        part.right_inverse(rows)
        weight.values.data = weight.values.data.to(rows.device)
        weight.values.data[first : first + len(rows)] = part.values
    elif isinstance(weight, Uniform):
        part_of = Uniform(
            (len(rows), weight.shape[1]),
            bits=weight.bit_width,
            group=weight.group,
            symmetric=weight.symmetric,
            zero="float",
        )
        if weight.group == "tensor":
            part_of.scale = weight.scale
        else:
            part_of.fit(rows)
            _write_columns(weight.scale, first, part_of.scale)
            if weight.zero is not None and part_of.zero is not None:
                _write_columns(weight.zero, first, part_of.zero)
        part_of.right_inverse(rows)
        weight.codes = weight.codes.to(rows.device)
        weight.codes[first : first + len(rows)] = part_of.codes
        weight._sides = None


def _write_columns(whole: Weight, first: int, part: Weight) -> None:
    if not (isinstance(whole, Dense) and isinstance(part, Dense)):
        raise SchemeError(f"second-level scales must be plain values, got {type(whole).__name__}")
    whole.values.data = whole.values.data.to(part.values.device)
    whole.values.data[:, first : first + part.shape[1]] = part.values
