"""GPTQ at a rate: the stored bytes meet it, the error is what theory says, and one slope for all beats equal rates."""

import math
from itertools import pairwise

import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods.allocation import Measured
from laconic.methods.gptq import GPTQ
from laconic.methods.rate import WaterFilling, column_steps
from laconic.solvers.output_error import output_error
from tests.conftest import make_site, output_loss


@pytest.mark.parametrize("rate", [0.7, 1.5, 2.25, 3.1415, 4.25, 6.0])
def test_the_stored_bytes_meet_the_rate(rate: float) -> None:
    site = make_site(rows=160, columns=256)
    weight = GPTQ(rate=rate, over="matrix")(site)
    stored = 8 * sum(t.nbytes for t in weight.pack()[1].values())
    assert stored == weight.bits()
    assert 0.99 * rate <= stored / site.W.numel() <= rate


def test_a_bit_more_is_six_decibels_less() -> None:
    site = make_site(rows=160, columns=256)
    errors = [output_error(site, GPTQ(rate=rate, over="matrix")(site)) for rate in (2.5, 3.5, 4.5)]
    for coarse, fine in pairwise(errors):
        assert 5.0 < 10 * math.log10(coarse / fine) < 7.0


def test_uncorrelated_gaussian_weights_come_within_a_quarter_bit_of_the_bound() -> None:
    """Entropy-coded uniform quantization is 1.53 dB, 0.254 bit, from the Gaussian rate-distortion bound at high rate (Gersho & Gray 9.9)."""
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    site = make_site(rows=512, columns=512).having(W=W, hessian=torch.eye(512).unsqueeze(0))
    weight = GPTQ(rate=4.0, over="matrix")(site)
    distortion = float((weight() - W).square().mean() / W.square().mean())
    excess_bits = weight.bits() / W.numel() - 0.5 * math.log2(1 / distortion)
    assert 0.24 < excess_bits < 0.28


@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (3, 0.5), (4, 0.5)])
def test_it_beats_gptq_with_groups_at_equal_bytes(bits: int, share: float) -> None:
    site = make_site(rows=256, columns=256)
    fixed = GPTQ(bits=bits, group=64)(site)
    coded = GPTQ(rate=fixed.bits() / site.W.numel(), over="matrix")(site)
    assert coded.bits() <= fixed.bits()
    assert output_loss(site, coded()) < share * output_loss(site, fixed())


def test_a_rate_that_side_information_alone_exceeds_is_refused() -> None:
    with pytest.raises(SchemeError, match="cannot be stored in 0.001 bits"):
        GPTQ(rate=0.001, over="matrix")(make_site(rows=8, columns=16))


def test_column_steps_follow_the_factor_and_are_left_out_where_they_cost_more_than_they_win() -> None:
    even, uneven = torch.ones(1, 256), torch.logspace(-1.5, 1.5, 256).unsqueeze(0)
    assert column_steps(even, 4096) is None
    assert column_steps(uneven, 8) is None
    steps = column_steps(uneven, 4096)
    assert steps is not None
    assert torch.allclose(steps().log().flatten(), -0.5 * uneven.log().flatten(), atol=0.3)


def observed(rate: float) -> WaterFilling:
    allocation = GPTQ(rate=rate).allocation()
    assert isinstance(allocation, WaterFilling)
    for i, sensitivity in enumerate((0.01, 1.0, 100.0)):
        site = make_site(rows=64, columns=128, seed=i)
        allocation.observe(site.having(name=f"layer.{i}", output_fisher=site.output_fisher * sensitivity))  # type: ignore[operator]
    return allocation


def test_one_slope_spends_bits_where_the_loss_minds_and_keeps_the_mean() -> None:
    methods = observed(2.5).resolve()
    rates = [methods[f"layer.{i}"].rate for i in range(3)]  # type: ignore[attr-defined]
    assert rates[0] < rates[1] < rates[2]
    assert sum(rates) / 3 == pytest.approx(2.5, abs=0.01)
    assert all(method.allocation() is None for method in methods.values())
    # 20 dB more sensitivity are 3.3 bits in theory, of which three quarters are used where rates are high enough for theory to hold
    assert rates[2] - rates[1] == pytest.approx(0.75 * 0.5 * math.log2(100), rel=0.15)


