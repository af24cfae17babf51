"""Neurons, filters and n-D blocks: which are cut under one threshold, what is cut together, and what is stored of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import laconic as lc
from laconic.disk.store import Compressed
from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.blockprune import BlockPrune
from laconic.methods.cast import Cast
from laconic.methods.channels import lowest_aligned
from laconic.methods.cut import Cut
from laconic.methods.rtn import RTN
from laconic.methods.structures import FilterPrune, NeuronPrune, StructurePrune
from laconic.model.sites import Site, Stats
from laconic.scheme.text import parse
from laconic.weights import Dense, Sparse, Weight, unpack
from laconic.weights.blocks import Blocks


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv(name: str, dims: tuple[int, ...], channels: Tensor | None, seed: int = 0, **changes: object) -> Site:
    return Site(name, values(*dims, seed=seed).flatten(1), dims=dims, channels=channels).having(**changes)


def linear(name: str, rows: int, columns: int, channels: Tensor | None, seed: int = 0, **changes: object) -> Site:
    return Site(name, values(rows, columns, seed=seed), dims=(rows, columns), channels=channels).having(**changes)


def spread(method: Method, sites: list[Site]) -> dict[str, Method]:
    allocation = method.allocation()
    assert allocation is not None
    for site in sites:
        allocation.observe(site)
    return allocation.resolve()


def zero_rows(weight: Weight) -> list[int]:
    return (weight() == 0).all(1).nonzero().flatten().tolist()


def arange(first: int, last: int) -> Tensor:
    return torch.arange(first, last)


def test_the_rows_below_one_threshold_go_whatever_their_layer() -> None:
    """By hand: six neurons of norms 1 ... 6 in two layers; half of the 24 entries are those of the three smallest."""
    a = Site("a", torch.tensor([[6.0], [1.0], [3.0]]).expand(3, 4) / 2, dims=(3, 4), channels=arange(0, 3))
    b = Site("b", torch.tensor([[5.0], [2.0], [4.0]]).expand(3, 4) / 2, dims=(3, 4), channels=arange(3, 6))
    assert spread(NeuronPrune(0.5), [a, b]) == {"a": Cut(rows=(1, 2)), "b": Cut(rows=(1,))}
    assert spread(NeuronPrune(0.0), [a, b]) == {"a": Cast("float32"), "b": Cast("float32")}
    weight = Cut(rows=(1, 2))(a)
    assert torch.equal(weight(), torch.where(torch.tensor([[True], [False], [False]]), a.W, 0.0))
    assert weight.bits() == 32 * 4 + 8, "the survivors in float32, and a byte for three rows"


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("l1", [1, 0, 2]),
        ("l2", [1, 0, 2]),
        ("linf", [1, 2, 0]),
        ("mean", [1, 0, 2]),
        ("taylor", [2, 0, 1]),
        ("hessian", [2, 0, 1]),
    ],
)
def test_the_criteria_of_a_row(criterion: str, expected: list[int]) -> None:
    W = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    F = torch.tensor([[1.0], [9.0], [0.04]]).expand(3, 4)
    scores = {
        "l1": [3, 2, 8], "l2": [3, 2**0.5, 4], "linf": [3, 1, 2], "mean": [0.75, 0.5, 2], "taylor": [3, 6, 1.6], "hessian": [4.5, 9, 0.32],
    }[criterion]  # fmt: skip
    assert sorted(range(3), key=lambda r: scores[r]) == expected, "the table above, by hand"
    site = Site("x", W, dims=(3, 4), channels=arange(0, 3), fisher=F)
    for count in (1, 2):
        assert zero_rows(NeuronPrune(count / 3, criterion)(site)) == sorted(expected[:count])  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "mean", "taylor", "hessian"])
def test_a_coupled_channel_is_scored_by_all_its_rows(criterion: str) -> None:
    """Three convolutions that are added up: a channel's score is that of one row made of its three rows."""
    sites = [
        conv(f"{i}", (12, i + 2, 3, 3), arange(0, 12), seed=i, fisher=values(12, 9 * (i + 2), seed=9 + i).square())
        for i in range(3)
    ]
    together = Site(
        "all",
        torch.cat([s.W for s in sites], 1),
        channels=arange(0, 12),
        fisher=torch.cat([s.fisher for s in sites], 1),
    )  # type: ignore[misc]
    expected = spread(FilterPrune(0.4, criterion), [together])["all"]  # type: ignore[arg-type]
    assert spread(FilterPrune(0.4, criterion), sites) == dict.fromkeys("012", expected)  # type: ignore[arg-type]
    assert len(expected.rows) == 5  # type: ignore[attr-defined]


