"""RTN, GPTQ at fixed widths, SpQR, Hadamard and Cast: a tiny exact case, a limit case, the paper's claim in miniature."""

import dataclasses

import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods.cast import Cast
from laconic.methods.gptq import GPTQ
from laconic.methods.hadamard import Hadamard
from laconic.methods.kmeans import KMeans
from laconic.methods.rtn import RTN
from laconic.methods.spqr import SpQR
from laconic.methods.wanda import Wanda
from laconic.model.sites import Site
from laconic.solvers.output_error import output_error
from laconic.weights import Rotated, Sum, Uniform
from tests.conftest import make_site, output_loss


def test_rtn_of_a_tiny_matrix() -> None:
    W = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.0, 3.0, 6.0, 9.0]])
    assert torch.equal(RTN(bits=2, group="channel")(Site("x", W))(), W)


def test_rtn_at_8_bits_errs_half_a_step_at_most() -> None:
    site = make_site()
    weight = RTN(bits=8, group=16)(site)
    step = weight.scale().T.repeat_interleave(16, 1)  # type: ignore[attr-defined, operator]
    assert ((weight() - site.W).abs() <= 0.505 * step + 1e-7).all()


def test_rtn_says_which_layer_a_group_does_not_divide() -> None:
    with pytest.raises(SchemeError, match="group 48 does not divide 64 columns"):
        RTN(group=48)(make_site())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_most_at_few_bits(bits: int) -> None:
    """The paper's tables 2-4: the gap to rounding is largest at 2 and 3 bits."""
    site = make_site(rows=96, columns=128, spread=1.0)
    ratio = output_error(site, GPTQ(bits=bits, group=32)(site)) / output_error(site, RTN(bits=bits, group=32)(site))
    assert ratio < {2: 0.45, 3: 0.45, 4: 0.5}[bits]


def test_gptq_takes_a_width_or_a_rate() -> None:
    with pytest.raises(SchemeError, match="not both"):
        GPTQ(bits=4, rate=2.5)
    with pytest.raises(SchemeError, match="rate"):
        GPTQ(rate=-1)
    with pytest.raises(SchemeError, match="damping"):
        GPTQ(damping=0)
    with pytest.raises(SchemeError, match="over"):
        GPTQ(rate=2, over="planet")  # type: ignore[arg-type]


def test_spqr_without_outliers_or_second_level_is_the_plain_sweep() -> None:
    """Its grid neither rounds zeros nor forces 0 into the range, so it equals GPTQ's sweep with that grid."""
    site = make_site()
    weight = SpQR(bits=3, group=16, second_bits=0, outliers=float("inf"))(site)
    assert isinstance(weight, Sum)
    from laconic.solvers.column import Sweep, solve

    grid = Uniform((48, 64), bits=3, group=16, zero="float")
    solve(grid, site, Sweep(act_order=False), lambda w, j, importance: grid.fit(w, j))
    assert torch.equal(weight(), grid())


def test_spqr_keeps_fewer_outliers_at_a_higher_threshold() -> None:
    site = make_site(rows=96, columns=128)
    shares = []
    for threshold in (0.02, 0.2, 1.0):
        outliers = SpQR(bits=3, outliers=threshold)(site).terms[1]  # type: ignore[attr-defined]
        shares.append(float(outliers.mask.float().mean()))
    assert shares[0] > shares[1] > shares[2]


def test_spqr_wins_where_there_are_outliers() -> None:
    """At equal stored bits, with planted outliers, by a wide margin over GPTQ with groups (paper, section 3)."""
    site = make_site(rows=96, columns=128)
    W = site.W.clone()
    W.view(-1)[torch.randperm(W.numel(), generator=torch.Generator().manual_seed(0))[:120]] *= 25
    site = site.having(W=W)
    sparse = SpQR(bits=3)(site)
    for plain in (GPTQ(bits=3, group=16)(site), GPTQ(bits=4, group=64)(site)):
        assert sparse.bits() < plain.bits()
        assert output_loss(site, sparse()) < 0.4 * output_loss(site, plain())


