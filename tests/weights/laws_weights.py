"""The laws every Weight obeys. Every class of the algebra must have examples here: a new one without them fails.

A Weight that is defined elsewhere is held to the same laws by a subclass of `WeightLaws` with `examples` of its own.
"""

import copy
import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from laconic.errors import CheckpointError
from laconic.weights import (
    Codebook,
    ColumnWeight,
    Dense,
    EntryWeight,
    LowRank,
    Permuted,
    Rotated,
    Scaled,
    Shared,
    Sparse,
    Sum,
    Uniform,
    View,
    Weight,
    install,
    unpack,
)  # fmt: skip
from laconic.weights.base import every_part
from laconic.weights.blocks import Blocks
from laconic.weights.forms import as_grid, as_table
from laconic.weights.layout import check_spec, stored_names, words_of
from laconic.weights.rotated import random_signs

SHAPE = (24, 32)
W = 0.05 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
SIGNS = torch.Generator().manual_seed(1)


def solved(weight: Weight) -> Weight:
    if isinstance(weight, ColumnWeight) and weight.span is not None:
        weight.fit(W)
    weight.right_inverse(W)
    return weight


def unbounded() -> Uniform:
    grid = Uniform(SHAPE, bits=None, group="tensor", codec="ans")
    grid.set_step(0.03)
    return grid


def table(**options: object) -> Codebook:
    weight = Codebook(SHAPE, **options)  # type: ignore[arg-type]
    number = SHAPE[0] // weight.rows_per_table
    values = 0.05 * torch.randn(number, 2**weight.bit_width, weight.columns, generator=torch.Generator().manual_seed(2))
    weight.set_tables(values, torch.linspace(0.5, 2, SHAPE[0]))
    return weight


def factor(length: int) -> Dense:
    dense = Dense((1, length))
    dense.right_inverse(torch.linspace(0.5, 2, length).unsqueeze(0))
    return dense


def low_rank() -> LowRank:
    return LowRank.of(torch.zeros(SHAPE[0], 4), torch.zeros(4, SHAPE[1]))