def test_heads_and_rows_that_may_not_be_cut() -> None:
    """Rows that share a number within a site go together; -1 never goes and is not counted."""
    heads = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, -1])
    W = values(10, 8)
    W[3:6] *= 0.1
    W[9] = 0.001
    site = Site("q", W, dims=(10, 8), channels=heads)
    assert spread(NeuronPrune(0.34), [site])["q"] == Cut(rows=(3, 4, 5))
    assert spread(NeuronPrune(0.99), [site])["q"] != Cut(rows=tuple(range(9))), "one structure stays"
    only = linear("head", 5, 8, torch.full((5,), -1))
    assert spread(NeuronPrune(0.34), [site, only])["head"] == Cast("float32")
    with pytest.raises(SchemeError, match=r"NeuronPrune\(sparsity=0.5\): no neuron of these layers may be cut"):
        spread(NeuronPrune(0.5), [only])


def test_what_a_structure_is_not_for_is_left_as_it_is() -> None:
    net = [
        conv("conv", (8, 3, 3, 3), arange(0, 8)), linear("fc", 16, 8, arange(8, 24), seed=1), linear("head", 4, 16, torch.full((4,), -1), seed=2),
        linear("words", 30, 8, None, seed=3, role="embedding"),
    ]  # fmt: skip
    filters, neurons, both = (spread(cls(0.5), net) for cls in (FilterPrune, NeuronPrune, StructurePrune))
    assert [name for name, method in filters.items() if isinstance(method, Cut)] == ["conv"]
    assert [name for name, method in neurons.items() if isinstance(method, Cut)] == ["fc"]
    assert len(filters["conv"].rows) == 4  # type: ignore[attr-defined]
    assert len(neurons["fc"].rows) == 8  # type: ignore[attr-defined]
    assert isinstance(both["conv"], Cut | Cast)
    gone = sum(len(m.rows) * site.W.shape[1] for m, site in zip(both.values(), net, strict=True) if isinstance(m, Cut))
    assert gone == pytest.approx((8 * 27 + 16 * 8) / 2, abs=14), (
        "half of the entries of both kinds together, to within half a filter"
    )
    weight = (Cast("float32") >> Cast("float16"))(net[3])
    assert isinstance(weight, Dense)
    assert weight.dtype == "float16"


def test_a_gate_is_cut_with_the_filters_it_multiplies() -> None:
    gated = [conv("conv", (6, 4, 3, 3), arange(0, 6)), linear("gate", 6, 3, arange(0, 6), seed=1)]
    found = spread(FilterPrune(0.5), gated)
    assert found["conv"] == found["gate"]
    assert len(found["gate"].rows) == 3  # type: ignore[attr-defined]
    with pytest.raises(SchemeError, match="no neuron"):
        spread(NeuronPrune(0.5), gated)


@pytest.mark.parametrize("align", [1, 2, 4, 8])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.97])
def test_what_stays_of_a_layer_is_a_multiple(align: int, sparsity: float) -> None:
    sites = [
        conv(f"{i}", (width, 4, 3, 3), arange(100 * i, 100 * i + width), seed=i)
        for i, width in enumerate((16, 22, 8, 5))
    ]
    kept = []
    for site, method in zip(sites, spread(FilterPrune(sparsity, align=align), sites).values(), strict=True):
        width = len(site.W)
        lost = list(method.rows) if isinstance(method, Cut) else []
        left = width - len(lost)
        assert left % align == 0 or left == width
        assert left >= min(align, width)
        norms = site.W.square().sum(1)
        assert lost == [] or norms[lost].max() <= norms[[r for r in range(width) if r not in lost]].min()
        kept.append(left)
    if align == 1 and sparsity < 0.9:
        assert sum(kept) == 51 - round(sparsity * 51)