def test_spqr_with_a_great_many_outliers_stays_sound() -> None:
    """Groups of which one entry is left have a constant grid; it must not spoil the second level of its neighbours."""
    site = make_site(rows=96, columns=128)
    losses = [output_loss(site, SpQR(bits=3, outliers=threshold)(site)()) for threshold in (0.001, 0.02, 0.2)]
    assert losses[0] < losses[1] < losses[2]


def test_spqr_bits_are_the_papers_formula() -> None:
    weight = SpQR(bits=3, group=16, second_bits=3, second_group=16, outliers=float("inf"))(
        make_site(rows=64, columns=128)
    )
    grid = weight.terms[0]  # type: ignore[attr-defined]
    assert grid.bits() / (64 * 128) == 3 + 6 / 16 + 64 / 256


def test_a_rotation_helps_where_weights_have_outliers_and_costs_a_sign_per_side() -> None:
    site = make_site(rows=64, columns=128)
    W = site.W.clone()
    W[:, 7] *= 30
    site = site.having(W=W)
    plain, rotated = RTN(bits=3, group="channel")(site), Hadamard(RTN(bits=3, group="channel"))(site)
    assert isinstance(rotated, Rotated)
    assert rotated.bits() == plain.bits() + 64 + 128
    assert (rotated() - W).square().sum() < 0.3 * (plain() - W).square().sum()


def test_rotated_gptq_sees_the_rotated_hessian() -> None:
    """The rotation is orthonormal, so the inner problem's loss is the outer one's."""
    site = make_site()
    inner = []

    @dataclasses.dataclass(frozen=True, repr=False)
    class Spy(GPTQ):
        def __call__(self, given: Site):  # type: ignore[no-untyped-def]
            weight = super().__call__(given)
            inner.append(output_loss(given, weight()))
            return weight

    weight = Hadamard(Spy(bits=3, group=16))(site)
    assert output_loss(site, weight()) == pytest.approx(inner[0], rel=1e-4)


def test_cast_is_exact_for_what_the_type_holds() -> None:
    site = make_site()
    assert torch.equal(Cast("float32")(site)(), site.W)
    assert torch.equal(Cast("bfloat16")(site)(), site.W.bfloat16().float())
    with pytest.raises(SchemeError, match="do not fit"):
        Cast("float16")(site.having(W=site.W * 1e7))
    with pytest.raises(SchemeError, match="dtype"):
        Cast("int8")(site)


def test_hadamard_spreads_a_rate_over_the_model_too() -> None:
    method = Hadamard(GPTQ(rate=2.5))
    sites = [make_site(seed=i).having(name=f"site{i}", output_fisher=torch.full((48,), 4.0**i)) for i in range(3)]
    allocation = method.allocation()
    assert allocation is not None
    for site in sites:
        allocation.observe(site)
    rates = [chosen.method.rate for chosen in allocation.resolve().values()]  # type: ignore[attr-defined]
    assert sum(rates) / 3 == pytest.approx(2.5, abs=1e-3)
    assert rates[0] < rates[1] < rates[2], "what moves the output more gets more bits"


def test_hadamard_refuses_what_weighs_single_entries() -> None:
    for method in (Wanda(0.5), KMeans(bits=3, weights="fisher")):
        with pytest.raises(SchemeError, match="not known in a rotated basis"):
            Hadamard(method)


def test_large_matrices_are_fitted_in_parts_alike() -> None:
    """Above 4 million entries a grid is fitted some rows at a time; an importance that all rows share stays whole."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(8300, 512, generator=generator)
    importance = torch.rand(1, 512, generator=generator)
    large, small = Uniform((8300, 512), bits=3, group=128), Uniform((100, 512), bits=3, group=128)
    large.fit(W, 0, importance, clip="mse")
    large.right_inverse(W)
    small.fit(W[-100:], 0, importance, clip="mse")
    small.right_inverse(W[-100:])
    assert torch.equal(large()[-100:], small())