EXAMPLES: dict[
    str, tuple[Weight, bool]
] = {  # the weight, and whether projecting its own decoded value gives that value back
    "dense-bf16": (Dense(SHAPE), True),
    "dense-f16": (Dense(SHAPE, dtype="float16"), True),
    "uniform-4-group": (Uniform(SHAPE, bits=4, group=8), True),
    "uniform-3-channel": (Uniform(SHAPE, bits=3), True),
    "uniform-2-tensor": (Uniform(SHAPE, bits=2, group="tensor"), True),
    "uniform-8-symmetric": (Uniform(SHAPE, bits=8, symmetric=True), True),
    "uniform-1-symmetric": (Uniform(SHAPE, bits=1, group=16, symmetric=True), True),
    "uniform-1": (Uniform(SHAPE, bits=1, group=16), True),
    "uniform-3-float-zero": (Uniform(SHAPE, bits=3, group=16, zero="float"), True),
    "uniform-3-second": (Uniform(SHAPE, bits=3, group=8, second=(3, 8)), True),
    "uniform-4-ans": (Uniform(SHAPE, bits=4, group=16, codec="ans"), True),
    "uniform-unbounded": (unbounded(), True),
    "codebook-4": (table(bits=4), True),
    "codebook-3-rows": (table(bits=3, rows_per_table=8, row_scale=True), True),
    "codebook-10": (table(bits=10), True),
    "codebook-vector": (table(bits=5, dimension=4, codec="ans"), True),
    "sparse": (Sparse(Dense(SHAPE), sparsity=0.6), True),
    "sparse-indexed": (Sparse(Dense(SHAPE), sparsity=0.97), True),
    "sparse-nm": (Sparse(Uniform(SHAPE, bits=4, group=8), pattern="2:4"), True),
    "sparse-block": (Sparse(table(bits=4), pattern=(4, 8), sparsity=0.5), True),
    "sparse-n-d": (Sparse(Dense(SHAPE), pattern=Blocks((24, 8, 2, 2), (5, 3, 2, 1)), sparsity=0.5), True),
    "sparse-ragged": (Sparse(Uniform(SHAPE, bits=4), pattern=Blocks((2, 12, 32), (1, 5, 7)), sparsity=0.6), True),
    "sparse-rows": (Sparse(Dense(SHAPE, dtype="float32"), pattern=(1, SHAPE[1]), sparsity=0.5), True),
    "sparse-ans": (Sparse(Uniform(SHAPE, bits=3, group="tensor", codec="ans"), sparsity=0.5), True),
    "lowrank": (low_rank(), False),
    "sum": (Sum(Uniform(SHAPE, bits=2, group=8), low_rank()), False),
    "scaled": (
        Scaled(Uniform(SHAPE, bits=3, group=8), row_scale=factor(SHAPE[0]), column_scale=factor(SHAPE[1])),
        True,
    ),
    "permuted": (Permuted(Uniform(SHAPE, bits=4), torch.randperm(SHAPE[1], generator=SIGNS)), True),
    "rotated": (
        Rotated(Uniform(SHAPE, bits=4), row_signs=random_signs(24, SIGNS), column_signs=random_signs(32, SIGNS)),
        True,
    ),
    "rotated-inputs": (Rotated(Uniform(SHAPE, bits=4), column_signs=random_signs(32, SIGNS)), True),
}
for example, _ in EXAMPLES.values():
    inner = getattr(example, "weight", None)
    if isinstance(inner, Uniform):  # the grids inside combinators are fitted to what they will hold
        inner.fit(
            example.rotate(W)
            if isinstance(example, Rotated)
            else W[:, example.order]
            if isinstance(example, Permuted)
            else W
        )
    if isinstance(example, Sum):
        example.terms[0].fit(W)  # type: ignore[attr-defined]
    solved(example)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def concrete() -> set[type[Weight]]:
    """Every class of the library that `unpack` can find."""
    found: set[type[Weight]] = set()
    todo: list[type[Weight]] = [Weight]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if hasattr(cls, "kind") and cls.__module__.startswith("laconic."):
            found.add(cls)
    return found


def test_every_class_has_an_example() -> None:
    assert concrete() - {Shared} == {type(weight) for weight, _ in EXAMPLES.values()}


class Laws:
    """What laws are tried on. `examples`: weights of shape SHAPE by name, and whether projecting its own decoded value gives that value back."""

    examples: ClassVar[dict[str, tuple[Weight, bool]]]

    @pytest.fixture
    def case(self, name: str) -> tuple[Weight, bool]:
        weight, exact = self.examples[name]
        return copy.deepcopy(weight), exact