def test_the_least_of_many_aligned_choices() -> None:
    """Against all thresholds tried one after the other: round what stays up, and take the threshold whose entries are nearest."""
    generator = torch.Generator().manual_seed(3)
    for align in (1, 3, 4):
        scores = torch.rand(40, generator=generator, dtype=torch.float64)
        layers = torch.randint(0, 3, (40,), generator=generator)
        sizes = torch.tensor([3.0, 5.0, 2.0], dtype=torch.float64)[layers]
        for sparsity in (0.2, 0.6, 0.9):
            options = {}
            for threshold in [-1.0, *scores.tolist()]:
                cut = torch.zeros(40, dtype=torch.bool)
                for layer in range(3):
                    here = (layers == layer).nonzero().flatten()
                    here = here[scores[here].argsort()]
                    left = int((scores[here] > threshold).sum())
                    left = min(max(-(-left // align) * align, align), len(here))
                    cut[here[: len(here) - left]] = True
                options[float((sizes * cut).sum())] = cut
            nearest = min(options, key=lambda entries: abs(entries - sparsity * float(sizes.sum())))
            found = lowest_aligned(scores, sizes, layers, sparsity, align)
            assert (
                abs(float((sizes * found).sum()) - sparsity * float(sizes.sum()))
                <= abs(nearest - sparsity * float(sizes.sum())) + 1e-9
            )
            assert torch.equal(found, options[float((sizes * found).sum())])


def test_scaled_layers_compete_on_equal_terms() -> None:
    sites = [
        conv("small", (20, 4, 3, 3), arange(0, 20), W=0.01 * values(20, 36)),
        conv("large", (20, 4, 3, 3), arange(20, 40), seed=1),
    ]
    plain, scaled = spread(FilterPrune(0.4), sites), spread(FilterPrune(0.4, scale="layer"), sites)
    assert len(plain["small"].rows) == 16  # type: ignore[attr-defined]
    assert plain["large"] == Cast("float32")
    assert 5 <= len(scaled["small"].rows) <= 11  # type: ignore[attr-defined]
    again = spread(FilterPrune(0.4, scale="layer"), [sites[0], sites[1].having(W=100 * sites[1].W)])
    assert again == scaled, "the size of a layer's weights does not matter"


def test_structures_need_a_network() -> None:
    with pytest.raises(
        SchemeError, match=r"fc: NeuronPrune.*one channel; structures need a module in memory with an example input"
    ):
        spread(NeuronPrune(0.5), [linear("fc", 8, 4, None)])
    assert spread(NeuronPrune(0.5), [linear("fc", 8, 4, arange(0, 8)), conv("conv", (4, 2, 3, 3), None)])[
        "conv"
    ] == Cast("float32")
    with pytest.raises(SchemeError, match="needs gradients"):
        spread(NeuronPrune(0.5, "taylor"), [linear("fc", 8, 4, arange(0, 8))])
    assert NeuronPrune(0.5).wants == Stats.CHANNELS
    assert FilterPrune(0.5, "hessian").wants == Stats.CHANNELS | Stats.FISHER
    with pytest.raises(SchemeError, match="not known in a rotated basis"):
        parse("Hadamard(NeuronPrune(0.5))")


def test_structures_then_another_code() -> None:
    site = conv("conv", (16, 4, 3, 3), arange(0, 16))
    for second in (Cast("float16"), RTN(4, "channel")):
        methods = spread(FilterPrune(0.5) >> second, [site])
        weight = methods["conv"](site)
        assert isinstance(weight, Sparse)
        assert len(zero_rows(weight)) >= 8
        assert weight.bits() == pytest.approx(methods["conv"].expected_bits((16, 36)), rel=0.2)
        assert parse(repr(methods["conv"])) == methods["conv"], "what a run notes down"


def test_rows_and_columns_cut_are_stored_as_rows_and_columns() -> None:
    site = linear("x", 40, 30, None)
    both, rows, columns = Cut((1, 2, 39), (0, 7))(site), Cut((1, 2, 39))(site), Cut(columns=(0, 7))(site)
    assert [w.bits() for w in (both, rows, columns)] == [
        32 * 37 * 28 + 8 * 9,
        32 * 37 * 30 + 8 * 5,
        32 * 40 * 28 + 8 * 4,
    ]
    for weight, method in ((both, Cut((1, 2, 39), (0, 7))), (rows, Cut((1, 2, 39))), (columns, Cut(columns=(0, 7)))):
        assert weight.bits() == pytest.approx(method.expected_bits((40, 30)), rel=1e-9)
        assert torch.equal(unpack(*weight.pack())(), weight())
    assert torch.equal(both() != 0, (rows() != 0) & (columns() != 0))
    assert int(((both() == site.W) | (both() == 0)).sum()) == 1200
    assert torch.equal(Cut()(site)(), site.W)
    assert Cut(tuple(range(40)))(site)().abs().max() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Cut(rows=(1, 1))", "different indices"), ("Cut(rows=(-1,))", "different indices"), ("Cut(columns=3)", "different indices"),
        ("Cut(dtype='int8')", "dtype must be"), ("NeuronPrune(1.0)", "share of zeros"), ("FilterPrune(0.5, 'l3')", "criterion must be one of l1, l2"),
        ("StructurePrune(0.5, scale='model')", "scale must be"), ("NeuronPrune(0.5, align=0)", "align is a number"),
        ("NeuronPrune(0.5, align=2.0)", "align is a number"), ("BlockPrune(0.5, block=0)", "block should be"),
        ("BlockPrune(0.5, block=(4,))", "block should be"), ("BlockPrune(0.5, block=(4, 2.5))", "block should be"),
        ("BlockPrune(0.5, scope='net')", "scope must be"), ("BlockPrune(-0.1)", "share of zeros"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse(text)


def test_an_index_outside_the_matrix_is_refused() -> None:
    for method in (Cut(rows=(8,)), Cut(columns=(4,))):
        for compute in (lambda m: m.expected_bits((8, 4)), lambda m: m(linear("x", 8, 4, None))):
            with pytest.raises(SchemeError, match="lies outside a matrix of 8 x 4"):
                compute(method)


def test_blocks_of_a_tiny_matrix() -> None:
    """2 x 2 blocks of a 3 x 4 matrix: the lower ones have one row left."""
    W = torch.tensor([[1.0, 1, 5, 5], [1, 1, 5, 5], [9, 9, 0, 1]])
    weight = BlockPrune(0.5, block=2, criterion="l1")(Site("x", W))
    assert torch.equal(weight(), torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5], [9, 9, 0, 0]]))
    assert weight.bits() == 32 * 6 + 8
    mean = BlockPrune(0.4, block=2, criterion="mean")(Site("x", W))
    assert torch.equal(mean() == 0, weight() == 0), "of 12 entries 4.8 are asked for; 6 are nearer than 2"


@pytest.mark.parametrize(
    ("dims", "block", "blocks"),
    [
        ((12, 10, 3, 3), 5, (5, 5, 3, 3)), ((12, 10, 3, 3), (4, 2), (4, 2, 3, 3)), ((12, 10, 3, 3), (2, 2, 3, 1), (2, 2, 3, 1)),
        ((12, 1, 3, 3), 4, (4, 4, 3, 3)), ((12, 10, 5), (3, 5), (3, 5, 5)), ((12, 10), 5, (5, 5)), ((12, 10), (3, 4), (3, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("criterion", ["l1", "linf", "mean", "l2"])
def test_n_d_blocks_are_what_slices_say(
    dims: tuple[int, ...], block: int | tuple[int, ...], blocks: tuple[int, ...], criterion: str
) -> None:
    """Against loops over slices of the parameter itself."""
    T = values(*dims)
    weight = BlockPrune(0.5, block, criterion)(Site("x", T.flatten(1), dims=dims))  # type: ignore[arg-type]
    assert isinstance(weight, Sparse)
    kept = weight.mask.view(dims)
    starts = torch.cartesian_prod(*(torch.arange(0, n, b) for n, b in zip(dims, blocks, strict=True)))
    scores: dict[bool, list[float]] = {True: [], False: []}
    for start in starts.tolist():
        here = tuple(slice(s, s + b) for s, b in zip(start, blocks, strict=True))
        assert kept[here].all() or not kept[here].any()
        w = T[here].abs()
        score = {"l1": w.sum(), "l2": w.square().sum().sqrt(), "linf": w.max(), "mean": w.mean()}[criterion]
        scores[bool(kept[here].all())].append(float(score))
    assert max(scores[False]) <= min(scores[True]) + 1e-5
    largest = torch.tensor(blocks).prod() / kept.numel()
    assert float((~kept).float().mean()) == pytest.approx(0.5, abs=float(largest) / 2 + 1e-6)
    again = unpack(*weight.pack())
    assert torch.equal(again(), weight())
    assert weight.bits() == 32 * int(kept.sum()) + 8 * -(-len(starts) // 8)


def test_one_threshold_over_blocks_of_many_shapes() -> None:
    sites = [
        conv("conv", (12, 10, 3, 3), arange(0, 12)),
        linear("fc", 23, 17, None, seed=1),
        Site("bare", values(8, 8, seed=2)),
    ]
    methods = spread(BlockPrune(0.6, 5), sites)
    scores, sizes, kept = [], [], []
    for site in sites:
        weight = methods[site.name](site)
        blocks = Blocks(site.dims or (8, 8), (5, 5, *site.dims[2:]))
        scores.append(blocks.reduce(site.W.square(), torch.sum).sqrt().flatten())
        sizes.append(blocks.sizes().flatten())
        kept.append(blocks.corners(weight.mask).flatten())  # type: ignore[attr-defined, arg-type]
    every, stays, size = torch.cat(scores), torch.cat(kept), torch.cat(sizes)
    assert every[~stays].max() <= every[stays].min(), "the lowest of the whole network, exactly"
    assert abs(float(size[~stays].sum()) - 0.6 * float(size.sum())) <= int(size.max()) / 2 + 1
    assert parse(repr(methods["conv"])) == methods["conv"]


def test_packed_experts_and_blocks_that_do_not_fit() -> None:
    experts = Site("experts", values(3 * 8, 6), groups=3, dims=(3, 8, 6))
    weight = BlockPrune(0.5, (4, 3))(experts)
    assert isinstance(weight, Sparse)
    assert weight.pattern == Blocks((3, 8, 6), (1, 4, 3))
    turned = BlockPrune(0.5, (4, 3))(
        experts.having(dims=(3, 6, 8))
    )  # stored as [in, out]: blocks are of [out, in] all the same
    assert torch.equal(turned(), weight())
    with pytest.raises(
        SchemeError, match=r"x: a block of 3 sizes \(2, 2, 2\) does not fit a parameter of 2 dimensions \(8, 4\)"
    ):
        BlockPrune(0.5, (2, 2, 2))(linear("x", 8, 4, None))


def test_a_directory_run_prunes_blocks_but_knows_no_channels(tiny: Path, tmp_path: Path) -> None:
    for scheme in ("NeuronPrune(0.5)", "[('*.0.*', StructurePrune(0.5) >> Cast('float16')), ('*', Keep())]"):
        with pytest.raises(SchemeError, match=r"layers\.0.*structures need a module in memory"):
            lc.compress(tiny, scheme, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    report = lc.compress(
        tiny, "BlockPrune(0.5, block=7) >> Cast('bfloat16')", out=tmp_path / "out", keep="embedding", evaluate=False
    )
    zeros = entries = 0
    for name, weight in (
        (site["parameter"], Compressed(tmp_path / "out").weight(site["parameter"])) for site in report.sites
    ):
        zeros, entries = zeros + int((weight() == 0).sum()), entries + weight().numel()
        assert isinstance(weight, Sparse), name
    assert zeros / entries == pytest.approx(0.5, abs=0.001)
    assert len({site["method"] for site in report.sites}) > 1, "each matrix has a share of its own"