def test_water_filling_lowers_the_weighted_loss_at_equal_bytes() -> None:
    sites = []
    for i, sensitivity in enumerate((0.01, 1.0, 100.0)):
        site = make_site(rows=64, columns=128, seed=i)
        sites.append((site.having(name=f"layer.{i}", output_fisher=site.output_fisher * sensitivity), sensitivity))  # type: ignore[operator]
    methods = observed(2.5).resolve()
    spread = [methods[site.name](site) for site, _ in sites]
    even = [GPTQ(rate=2.5, over="matrix")(site) for site, _ in sites]
    assert sum(w.bits() for w in spread) <= sum(w.bits() for w in even) * 1.01
    losses = [
        sum(s * output_loss(site, w()) for (site, s), w in zip(sites, weights, strict=True))
        for weights in (spread, even)
    ]
    assert losses[0] < 0.3 * losses[1]


def test_matrices_that_nothing_was_measured_of_get_the_rate_itself() -> None:
    inner = GPTQ(rate=2.5).allocation()
    assert inner is not None
    allocation = Measured(GPTQ(rate=2.5), inner)
    for i in range(3):
        site = make_site(rows=64, columns=128, seed=i)
        allocation.observe(site.having(name=f"layer.{i}", output_fisher=site.output_fisher * 100.0**i))  # type: ignore[operator]
    allocation.observe(make_site(rows=64, columns=128).having(name="no gradient", output_fisher=None))
    allocation.observe(make_site(rows=64, columns=128).having(name="no input", hessian=None, squares=None))
    methods = allocation.resolve()
    assert [methods[name].rate for name in ("no gradient", "no input")] == pytest.approx([2.5, 2.5], abs=0.01)  # type: ignore[attr-defined]
    rates = [methods[f"layer.{i}"].rate for i in range(3)]  # type: ignore[attr-defined]
    assert sum(rates) / 3 == pytest.approx(2.5, abs=0.01)
    assert rates[0] < 2.4


SHAPES = [
    (1, 1),
    (1, 64),
    (64, 1),
    (2, 2),
    (64, 2),
    (3, 3),
    (16, 16),
    (24, 24),
    (32, 32),
    (64, 64),
    (128, 96),
    (1, 512),
    (512, 2),
]


@pytest.mark.parametrize("rate", [0.3, 3.25, 12.0])
@pytest.mark.parametrize("values", ["normal", "zeros", "equal", "one huge", "tiny"])
def test_no_allocated_rate_is_one_that_the_format_cannot_hold(rate: float, values: str) -> None:
    """Matrices of all shapes and values, with gradients of all sizes, none and zero: each is stored in what it was given, and the mean kept."""
    allocation, sites = GPTQ(rate=rate).allocation(), []
    assert isinstance(allocation, WaterFilling)
    for i, (rows, columns) in enumerate([*SHAPES, (96, 64), (80, 48)]):
        site = make_site(rows=rows, columns=columns, seed=i)
        W = {
            "normal": site.W, "zeros": torch.zeros_like(site.W), "equal": torch.full_like(site.W, 0.3), "tiny": 1e-30 * site.W,
            "one huge": site.W + 1e4 * torch.nn.functional.one_hot(torch.tensor(0), site.W.numel()).view(site.W.shape),
        }[values]  # fmt: skip
        output = [site.output_fisher, torch.zeros(rows), None, 1e-12 * torch.ones(rows), 1e12 * torch.ones(rows)][i % 5]
        sites.append(site.having(name=str(i), W=W, output_fisher=output))
        allocation.observe(sites[-1])
    methods = allocation.resolve()
    stored = 0
    for site in sites:
        weight = methods[site.name](site)
        shape = (site.W.shape[0], site.W.shape[1])
        given = getattr(methods[site.name], "rate", None)
        assert weight.bits() <= (
            given * site.W.numel() if given is not None else methods[site.name].expected_bits(shape)
        )
        assert torch.isfinite(weight()).all()
        stored += weight.bits()
    if not any("on average is the least" in note for note in allocation.notes):
        assert stored <= 1.001 * rate * sum(site.W.numel() for site in sites)
    else:
        assert rate < 1.5
    assert any("too small" in note for note in allocation.notes)


def test_a_plan_counts_small_matrices_as_they_will_be_stored() -> None:
    method = GPTQ(rate=3.0)
    for shape in SHAPES:
        allocation = method.allocation()
        assert allocation is not None
        allocation.observe(make_site(rows=shape[0], columns=shape[1]).having(name="x"))
        small = any("too small" in note for note in (allocation.resolve() and allocation.notes))
        assert (method.expected_bits(shape) > 3.0 * shape[0] * shape[1]) == small


def test_the_seed_and_threads_do_not_change_a_byte() -> None:
    site = make_site(rows=96, columns=128)
    packed = [GPTQ(rate=2.25, over="matrix")(site.having(seed=seed)).pack()[1] for seed in (0, 1)]
    assert all(torch.equal(packed[0][k], packed[1][k]) for k in packed[0])
