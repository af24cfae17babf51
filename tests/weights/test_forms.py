"""What engines may take a weight for: exactly, bit for bit, or not at all."""

import copy

import pytest
import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.weights import Codebook, Dense, LowRank, Permuted, Rotated, Scaled, Shared, Sparse, Sum, Uniform, Weight
from laconic.weights.forms import Grid, Table, as_grid, as_table, bits_needed
from laconic.weights.rotated import random_signs
from tests.weights.laws_weights import EXAMPLES, SHAPE, W, factor, same, solved, table, unbounded

GRIDS = {name for name in EXAMPLES if name.startswith("uniform")} | {"permuted", "scaled"}
TABLES = {name for name in EXAMPLES if name.startswith("codebook")} | {
    "permuted",
    "uniform-3-channel",
    "uniform-2-tensor",
    "uniform-unbounded",
}


def dense(values: Tensor, dtype: str = "bfloat16") -> Dense:
    weight = Dense((values.shape[0], values.shape[1]), dtype=dtype)
    weight.right_inverse(values)
    return weight


def constant_in(groups: int, length: int) -> Dense:
    """A factor [1, length] that is one number in each of some groups."""
    return dense(torch.linspace(0.5, 1.75, groups).repeat_interleave(length // groups).unsqueeze(0))


def grid(**options: object) -> Uniform:
    weight = solved(Uniform(SHAPE, **options))  # type: ignore[arg-type]
    assert isinstance(weight, Uniform)
    return weight


def progression(bits: int = 2, rows: int | None = None) -> Codebook:
    """A codebook whose values are -1, 0, 1, 2 times a step, each table with its own."""
    weight = Codebook(SHAPE, bits=bits, rows_per_table=rows)
    steps = torch.tensor([0.03125 * (t + 1) for t in range(SHAPE[0] // weight.rows_per_table)])
    weight.set_tables((steps[:, None] * (torch.arange(2**bits) - 1)).unsqueeze(2))
    weight.right_inverse(W)
    return weight


def exact(weight: Weight, form: Grid | Table | None) -> bool:
    return form is not None and same(form.decode(), weight().detach())


def test_which_kinds_are_grids_and_which_are_tables() -> None:
    scaled = EXAMPLES["scaled"][0]
    assert isinstance(scaled, Scaled)
    assert as_grid(scaled) is None, "its columns are scaled one by one"
    assert {name for name, (weight, _) in EXAMPLES.items() if as_grid(weight) is not None} >= GRIDS - {"scaled"}
    assert {name for name, (weight, _) in EXAMPLES.items() if as_table(weight) is not None} >= TABLES
    for name in ("dense-bf16", "lowrank", "sum", "rotated", "sparse", "sparse-rows"):
        assert as_grid(EXAMPLES[name][0]) is None
        assert as_table(EXAMPLES[name][0]) is None


@pytest.mark.parametrize("name", sorted(name for name in EXAMPLES if name.startswith("uniform")))
def test_a_grid_says_all_of_itself(name: str) -> None:
    weight = EXAMPLES[name][0]
    assert isinstance(weight, Uniform)
    found = as_grid(weight)
    assert found is not None
    groups = SHAPE[1] // found.group
    assert found.codes.shape == SHAPE
    assert found.scale.shape == (SHAPE[0], groups)
    assert found.zero is None or found.zero.shape == (SHAPE[0], groups)
    assert found.group == weight.width
    assert found.low <= int(found.codes.min()) <= int(found.codes.max()) <= -found.low - 1
    assert weight.bit_width in (None, found.bits)
    assert found.symmetric == (weight.symmetric and weight.bit_width != 1)
    by_hand = found.codes.float().unflatten(1, (groups, found.group))
    by_hand = by_hand - (0 if found.zero is None else found.zero.unsqueeze(2))
    assert torch.equal((by_hand * found.scale.unsqueeze(2)).flatten(1), weight())


def test_unbounded_codes_have_the_bits_they_need() -> None:
    weight = unbounded()
    weight.right_inverse(W)
    found = as_grid(weight)
    assert found is not None
    assert found.bits == bits_needed(weight.codes)
    assert found.symmetric
    for codes, bits in (
        ([0], 1),
        ([-1, 0], 1),
        ([1], 2),
        ([-2], 2),
        ([-8, 7], 4),
        ([8], 5),
        ([-9], 5),
        ([-128, 127], 8),
    ):
        assert bits_needed(torch.tensor(codes)) == bits, codes


def test_finer_groups_are_the_same_values() -> None:
    for weight in (grid(bits=4), grid(bits=4, group=16), grid(bits=3, group="tensor", symmetric=True)):
        found = as_grid(weight)
        assert found is not None
        finer = found.split(8)
        assert finer.group == 8
        assert finer.scale.shape == (SHAPE[0], 4)
        assert same(finer.decode(), weight())
        with pytest.raises(SchemeError, match="split"):
            found.split(5)


def test_row_scales_fold_where_nothing_is_rounded() -> None:
    """Codes, integer zeros, steps and factors of 8 bits: both products round once, to the same number."""
    rows = factor(SHAPE[0])
    for inner in (
        grid(bits=4, group=8),
        grid(bits=8, symmetric=True),
        grid(bits=3, group="tensor"),
        unbounded_at(0.03125),
    ):
        weight = Scaled(inner, row_scale=copy.deepcopy(rows))
        assert exact(weight, as_grid(weight))
    for steps in (0.03, 0.0301):  # 24 bits of the step times 8 of the factor are rounded, and then times the code
        weight = Scaled(
            unbounded_at(steps), row_scale=dense(torch.linspace(0.501, 1.999, SHAPE[0]).unsqueeze(0), "float32")
        )
        assert as_grid(weight) is None
    powers = dense(2.0 ** torch.arange(SHAPE[0]).remainder(5).unsqueeze(0))
    weight = Scaled(unbounded_at(0.03), row_scale=powers)
    assert exact(weight, as_grid(weight))


def unbounded_at(step: float) -> Uniform:
    weight = Uniform(SHAPE, bits=None, group="tensor", codec="ans")
    weight.set_step(step)
    weight.right_inverse(W)
    return weight


def test_column_scales_fold_where_a_group_has_one() -> None:
    inner = grid(bits=4, group=8)
    weight = Scaled(inner, column_scale=constant_in(4, SHAPE[1]))
    found = as_grid(weight)
    assert exact(weight, found)
    assert found is not None
    assert found.group == 8
    finer = Scaled(grid(bits=4), column_scale=constant_in(8, SHAPE[1]))
    found = as_grid(finer)
    assert exact(finer, found)
    assert found is not None
    assert found.group == 4, "a channel's group falls apart"
    assert as_grid(Scaled(inner, column_scale=constant_in(32, SHAPE[1]))) is None, "a scale per column is no grid"
    both = Scaled(inner, row_scale=dense(torch.tensor([[0.5, 2.0] * 12])), column_scale=constant_in(2, SHAPE[1]))
    assert exact(both, as_grid(both))
    vectors = table(bits=5, dimension=4)
    vectors.right_inverse(W)
    alike = Scaled(vectors, column_scale=dense(torch.tensor([[0.5, 1.5, 1.25, 3.0] * 8])))
    assert exact(alike, as_table(alike))
    assert as_table(Scaled(vectors, column_scale=constant_in(8, SHAPE[1]))) is None


def test_scales_that_are_absent_change_nothing() -> None:
    inner = grid(bits=4, group=8)
    plain = as_grid(inner)
    for weight in (Scaled(inner), Rotated(inner), Sum(inner), Scaled(Sum(Rotated(Scaled(inner))))):
        found = as_grid(weight)
        assert exact(weight, found)
        assert found is not None
        assert plain is not None
        assert torch.equal(found.scale, plain.scale)
    codes = table(bits=4, rows_per_table=8, row_scale=True)
    codes.right_inverse(W)
    assert exact(Scaled(codes), as_table(Scaled(codes)))
    assert as_grid(Rotated(inner, row_signs=random_signs(SHAPE[0], torch.Generator().manual_seed(0)))) is None
    assert as_grid(Sum(inner, LowRank.of(torch.ones(SHAPE[0], 1), torch.ones(1, SHAPE[1])))) is None


def test_an_order_is_undone_where_groups_stay_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randperm(SHAPE[1], generator=generator)
    whole = torch.tensor([2, 0, 3, 1])  # the order of four groups of eight, shuffled inside
    blocks = torch.cat([8 * g + torch.randperm(8, generator=generator) for g in whole])
    for inner, order, group in (
        (grid(bits=4), random, 32), (grid(bits=4, group="tensor"), random, 32), (grid(bits=4, group=8), random, None),
        (grid(bits=4, group=8), blocks, 8), (grid(bits=4, group=16), blocks, 8), (grid(bits=3, group=4), blocks, None),
    ):  # fmt: skip
        weight = Permuted(inner, order)
        found = as_grid(weight)
        assert (None if found is None else found.group) == group
        assert found is None or exact(weight, found)
    codes, vectors = table(bits=4, rows_per_table=8), table(bits=5, dimension=4)
    assert exact(Permuted(codes, random), as_table(Permuted(codes, random)))
    assert as_table(Permuted(vectors, random)) is None
    moved = torch.cat([torch.arange(4) + 4 * u for u in torch.randperm(8, generator=generator)])
    assert exact(Permuted(vectors, moved), as_table(Permuted(vectors, moved)))


def test_a_table_says_all_of_itself() -> None:
    for options in ({"bits": 4}, {"bits": 3, "rows_per_table": 8}, {"bits": 5, "dimension": 4}, {"bits": 10}):
        weight = table(**options)
        weight.right_inverse(W)
        found = as_table(weight)
        assert exact(weight, found)
        assert found is not None
        assert found.dimension == weight.columns
        assert found.rows_per_table == weight.rows_per_table
        assert found.values.shape == (SHAPE[0] // weight.rows_per_table, 2**weight.bit_width, weight.columns)
        assert found.codes.shape == (SHAPE[0], SHAPE[1] // weight.columns)


def test_row_scales_of_tables() -> None:
    """A table per row where rows share one and have factors of their own; none where that is larger than the row."""
    weight = table(bits=4, rows_per_table=8, row_scale=True)
    weight.right_inverse(W)
    found = as_table(weight)
    assert exact(weight, found)
    assert found is not None
    assert found.rows_per_table == 1
    large = table(bits=6, rows_per_table=8, row_scale=True)
    assert as_table(large) is None
    alike = Scaled(table(bits=6, rows_per_table=8), row_scale=constant_in(3, SHAPE[0]))
    found = as_table(alike)
    assert exact(alike, found)
    assert found is not None
    assert found.rows_per_table == 8


@pytest.mark.parametrize("rows", [None, 8, 1])
def test_a_table_that_is_a_progression_is_a_grid(rows: int | None) -> None:
    weight = progression(rows=rows)
    found = as_grid(weight)
    assert exact(weight, found)
    assert found is not None
    assert found.bits == 2
    assert found.group == SHAPE[1]
    assert found.integer_zero
    weight.table.values.data[0, 0] -= 2**-9
    used = bool((weight.codes[: weight.rows_per_table] == 0).any())
    assert used
    assert as_grid(weight) is None
    assert exact(weight, as_table(weight))


def test_only_values_in_use_have_to_lie_on_the_grid() -> None:
    weight = progression(bits=4)
    spare = next(i for i in range(16) if not bool((weight.codes == i).any()))
    weight.table.values.data[spare] = 0.777
    assert exact(weight, as_grid(weight))


def test_tables_of_one_value_are_grids() -> None:
    for value in (0.0, 0.25, -0.375):
        weight = Codebook(SHAPE, bits=1)
        weight.set_tables(torch.full((1, 2, 1), value))
        weight.right_inverse(W)
        assert exact(weight, as_grid(weight)), value


def test_a_grid_with_one_scale_per_row_is_a_table() -> None:
    for weight in (
        grid(bits=3),
        grid(bits=4, symmetric=True),
        grid(bits=1, symmetric=True),
        grid(bits=3, zero="float"),
    ):
        found = as_table(weight)
        assert exact(weight, found)
        assert found is not None
        assert found.rows_per_table == 1
    one = as_table(grid(bits=6, group="tensor"))
    assert one is not None
    assert one.values.shape == (1, 64, 1)
    assert as_table(grid(bits=8)) is None, "a table of 256 values for 32 columns"
    assert as_table(grid(bits=4, group=8)) is None, "a scale per group is no table"


def test_what_a_mask_leaves_out_is_a_value_of_the_grid() -> None:
    for values in (Uniform(SHAPE, bits=4, group=8), Uniform(SHAPE, bits=3, symmetric=True)):
        weight = solved(Sparse(values, pattern="2:4"))
        assert exact(weight, as_grid(weight))
    for values in (Uniform(SHAPE, bits=3, zero="float"), Uniform(SHAPE, bits=1, symmetric=True)):
        weight = solved(Sparse(values, pattern="2:4"))
        assert as_grid(weight) is None
    codes = Sparse(progression(), sparsity=0.5)
    codes.set_mask(W.abs() > 0.03)
    assert exact(codes, as_table(codes))
    assert exact(codes, as_grid(codes))
    without = Sparse(table(bits=4), sparsity=0.5)
    without.set_mask(W.abs() > 0.03)
    assert as_table(without) is None, "no entry of the table is zero"


def test_rows_of_another_weight() -> None:
    inner, codes = grid(bits=4, group=8), table(bits=4, rows_per_table=8)
    for view, form in (
        (Shared(inner, rows=(3, 9)), as_grid), (Shared(codes, rows=(8, 24)), as_table), (Shared(codes, rows=(9, 15)), as_table)
    ):  # fmt: skip
        assert exact(view, form(view))
    assert as_table(Shared(codes, rows=(4, 12))) is None, "half of two tables"
    assert as_grid(Shared(inner, transposed=True)) is None


def test_asking_changes_nothing() -> None:
    for weight, _ in EXAMPLES.values():
        before = {name: value.clone() for name, value in weight.state_dict().items()}
        as_grid(weight), as_table(weight)
        assert all(torch.equal(value, before[name]) for name, value in weight.state_dict().items())