class WeightLaws(Laws):
    """The laws of every weight."""

    def test_decodes_to_a_finite_matrix_of_its_shape(self, case: tuple[Weight, bool]) -> None:
        decoded = case[0]()
        assert decoded.shape == SHAPE
        assert decoded.dtype == torch.float32
        assert torch.isfinite(decoded).all()

    def test_rows_are_rows_of_the_whole(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        assert torch.equal(weight.rows(5, 17), weight()[5:17]) or close(weight.rows(5, 17), weight()[5:17])

    def test_projecting_what_it_decodes_changes_nothing(self, case: tuple[Weight, bool]) -> None:
        weight, exact = case
        decoded = weight().detach().clone()
        given = decoded.clone()
        weight.right_inverse(given)
        assert torch.equal(given, decoded), "the input was changed"
        if exact:
            assert close(weight(), decoded)

    def test_pack_and_unpack_are_inverse_bit_for_bit(self, case: tuple[Weight, bool], tmp_path) -> None:
        weight, _ = case
        spec, tensors = weight.pack()
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
        again = unpack(json.loads(json.dumps(spec)), load_file(tmp_path / "w.safetensors"))
        assert type(again) is type(weight)
        assert torch.equal(again(), weight())
        second_spec, second = again.pack()
        assert second_spec == json.loads(json.dumps(spec))
        assert second.keys() == tensors.keys()
        assert all(torch.equal(second[k], tensors[k]) for k in tensors)

    def test_bits_are_eight_times_the_stored_bytes(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        assert weight.bits() == 8 * sum(t.nbytes for t in weight.pack()[1].values())

    def test_damaged_tensors_are_refused(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        spec, tensors = weight.pack()
        for name, tensor in tensors.items():
            if tensor.numel() > 1:
                with pytest.raises(CheckpointError):
                    unpack(spec, tensors | {name: tensor.flatten()[:-1].clone()})
            with pytest.raises(CheckpointError):
                unpack(spec, {k: v for k, v in tensors.items() if k != name})

    def test_a_spec_with_another_shape_is_refused(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        spec, tensors = weight.pack()
        for shape in ([SHAPE[0] + 8, SHAPE[1]], [SHAPE[0], SHAPE[1] * 2], [-1, SHAPE[1]], [2**40, 1], "24x32"):
            with pytest.raises(CheckpointError):
                unpack(spec | {"shape": shape}, tensors)

    def test_gradients_of_every_float_state(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        weight.double()
        names = [name for name, _ in weight.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in weight.parameters()]

        def decode(*parameters: Tensor) -> Tensor:
            return functional_call(weight, dict(zip(names, parameters, strict=True)), ())

        assert torch.autograd.gradcheck(decode, values, eps=1e-6, atol=1e-5)

    def test_moves_and_copies(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        twin = copy.deepcopy(weight)
        assert torch.equal(twin(), weight())
        twin.load_state_dict(weight.state_dict())
        assert torch.equal(twin(), weight())
        assert all(not p.requires_grad for p in weight.parameters()), "float state is frozen until a method asks for it"

    def test_compiles_without_a_graph_break(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        torch._dynamo.reset()
        compiled = torch.compile(lambda: weight(), backend="aot_eager", fullgraph=True)
        assert close(compiled(), weight())

    def test_installed_it_decodes_projects_and_stays_tied(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        pair = nn.ModuleList([nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(2)])
        for layer in pair:
            install(layer, "weight", weight, View(SHAPE))
        x = torch.randn(3, SHAPE[1])
        assert torch.equal(pair[0](x), pair[1](x))
        assert close(pair[0](x), x @ weight().T)
        before = weight().detach().clone()
        with torch.no_grad():
            pair[0].weight = 2 * before  # assigning projects, for both users
        assert torch.equal(pair[0].weight, pair[1].weight)
        states = {id(p) for p in pair.parameters()}
        assert len(states) == len(list(weight.parameters()))
        for p in weight.parameters():
            p.requires_grad_()
        if any(True for _ in weight.parameters()):
            (pair[0](x).sum() + pair[1](x).sum()).backward()
            both = [p.grad.clone() for p in weight.parameters()]  # type: ignore[union-attr]
            weight.zero_grad()
            pair[0](x).sum().backward()
            assert all(close(2 * p.grad, g) for p, g in zip(weight.parameters(), both, strict=True))  # type: ignore[operator]

    def test_parts_are_what_the_spec_says(self, case: tuple[Weight, bool]) -> None:
        """Names, kinds and tensors: every tensor below a part's name is the part's, every other the weight's own."""
        weight, _ = case
        spec, tensors = weight.pack()
        check_spec(json.loads(json.dumps(spec)), "the spec")
        parts, told = weight.parts(), type(weight).parts_in(spec)
        assert list(parts) == list(told)
        assert [part.kind for part in parts.values()] == [part["kind"] for part in told.values()]
        assert stored_names(spec) == set(tensors)
        own = {name for name in tensors if name.split(".")[0] not in parts}
        assert own == set(type(weight).tensors_in(spec))
        assert words_of(spec) == weight.words()
        children = {id(child) for child in weight.modules() if isinstance(child, Weight)}
        assert children == {id(weight), *(id(part) for part in every_part(weight))}, "a weight held that is no part"

    def test_what_is_not_zero_is_no_more_than_all(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        assert 0 < weight.nonzero_bits() <= weight.bits()

    def test_a_spec_without_one_of_its_fields_is_refused(self, case: tuple[Weight, bool]) -> None:
        """By the check, by its tensors or by its reader; what passes all three decodes to what was stored."""
        weight, _ = case
        spec, tensors = weight.pack()
        for field in set(spec) - {"shape"}:
            for wrong in (None, [], {}, "nothing", -1, [{}], {"kind": "dense"}):
                damaged = {key: value for key, value in spec.items() if key != field}
                damaged |= {} if wrong is None else {field: wrong}
                try:
                    check_spec(damaged, "damaged")
                    if stored_names(damaged) != set(tensors):
                        continue
                    again = unpack(damaged, tensors)
                except CheckpointError:
                    continue
                assert same(again(), weight()), (field, wrong)

    def test_a_grid_or_a_table_is_exactly_the_weight(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        for form in (as_grid(weight), as_table(weight)):
            if form is not None:
                assert same(form.decode(), weight().detach())


class ColumnLaws(Laws):
    """The laws of weights that are chosen column by column."""

    def test_nearest_values_are_admissible_and_nearest(self, case: tuple[Weight, bool]) -> None:
        weight, _ = case
        assert isinstance(weight, ColumnWeight)
        decoded = weight().detach()
        noisy = decoded + 0.01 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        chosen = torch.empty_like(noisy)
        for j in range(0, SHAPE[1], weight.columns):
            here = slice(j, j + weight.columns)
            assert close(weight.nearest(decoded[:, here], j), decoded[:, here]), "a value of the set is its own nearest"
            chosen[:, here] = weight.nearest(noisy[:, here], j)
        weight.right_inverse(chosen)
        assert close(weight(), chosen), "nearest values must be in the set"
        assert (chosen - noisy).square().sum() <= (decoded - noisy).square().sum() + 1e-6, (
            "and no farther than another point of it"
        )


class TestAlgebra(WeightLaws):
    examples = EXAMPLES


class TestColumns(ColumnLaws):
    examples: ClassVar = {name: case for name, case in EXAMPLES.items() if isinstance(case[0], ColumnWeight)}


def test_entry_weights_store_the_kept_entries_only() -> None:
    keep = torch.rand(SHAPE, generator=torch.Generator().manual_seed(4)) < 0.3
    for name, (weight, _) in EXAMPLES.items():
        if isinstance(weight, EntryWeight) and weight.columns == 1:
            spec, tensors = weight.pack(keep)
            assert 8 * sum(t.nbytes for t in tensors.values()) == weight.bits(keep), name
            again = unpack(spec, tensors, keep)
            assert torch.equal(again()[keep], weight()[keep]), name


def test_a_shared_view_is_its_owner() -> None:
    owner = solved(Uniform(SHAPE, bits=4, group=8))
    view = Shared(owner, rows=(4, 12))
    turned = Shared(owner, transposed=True)
    assert torch.equal(view(), owner()[4:12])
    assert torch.equal(turned(), owner().T)
    assert view.bits() == 0
    spec, tensors = turned.pack()
    assert tensors == {}
    assert torch.equal(Shared.resolve(json.loads(json.dumps(spec)), owner)(), turned())
    view.right_inverse(torch.zeros(8, SHAPE[1]))
    assert torch.equal(owner()[4:12], torch.zeros(8, SHAPE[1]))
    with pytest.raises(CheckpointError, match="owner"):
        unpack(spec, {})
