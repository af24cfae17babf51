"""Magnitude, Wanda and SparseGPT, and what composition makes of them."""

import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods import threshold
from laconic.methods.base import Method, Then
from laconic.methods.cast import Cast
from laconic.methods.gptq import GPTQ
from laconic.methods.kmeans import KMeans
from laconic.methods.lowrank import LowRank
from laconic.methods.magnitude import Magnitude
from laconic.methods.rtn import RTN
from laconic.methods.sparsegpt import SparseGPT
from laconic.methods.wanda import Wanda
from laconic.model.sites import Site
from laconic.scheme.text import parse
from laconic.solvers.output_error import output_error
from laconic.weights import Sparse
from tests.conftest import make_site


def test_magnitude_of_a_tiny_matrix() -> None:
    W = torch.tensor([[1.0, -4.0, 2.0, 0.5], [3.0, 0.25, -8.0, 1.5]])
    assert torch.equal(Magnitude(0.5)(Site("x", W))(), torch.tensor([[0, -4.0, 2.0, 0], [3.0, 0, -8.0, 0]]))
    assert torch.equal(
        Magnitude(0.5, pattern="2:4")(Site("x", W))(), torch.tensor([[0, -4.0, 2.0, 0], [3.0, 0, -8.0, 0]])
    )
    assert torch.equal(
        Magnitude(0.5, pattern=(2, 2))(Site("x", W))(), torch.tensor([[0, 0, 2.0, 0.5], [0, 0, -8.0, 1.5]])
    )


def test_sparsity_is_the_share_of_zeros_exactly() -> None:
    site = make_site()
    for sparsity in (0.0, 0.25, 0.5, 0.9):
        weight = Magnitude(sparsity)(site)
        assert int((~weight.mask).sum()) == round(sparsity * site.W.numel())  # type: ignore[attr-defined, operator]
    with pytest.raises(SchemeError, match="share of zeros"):
        Magnitude(1.5)
    with pytest.raises(SchemeError, match="scope"):
        Magnitude(0.5, scope="galaxy")  # type: ignore[arg-type]


def spread(method: Method, sites: list[Site]) -> dict[str, Sparse]:
    allocation = method.allocation()
    assert allocation is not None
    for site in sites:
        allocation.observe(site)
    methods = allocation.resolve()
    assert all(parse(repr(method)) == method for method in methods.values()), "a resumed run reads them back"
    return {site.name: methods[site.name](site) for site in sites}  # type: ignore[misc]


def unequal_sites() -> list[Site]:
    return [
        make_site(rows, columns, seed).having(name=f"{seed}")
        for seed, (rows, columns) in enumerate([(48, 64), (16, 32), (80, 8)])
    ]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("criterion", ["l1", "taylor", "hessian"])
def test_one_threshold_over_the_model_is_exact(sparsity: float, criterion: str) -> None:
    """The entries cut are the lowest of all matrices together, to the last one."""
    sites = [site.having(W=site.W * factor) for site, factor in zip(unequal_sites(), (1.0, 4.0, 0.5), strict=True)]
    weights = spread(Magnitude(sparsity, scope="model", criterion=criterion), sites)  # type: ignore[arg-type]
    scores = []
    for site in sites:
        assert site.fisher is not None
        scores.append(
            {
                "l1": site.W.abs(),
                "taylor": site.W.abs() * site.fisher.sqrt(),
                "hessian": site.W.square() * site.fisher / 2,
            }[criterion]
        )
    every = torch.cat([score.flatten() for score in scores])
    cut = torch.cat([~weights[site.name].mask.flatten() for site in sites])
    assert int(cut.sum()) == round(sparsity * len(every))
    expected = torch.zeros_like(cut)
    expected[every.argsort()[: int(cut.sum())]] = True
    assert torch.equal(cut, expected)


def test_one_threshold_over_equal_values_is_exact_too() -> None:
    sites = [Site(name, torch.ones(4, 5)) for name in "abc"]
    weights = spread(Magnitude(0.4, scope="model"), sites)
    assert [int((~weight.mask).sum()) for weight in weights.values()] == [20, 4, 0], "ties go in the order of the sites"


