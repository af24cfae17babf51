"""What an engine may take a weight for: a grid of integers with steps, or codes into tables; exactly, or not at all.

`as_grid(weight)` and `as_table(weight)` are what exporters ask. A Weight proposes a form (`grid_form`, `table_form`),
seen through scales, permutations and masks as far as its own arithmetic allows; here the proposal is decoded and
compared bit for bit with what the weight decodes to. Products of floats associate only where nothing is rounded on the
way, so the comparison, and no argument, decides.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from laconic.errors import SchemeError

_ENTRIES = 1 << 22  # decoded at a time while a form is compared
_WIDEST = 16  # bits of the codes that a table may have


class Form(ABC):
    """A matrix W [out, in] as integer codes and a few floats; every change gives another form, or None where it cannot
    be exact. The tensors may be the weight's own: they are not to be written to."""

    codes: Tensor

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """The decoded rows start : stop, [stop - start, in]."""

    @abstractmethod
    def cut(self, start: int, stop: int) -> Self | None:
        """The form of rows start : stop."""

    @abstractmethod
    def times_rows(self, factor: Tensor) -> Self | None:
        """The form of diag(factor) W, factor [out]."""

    @abstractmethod
    def times_columns(self, factor: Tensor) -> Self | None:
        """The form of W diag(factor), factor [in]."""

    @abstractmethod
    def reordered(self, order: Tensor) -> Self | None:
        """The form of W[:, order], order int64 [in]."""

    @abstractmethod
    def masked(self, mask: Tensor) -> Self | None:
        """The form of W with zeros where mask [out, in] is false."""

    def decode(self) -> Tensor:
        """W [out, in] in the type of the scales or values."""
        return self.rows(0, len(self.codes))


@dataclass(frozen=True, eq=False)
class Grid(Form):
    """W[r, c] = scale[r, g] * (codes[r, c] - zero[r, g]) with g = c // group.

    `codes` [out, in], of a signed integer type, from -2**(bits - 1) to 2**(bits - 1) - 1; `scale` [out, in / group],
    float; `zero` [out, in / group], float, or None for a symmetric grid. For unsigned codes subtract `low` from both
    codes and zero. A zero need not be an integer: `integer_zero` says whether it is one, in the range of the codes. The
    one-bit set -s/2, s/2 has the zero -0.5 everywhere.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    bits: int

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero: W is codes times scale."""
        return self.zero is None

    @property
    def low(self) -> int:
        """The least code, -2**(bits - 1)."""
        return -(1 << (self.bits - 1))

    @property
    def integer_zero(self) -> bool:
        """Whether every zero is an integer that the codes reach, so that 0 is a value of the grid."""
        if self.zero is None:
            return True
        reached = (self.zero >= self.low) & (self.zero <= -self.low - 1)
        return bool((reached & (self.zero == self.zero.round())).all())

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.codes[start:stop].to(self.scale.dtype).unflatten(1, (-1, self.group))
        if self.zero is not None:
            part = part - self.zero[start:stop, :, None]
        return (part * self.scale[start:stop, :, None]).flatten(1)

    def split(self, group: int) -> "Grid":
        """The same values with a scale per `group` columns: an engine's block of 32, say, in the group of a whole row.

        Raises: SchemeError unless `group` divides the present one.
        """
        if group < 1 or self.group % group:
            raise SchemeError(f"groups of {self.group} columns cannot be split into groups of {group}")
        times = self.group // group
        zero = None if self.zero is None else self.zero.repeat_interleave(times, 1)
        return replace(self, scale=self.scale.repeat_interleave(times, 1), zero=zero, group=group)

    def cut(self, start: int, stop: int) -> "Grid":
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)

    def times_rows(self, factor: Tensor) -> "Grid":
        return replace(self, scale=self.scale * factor[:, None])

    def times_columns(self, factor: Tensor) -> "Grid | None":
        """W diag(factor [in]): exact only where the factor is one number in every group of columns; groups may become
        finer."""
        width = _common_width(factor, self.group)
        if width == 1 < self.group:
            return None
        finer = self.split(width)
        return replace(finer, scale=finer.scale * factor[::width])

    def reordered(self, order: Tensor) -> "Grid | None":
        """Columns in the order [in]: only where those of every new group come from one old group; groups may become
        finer."""
        owner = order // self.group
        width = _common_width(owner, self.group)
        if width == 1 < self.group:
            return None
        groups = owner[::width]
        zero = None if self.zero is None else self.zero[:, groups]
        return Grid(self.codes[:, order], self.scale[:, groups], zero, group=width, bits=self.bits)

    def masked(self, mask: Tensor) -> "Grid | None":
        if not self.integer_zero:
            return None
        nothing = torch.zeros_like(self.codes)
        if self.zero is not None:
            nothing = self.zero.to(self.codes.dtype).repeat_interleave(self.group, 1)
        return replace(self, codes=torch.where(mask, self.codes, nothing))


