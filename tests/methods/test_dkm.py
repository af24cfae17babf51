"""DKM: exact k-means where nothing is trained, the formula's gradient where something is, and the paper's claim on real digits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.clustering import dkm_naive
from laconic.clustering.relax import SoftClusters
from laconic.errors import SchemeError
from laconic.methods.dkm import DKM
from laconic.methods.kmeans import KMeans
from laconic.model.sites import Site
from laconic.scheme.text import parse
from laconic.weights import Codebook, Sparse
from tests.conftest import make_site
from tests.recover.nets import digits, seeded, trained


def relaxed(method: Any, W: Tensor) -> tuple[SoftClusters, Any]:
    weight = method(Site("w", W))
    relaxation = method.relax(weight, W)
    assert isinstance(relaxation, SoftClusters)
    return relaxation, weight


def test_untrained_it_is_kmeans() -> None:
    site = make_site()
    for more in ({}, {"rows": 12}, {"dimension": 2}, {"weights": "hessian"}):
        assert torch.equal(DKM(bits=3, **more)(site)(), KMeans(bits=3, **more)(site)())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, "bfloat16"),
        ({"rounded": None}, "float32"),
        ({"rounded": "float16"}, "float16"),
        ({"rows": 8}, "bfloat16"),
        ({"dimension": 2}, "float32"),
    ],
)
def test_decoded_and_gradient_are_those_of_the_formula(options: dict[str, Any], seen: str) -> None:
    """Against plain autograd of the naive formula, on the values as the 16-bit type has them where that is asked for."""
    W = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0))
    W = W.to(getattr(torch, seen)).float()  # so that rounding changes nothing
    method = DKM(bits=2, tau=0.1, iterations=3, **options)
    relaxation, weight = relaxed(method, W)
    start, w, v = relaxation.centroids.clone(), W.clone().requires_grad_(), W.double().requires_grad_()
    g = torch.randn(32, 1024, generator=torch.Generator().manual_seed(1))
    relaxation(w).backward(g)
    tau = 0.1 * float(W.double().var(correction=0)) * method.dimension
    expected, last = dkm_naive(v, start.double(), tau=tau, iterations=3, rows_per_table=method.rows)
    expected.backward(g.double())
    assert w.grad is not None
    assert v.grad is not None
    assert torch.allclose(w.grad.double(), v.grad, rtol=1e-4, atol=1e-4 * float(v.grad.abs().max()))
    assert torch.allclose(relaxation.centroids, last.float(), atol=1e-5)
    assert torch.equal(weight(), method(Site("w", W))())  # what it started from is as it was


def test_centroids_move_on_when_the_weight_has_changed() -> None:
    """Until then every pass computes the same: a second use, a checkpointed pass that runs again, the next minibatch of a step."""
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    relaxation, _ = relaxed(DKM(bits=2, tau=0.3), W)
    first, w = relaxation.centroids.clone(), W.clone().requires_grad_()
    with torch.no_grad():
        relaxation(w)
    assert torch.equal(relaxation.centroids, first)  # a pass that nothing is learnt from leaves no trace
    one = relaxation(w)
    one.sum().backward()
    ended = relaxation.centroids.clone()
    relaxation.eval()(w)
    relaxation.train()
    assert torch.equal(relaxation(w), one)
    assert torch.equal(relaxation.start, first)
    assert torch.equal(relaxation.centroids, ended)
    assert not torch.equal(ended, first)
    with torch.no_grad():
        w[0, 0] += 0.5
    relaxation(w)
    assert torch.equal(relaxation.start, ended)


def test_towards_zero_the_nearest_centroid_is_taken() -> None:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    relaxation, weight = relaxed(DKM(bits=2, tau=1e-6, iterations=1, rounded=None), W)
    assert torch.allclose(relaxation(W), weight(), atol=2e-3)  # tables are stored in float16
    assert torch.equal(relaxation.eval()(W), weight())
    assert relaxation.stored(W)().unique().numel() <= 4


def test_the_temperature_falls_with_progress() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    relaxation, _ = relaxed(DKM(bits=2, tau=0.1, tau_end=0.001), W)
    variance = float(W.double().var(correction=0))
    for progress, tau in ((0.0, 0.1), (0.5, 0.01), (1.0, 0.001)):
        relaxation.advance(progress)
        assert float(relaxation.tau) == pytest.approx(tau * variance, rel=1e-6)
    for bits, dimension, first in ((1, 1, 1.0), (3, 1, 1 / 16), (4, 2, 1 / 4)):
        relaxation, _ = relaxed(DKM(bits=bits, dimension=dimension), W)
        assert float(relaxation.tau) == pytest.approx(first * variance * dimension, rel=1e-6)
        relaxation.advance(1.0)
        assert float(relaxation.tau) == pytest.approx(first * variance * dimension / 40, rel=1e-6)


def test_a_centroid_at_zero_and_row_scales() -> None:
    W = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 10, 16).unsqueeze(1)
    W[3] = 0
    relaxation, _ = relaxed(DKM(bits=3, zero=True, row_scale=True, tau=0.1), W)
    assert relaxation.centroids[0, 0, 0] == 0
    w = W.clone().requires_grad_()
    relaxation(w).square().sum().backward()
    assert relaxation.centroids[0, 0, 0] == 0
    stored = relaxation.stored(W)
    assert isinstance(stored, Codebook)
    assert stored.row_scale is not None
    assert not stored()[3].any()
    assert (
        stored.bits()
        == 8 * (16 * 128 * 3 // 8) + 16 * 8 + 16 * 16
        == DKM(bits=3, row_scale=True).expected_bits((16, 128))
    )
    plain = DKM(bits=3)(Site("w", W))()
    assert (
        ((stored() - W)[0]).square().sum() < (plain - W)[0].square().sum() / 10
    )  # a row of small weights has its own range


def test_survivors_of_pruning_are_clustered_and_nothing_else() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    relaxation, weight = relaxed(parse("Magnitude(0.75) >> DKM(bits=2, tau=0.2)"), W)
    assert isinstance(weight, Sparse)
    w = W.clone().requires_grad_()
    decoded = relaxation(w)
    decoded.square().sum().backward()
    assert w.grad is not None
    assert not decoded[~weight.mask].any()
    assert not w.grad[~weight.mask].any()
    assert w.grad[weight.mask].all()
    assert relaxation.stored(W)().unique().numel() == 5
    for refused in ("DKM(bits=2, rows=8)", "DKM(bits=2, row_scale=True)"):
        with pytest.raises(SchemeError, match="survivors are clustered together"):
            relaxed(parse(f"Magnitude(0.5) >> {refused}"), W)


def test_few_values_are_fine_and_few_weights_are_not() -> None:
    for W in (torch.full((8, 8), 0.75), torch.tensor([[1.0, -1.0] * 8] * 4), torch.zeros(8, 8)):
        relaxation, weight = relaxed(DKM(bits=3), W)
        w = W.clone().requires_grad_()
        decoded = relaxation(w)
        decoded.sum().backward()
        assert torch.equal(weight(), W)
        assert torch.allclose(decoded, W, atol=1e-5)
        assert w.grad is not None
        assert w.grad.isfinite().all()
    with pytest.raises(SchemeError, match="8 centroids for 4 weights"):
        DKM(bits=3)(Site("head", torch.randn(2, 2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DKM(bits=0)", "1 to 8"), ("DKM(bits=9)", "1 to 8"), ("DKM(tau=0.0)", "must be positive"), ("DKM(tau_end=-1)", "must be positive"),
        ("DKM(iterations=0)", "at least 1 iteration"), ("DKM(weights='all')", "weights must be"), ("DKM(rounded='int8')", "rounded must be"),
    ],
)  # fmt: skip
def test_bad_numbers(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        parse(text)


def test_a_sum_cannot_be_trained_softly() -> None:
    method = parse("DKM(bits=2) + LowRank(2)")
    W = torch.randn(16, 32)
    with pytest.raises(SchemeError, match="term of a sum"):
        method.relax(method(Site("w", W)), W)  # type: ignore[union-attr, operator]


def test_trained_clusters_beat_clusters_after_training() -> None:
    """Cho et al. 2022: at equal bits, k-means while training beats k-means afterwards, and most at few bits."""
    train, validation, test = digits()
    net = trained(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))), train)
    gains = []
    for bits in (1, 3):
        how = lc.FineTune(100, lc.Steps("adamw", 1e-3, 1e-4, beta2=0.95, clip=1.0), checks=2)
        _, found = lc.recover(net, f"DKM(bits={bits})", how, train=train, validation=validation, test=test)
        gains.append(found.score - found.direct)
    assert gains[0] > 0.1
    assert gains[0] > gains[1] >= 0