@pytest.mark.parametrize("limit", [100, 3500])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_of_large_models_histograms_are_kept(limit: int, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count stays exact; of values that have a bin each (bfloat16) the choice does too, of others it is off within a 256th of an octave."""
    sites = unequal_sites()
    exact = spread(Magnitude(sparsity, scope="model"), sites)
    monkeypatch.setattr(threshold, "_EXACT", limit)
    coarse = spread(Magnitude(sparsity, scope="model"), sites)
    masks = [torch.cat([weights[site.name].mask.flatten() for site in sites]) for weights in (exact, coarse)]
    assert int(masks[0].sum()) == int(masks[1].sum())
    W = torch.cat([site.W.flatten() for site in sites]).abs()
    if sparsity:
        differing = W[masks[0] != masks[1]]
        assert differing.numel() == 0 or differing.max() / differing.min() <= 2 ** (1 / 128)
    rounded = [site.having(W=site.W.bfloat16().float()) for site in sites]
    found = torch.cat([spread(Magnitude(sparsity, scope="model"), rounded)[site.name].mask.flatten() for site in sites])
    W = torch.cat([site.W.flatten() for site in rounded]).abs()
    assert not sparsity or W[~found].max() <= W[found].min()


@pytest.mark.parametrize("pattern", [(4, 4), (1, 8), (16, 2)])
@pytest.mark.parametrize("criterion", ["l1", "l2", "linf", "mean", "taylor"])
def test_one_threshold_over_blocks(pattern: tuple[int, int], criterion: str) -> None:
    sites = unequal_sites()
    weights = spread(Magnitude(0.6, pattern, scope="model", criterion=criterion), sites)  # type: ignore[arg-type]
    scores = []
    for site in sites:
        assert site.fisher is not None
        w = (
            site.W.abs() * site.fisher.sqrt()
            if criterion == "taylor"
            else site.W.square()
            if criterion == "l2"
            else site.W.abs()
        )
        tiles = w.unfold(0, pattern[0], pattern[0]).unfold(1, pattern[1], pattern[1])
        scores.append((tiles.amax((2, 3)) if criterion == "linf" else tiles.sum((2, 3))).flatten())
    kept = torch.cat([weights[site.name].mask[:: pattern[0], :: pattern[1]].flatten() for site in sites])
    every = torch.cat(scores)
    assert int((~kept).sum()) == round(0.6 * len(every))
    assert every[~kept].max() <= every[kept].min()


def test_scaled_matrices_compete_on_equal_terms() -> None:
    sites = unequal_sites()
    plain = spread(Magnitude(0.5, scope="model", scale="layer"), sites)
    larger = spread(Magnitude(0.5, scope="model", scale="layer"), [sites[0].having(W=sites[0].W * 1024), *sites[1:]])
    assert all(torch.equal(plain[name].mask, larger[name].mask) for name in plain)


def test_blocks_by_their_criterion() -> None:
    W = torch.tensor([[3.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 0.0]])
    F = torch.tensor([[1.0, 1.0, 0.01, 0.01], [1.0, 1.0, 0.01, 0.01]])
    left = {
        "l1": True,
        "l2": True,
        "linf": False,
        "mean": True,
        "taylor": False,
        "hessian": False,
    }  # 3:6, 9:12, 3:2, 3:6, 3:0.6, 4.5:0.06
    for criterion, dropped in left.items():
        weight = Magnitude(0.5, (2, 2), criterion=criterion)(Site("x", W, fisher=F))  # type: ignore[arg-type]
        assert bool((weight()[:, :2] == 0).all()) == dropped, criterion
        assert bool((weight()[:, 2:] == 0).all()) != dropped, criterion


def test_tiny_weights_are_told_apart() -> None:
    W = torch.tensor([[2e-30, 1e-30, 4e-30, 3e-30]])  # their squares are all zero in float32
    assert torch.equal(Magnitude(0.5)(Site("x", W)).mask, torch.tensor([[False, False, True, True]]))  # type: ignore[attr-defined]


def test_an_n_m_pattern_has_no_threshold_over_the_model() -> None:
    with pytest.raises(SchemeError, match="scope='layer'"):
        Magnitude(0.5, pattern="2:4", scope="model")
    with pytest.raises(SchemeError, match="criterion must be one of"):
        Magnitude(0.5, criterion="l0")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="needs gradients"):
        Magnitude(0.5, criterion="taylor")(make_site().having(fisher=None))
    F = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert torch.equal(Magnitude(pattern="2:4", criterion="hessian")(Site("x", torch.ones(1, 4), fisher=F))(), F)


def test_wanda_weighs_by_the_inputs_within_each_row() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    squares = torch.tensor([[100.0, 1.0, 1.0, 0.01]])
    assert torch.equal(Wanda(0.5)(Site("x", W, squares=squares))(), torch.tensor([[1.0, 0, 3.0, 0]]))
    mask = Wanda(0.5)(make_site()).mask  # type: ignore[attr-defined]
    assert (mask.sum(1) == 32).all()  # type: ignore[operator]


def test_sparsegpt_beats_wanda_beats_magnitude() -> None:
    """The order of the papers' tables, for unstructured and for 2:4 masks."""
    site = make_site(rows=96, columns=256, spread=1.0)
    for pattern in ("unstructured", "2:4"):
        errors = [output_error(site, method(0.5, pattern)(site)) for method in (SparseGPT, Wanda, Magnitude)]
        assert errors[0] < 0.9 * errors[1] < 0.9 * 0.95 * errors[2]


def test_sparsegpt_with_uncorrelated_inputs_is_magnitude() -> None:
    site = make_site(columns=128).having(hessian=torch.eye(128).unsqueeze(0))
    assert torch.equal(SparseGPT(0.5)(site)(), Magnitude(0.5)(site)())


def test_sparse_then_quantized_keeps_the_zeros_and_stores_survivors_only() -> None:
    site = make_site(rows=64, columns=128)
    plain = GPTQ(bits=4, group=32)(site)
    for first in (Magnitude(0.5), SparseGPT(0.5), SparseGPT(pattern="2:4"), Wanda(0.5)):
        for second in (RTN(bits=4, group=32), GPTQ(bits=4, group=32), KMeans(bits=4)):
            weight = (first >> second)(site)
            assert isinstance(weight, Sparse)
            assert float((weight() == 0).float().mean()) >= 0.5
            assert weight.bits() < plain.bits()


def test_the_second_of_two_feeds_its_error_forward() -> None:
    site = make_site(rows=64, columns=128, spread=1.0)
    errors = {
        second: output_error(site, (SparseGPT(0.5) >> second)(site))
        for second in (GPTQ(bits=2, group=32), RTN(bits=2, group=32))
    }
    assert errors[GPTQ(bits=2, group=32)] < 0.8 * errors[RTN(bits=2, group=32)]


def test_what_cannot_store_single_survivors_is_refused() -> None:
    with pytest.raises(SchemeError, match="single surviving entries"):
        (Magnitude(0.5) >> LowRank(4))(make_site())


def test_after_a_method_that_prunes_nothing_the_result_is_encoded_again() -> None:
    site = make_site()
    weight = Then(LowRank(4), RTN(bits=8, group=16))(site)
    rank = torch.linalg.matrix_rank(weight().detach(), rtol=0.02)
    assert rank <= 8
    assert torch.allclose(weight(), LowRank(4)(site)(), atol=0.01)


@pytest.mark.parametrize("columns", [129, 192, 200, 704])
def test_sparsegpt_where_spans_do_not_divide_the_columns(columns: int) -> None:
    site = make_site(rows=24, columns=columns)
    weight = SparseGPT(0.5)(site)
    assert abs(float(weight.mask.float().mean()) - 0.5) < 0.01  # type: ignore[attr-defined]
    assert output_error(site, weight) < output_error(site, Magnitude(0.5)(site))


def test_a_rate_is_not_for_survivors_alone() -> None:
    with pytest.raises(SchemeError, match="a rate counts every entry"):
        SparseGPT(0.5) >> GPTQ(rate=2.0)
    assert LowRank(4) >> GPTQ(rate=2.0), "of a method that prunes nothing every entry is coded"
    with pytest.raises(SchemeError, match="a rate counts every entry"):
        (Magnitude(0.5) >> Cast("float16")) >> GPTQ(rate=2.0)


def test_a_chain_of_three_keeps_the_first_ones_zeros() -> None:
    site = make_site(rows=64, columns=128)
    chain = Magnitude(0.75) >> Cast("float16") >> KMeans(bits=4)
    weight = chain(site)
    assert isinstance(weight, Sparse)
    assert float((weight() == 0).float().mean()) >= 0.75
    assert weight.bits() == pytest.approx(chain.expected_bits((64, 128)), rel=0.05)


def test_what_another_method_encodes_was_not_rounded_before() -> None:
    W = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    exact = (Magnitude(0.5) >> Cast("float32"))(Site("x", W))()
    assert torch.equal(exact[exact != 0], W[exact != 0])
    assert not torch.equal(Magnitude(0.5)(Site("x", W))()[exact != 0], W[exact != 0])