@dataclass(frozen=True, eq=False)
class Table(Form):
    """W[r, d c : d c + d] = values[r // rows_per_table, codes[r, c]] with d = dimension.

    `codes` [out, in / d], of an integer type, from 0; `values` [tables, entries, d], float; a table serves
    `rows_per_table` rows.
    """

    codes: Tensor
    values: Tensor
    rows_per_table: int

    @property
    def dimension(self) -> int:
        """Neighbouring columns that one code stands for."""
        return self.values.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        owner = torch.arange(start, stop, device=self.codes.device) // self.rows_per_table
        index = self.codes[start:stop].long() + owner[:, None] * self.values.shape[1]
        return self.values.flatten(0, 1)[index].flatten(1)

    def cut(self, start: int, stop: int) -> "Table | None":
        first, last = start // self.rows_per_table, (stop - 1) // self.rows_per_table
        codes, values = self.codes[start:stop], self.values[first : last + 1]
        if first == last:
            return Table(codes, values, stop - start)
        whole = start % self.rows_per_table == 0 and stop % self.rows_per_table == 0
        return Table(codes, values, self.rows_per_table) if whole else None

    def times_rows(self, factor: Tensor) -> "Table | None":
        """diag(factor [out]) W: with a table per row where one serves rows of different factors, unless such a table is
        larger than its row."""
        grouped = factor.unflatten(0, (-1, self.rows_per_table))
        if bool((grouped == grouped[:, :1]).all()):
            return replace(self, values=self.values * grouped[:, :1, None])
        if self.values[0].numel() > self.codes.shape[1] * self.dimension:
            return None
        own = self.values.repeat_interleave(self.rows_per_table, 0)
        return Table(self.codes, own * factor[:, None, None], 1)

    def times_columns(self, factor: Tensor) -> "Table | None":
        """W diag(factor [in]): exact only where every unit of columns has the same factors."""
        units = factor.unflatten(0, (-1, self.dimension))
        if not bool((units == units[:1]).all()):
            return None
        return replace(self, values=self.values * units[0])

    def reordered(self, order: Tensor) -> "Table | None":
        """Columns in the order [in]: only where whole units of columns are moved."""
        units = order.unflatten(0, (-1, self.dimension))
        first = units[:, 0] // self.dimension
        if not torch.equal(units, first[:, None] * self.dimension + torch.arange(self.dimension, device=order.device)):
            return None
        return replace(self, codes=self.codes[:, first])

    def masked(self, mask: Tensor) -> "Table | None":
        """W where the mask [out, in] is set, else 0: only where the tables of the masked rows hold a zero."""
        zeros = (self.values == 0).all(2)
        lacking = ~zeros.any(1).repeat_interleave(self.rows_per_table)
        if self.dimension > 1 or bool((lacking & ~mask.all(1)).any()):
            return None
        nothing = zeros.int().argmax(1).repeat_interleave(self.rows_per_table).to(self.codes.dtype)
        return replace(self, codes=torch.where(mask, self.codes, nothing[:, None]))


