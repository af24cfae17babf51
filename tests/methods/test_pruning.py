"""Magnitude, Wanda and SparseGPT, and what composition makes of them."""

import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods.base import Then, output_error
from laconic.methods.gptq import GPTQ
from laconic.methods.kmeans import KMeans
from laconic.methods.lowrank import LowRank
from laconic.methods.magnitude import Magnitude
from laconic.methods.rtn import RTN
from laconic.methods.sparsegpt import SparseGPT
from laconic.methods.wanda import Wanda
from laconic.sites import Site
from laconic.weights import Sparse
from tests.conftest import make_site


def test_magnitude_of_a_tiny_matrix() -> None:
    W = torch.tensor([[1.0, -4.0, 2.0, 0.5], [3.0, 0.25, -8.0, 1.5]])
    assert torch.equal(Magnitude(0.5)(Site("x", W))(), torch.tensor([[0, -4.0, 2.0, 0], [3.0, 0, -8.0, 0]]))
    assert torch.equal(Magnitude(0.5, pattern="2:4")(Site("x", W))(), torch.tensor([[0, -4.0, 2.0, 0], [3.0, 0, -8.0, 0]]))
    assert torch.equal(Magnitude(0.5, pattern=(2, 2))(Site("x", W))(), torch.tensor([[0, 0, 2.0, 0.5], [0, 0, -8.0, 1.5]]))


def test_sparsity_is_the_share_of_zeros_exactly() -> None:
    site = make_site()
    for sparsity in (0.0, 0.25, 0.5, 0.9):
        weight = Magnitude(sparsity)(site)
        assert int((~weight.mask).sum()) == round(sparsity * site.W.numel())  # type: ignore[attr-defined, operator]
    with pytest.raises(SchemeError, match="share of zeros"):
        Magnitude(1.5)
    with pytest.raises(SchemeError, match="scope"):
        Magnitude(0.5, scope="galaxy")  # type: ignore[arg-type]


def test_one_threshold_over_the_model() -> None:
    small, large = make_site(seed=0), make_site(seed=1)
    sites = [small.having(name="a"), large.having(name="b", W=large.W * 4)]
    allocation = Magnitude(0.5, scope="model").allocation()
    assert allocation is not None
    for site in sites:
        allocation.observe(site)
    methods = allocation.resolve()
    weights = {site.name: methods[site.name](site) for site in sites}
    every = torch.cat([site.W.abs().flatten() for site in sites])
    threshold = float(every.sort().values[len(every) // 2])
    for site in sites:
        mask = weights[site.name].mask  # type: ignore[attr-defined]
        expected = site.W.abs() >= threshold
        assert float((mask != expected).float().mean()) < 0.002
    zeros = sum(int((~weights[site.name].mask).sum()) for site in sites)  # type: ignore[attr-defined, operator]
    assert zeros == pytest.approx(len(every) // 2, abs=3)


def test_a_threshold_over_the_model_is_for_single_weights() -> None:
    with pytest.raises(SchemeError, match="scope='layer'"):
        Magnitude(0.5, pattern="2:4", scope="model")


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
    errors = {second: output_error(site, (SparseGPT(0.5) >> second)(site)) for second in (GPTQ(bits=2, group=32), RTN(bits=2, group=32))}
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