class Decodes(Protocol):
    """What the two questions are put to: a Weight."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor: ...

    def grid_form(self) -> Grid | None: ...

    def table_form(self) -> Table | None: ...


@torch.no_grad()
def as_grid(weight: Decodes) -> Grid | None:
    """The weight as integers times steps, whose `decode()` equals `weight.forward()` bit for bit; None where there is
    no such grid.

    Entropy-coded codes are decoded; unbounded ones have the bits that they need. A table whose values in use lie on one
    grid is a grid too. What the weight asks of its layer (rounded inputs, an output bias) is no part of it. Cost:
    decodes the weight once or twice.
    """
    grid = weight.grid_form()
    if grid is None or not _is(weight, grid):
        table = weight.table_form()
        grid = None if table is None else _grid_of(table)
    return grid if grid is not None and _is(weight, grid) else None


@torch.no_grad()
def as_table(weight: Decodes) -> Table | None:
    """The weight as codes into tables, whose `decode()` equals `weight.forward()` bit for bit; None where there is no
    such table.

    A grid with one scale per row or one in all is a table too, unless a row's table would be larger than the row. Cost:
    as `as_grid`.
    """
    table = weight.table_form()
    if table is None or not _is(weight, table):
        grid = weight.grid_form()
        table = None if grid is None else _table_of(grid)
    return table if table is not None and _is(weight, table) else None


def bits_needed(codes: Tensor) -> int:
    """The least b for which all codes (any shape) lie from -2**(b - 1) to 2**(b - 1) - 1."""
    low, high = int(codes.min()), int(codes.max())
    return 1 + max(max(-low - 1, 0).bit_length(), max(high, 0).bit_length())


def _common_width(values: Tensor, group: int) -> int:
    """The widest groups of columns, by a divisor of `group`, in each of which values [in] are one number."""
    changes = (values[1:] != values[:-1]).nonzero().flatten() + 1
    return math.gcd(group, *changes.tolist())


def _is(weight: Decodes, form: Form) -> bool:
    """Whether the form decodes to the weight's very bits, zeros with their signs."""
    step = max(1, _ENTRIES // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        expected, found = weight.rows(start, stop), form.rows(start, stop)
        if expected.dtype != found.dtype or not torch.equal(expected, found):
            return False
        if not torch.equal(expected.signbit(), found.signbit()):
            return False
    return True


def _table_of(grid: Grid) -> Table | None:
    """All values of a grid that has one group of columns, row by row; one table where all rows are alike."""
    if grid.scale.shape[1] > 1 or grid.bits > _WIDEST:
        return None
    sides = [grid.scale] if grid.zero is None else [grid.scale, grid.zero]
    alike = all(bool((side == side[:1]).all()) for side in sides)
    count = 1 if alike else len(grid.codes)
    if count << grid.bits > grid.codes.numel():
        return None
    levels = torch.arange(1 << grid.bits, device=grid.codes.device, dtype=torch.int32) + grid.low
    zero = None if grid.zero is None else grid.zero[:count]
    every = Grid(levels.expand(count, -1), grid.scale[:count], zero, group=len(levels), bits=grid.bits)
    codes = grid.codes.to(torch.int32) - grid.low
    return Table(codes, every.decode().unsqueeze(2), len(codes) // count)


def _grid_of(table: Table) -> Grid | None:
    """A table whose values in use are first + k step with integers k, one first and one step for each table; else
    None."""
    if table.dimension > 1:
        return None
    owner = torch.arange(len(table.codes), device=table.codes.device) // table.rows_per_table
    levels = torch.zeros(table.values.shape[:2], dtype=torch.int32, device=table.codes.device)
    firsts, steps = [], []
    for t, values in enumerate(table.values.squeeze(2).double()):
        used = table.codes[owner == t].unique().long()
        first, step = _progression(values[used])
        multiples = (values[used] - first) / step
        if bool((multiples != multiples.round()).any()) or float(multiples.max()) >= 1 << _WIDEST:
            return None
        levels[t, used] = multiples.int()
        firsts.append(first)
        steps.append(step)
    codes = levels[owner[:, None], table.codes.long()]
    step_of = torch.tensor(steps, dtype=torch.float64, device=codes.device)[owner, None]
    zero = -torch.tensor(firsts, dtype=torch.float64, device=codes.device)[owner, None] / step_of
    bits, scale = max(1, int(codes.max()).bit_length()), step_of.to(table.values.dtype)
    if bool((zero == zero.round()).all()):
        centred = codes - zero.int()
        if (needed := bits_needed(centred)) <= bits:
            return Grid(centred, scale, None, codes.shape[1], needed)
    half = 1 << (bits - 1)
    return Grid(codes - half, scale, (zero - half).to(scale.dtype), codes.shape[1], bits)


def _progression(values: Tensor) -> tuple[float, float]:
    """The least of some values [n] and the least gap between two of them; of a single value its size, or 1 for zero."""
    distinct = values.unique()
    gap = distinct.diff().min() if len(distinct) > 1 else distinct[0].abs()
    return float(distinct[0]), float(gap) or 1.0
