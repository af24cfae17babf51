"""K-means and vector codebooks."""

from itertools import combinations

import numpy as np
import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods.gptvq import GPTVQ, refit_tables
from laconic.methods.kmeans import KMeans
from laconic.methods.rtn import RTN
from laconic.model.sites import Site
from laconic.solvers.output_error import output_error
from laconic.solvers.tables import exact_table
from laconic.weights import Codebook
from tests.conftest import make_site, output_loss


@pytest.mark.parametrize(("n", "k", "seed"), [(8, 2, 0), (9, 3, 1), (10, 4, 2), (7, 6, 3)])
def test_the_table_is_the_optimum_of_all_partitions(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, f = np.sort(rng.normal(size=n)) + 5, rng.uniform(0.1, 3, n)

    def cost(i: int, j: int) -> float:
        return float((f[i:j] * (x[i:j] - np.average(x[i:j], weights=f[i:j])) ** 2).sum())

    best = min(
        sum(cost(a, b) for a, b in zip((0, *cuts), (*cuts, n), strict=True))
        for cuts in combinations(range(1, n), k - 1)
    )
    table = exact_table(x, f, k)
    assert (f * ((x[:, None] - table) ** 2).min(1)).sum() == pytest.approx(best, rel=1e-9)


def test_fewer_distinct_values_than_entries_are_exact() -> None:
    W = torch.tensor([[0.5, -0.25, 0.5, 1.0], [1.0, 1.0, -0.25, 0.5]])
    weight = KMeans(bits=4)(Site("x", W))
    assert torch.equal(weight(), W)
    assert torch.equal(KMeans(bits=2)(Site("x", torch.full((4, 4), 0.75)))(), torch.full((4, 4), 0.75))


def test_no_uniform_grid_of_one_scale_is_closer() -> None:
    site = make_site()
    for bits in (2, 3, 4):
        grid = RTN(bits=bits, group="tensor", clip="mse")(site)
        assert (KMeans(bits=bits)(site)() - site.W).square().sum() < (grid() - site.W).square().sum()


def test_weights_move_the_table_to_where_they_are() -> None:
    """SqueezeLLM: a heavy entry is met (nearly) exactly."""
    site = make_site()
    fisher = torch.ones_like(site.W)
    fisher[3, 7] = 1e6
    weight = KMeans(bits=2, weights="fisher")(site.having(fisher=fisher))
    assert float((weight() - site.W)[3, 7].abs()) < 1e-4
    plain = KMeans(bits=2)(site)
    assert (fisher * (weight() - site.W) ** 2).sum() < (fisher * (plain() - site.W) ** 2).sum()


def test_tables_per_rows_and_statistics_that_are_missing() -> None:
    site = make_site()
    per_row = KMeans(bits=2, rows=1)(site)
    assert (per_row() - site.W).square().sum() < (KMeans(bits=2)(site)() - site.W).square().sum()
    with pytest.raises(SchemeError, match="needs statistics"):
        KMeans(weights="fisher")(site.having(fisher=None))
    with pytest.raises(SchemeError, match="rows_per_table 7 does not divide 48 rows"):
        KMeans(rows=7)(site)
    with pytest.raises(SchemeError, match="weights"):
        KMeans(weights="vibes")  # type: ignore[arg-type]


def test_masked_entries_count_nothing() -> None:
    site = make_site()
    mask = torch.rand(48, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    weight = KMeans(bits=3)(site.having(mask=mask))
    alone = exact_table(*(a for a in _histogram(site.W[mask])), 8)
    assert np.allclose(np.sort(weight.tables().flatten().numpy()), alone, atol=5e-4)  # type: ignore[attr-defined]


def _histogram(values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    x, counts = np.unique(values.numpy().astype(np.float64), return_counts=True)
    return x, counts.astype(np.float64)


def test_vectors_beat_scalars_at_equal_bits_on_correlated_columns() -> None:
    """What a vector codebook is for; on independent columns it would win by the shape of its cells only."""
    base = torch.randn(128, 32, 1, generator=torch.Generator().manual_seed(0))
    W = (base + 0.3 * torch.randn(128, 32, 2, generator=torch.Generator().manual_seed(1))).flatten(1)
    site = Site("x", W)
    scalar, vector = KMeans(bits=2)(site), KMeans(bits=4, dimension=2)(site)
    assert (vector() - W).square().sum() < 0.8 * (scalar() - W).square().sum()


def test_gptvq_refits_its_table_to_the_best_for_its_codes() -> None:
    site = make_site(rows=32, columns=32)
    weight = Codebook((32, 32), bits=3)
    weight.set_tables(torch.linspace(-0.1, 0.1, 8).view(1, 8, 1))
    weight.right_inverse(site.W)
    before = output_loss(site, weight())
    refit_tables(weight, site, 50)
    H = site.hessian[0].double()  # type: ignore[index]
    design = torch.stack([(weight.codes == k).double() for k in range(8)])  # [8, rows, columns]
    image = design @ H
    normal = torch.einsum("aij,bij->ab", image, design)
    target = torch.einsum("aij,ij->a", image, site.W.double())
    best = torch.linalg.lstsq(normal, target).solution
    optimum = output_loss(site, torch.einsum("a,aij->ij", best, design))
    assert output_loss(site, weight()) < before
    assert output_loss(site, weight()) == pytest.approx(optimum, rel=1e-3)


def test_gptvq_beats_plain_vectors() -> None:
    site = make_site(rows=96, columns=128, spread=1.0)
    assert output_error(site, GPTVQ(bits=6, dimension=2)(site)) < 0.6 * output_error(
        site, KMeans(bits=6, dimension=2)(site)
    )


def test_vectors_cannot_encode_single_survivors() -> None:
    with pytest.raises(SchemeError, match="dimension=1"):
        GPTVQ(dimension=2)(make_site().having(mask=torch.ones(48, 64, dtype=torch.bool)))


def test_assignments_are_the_same_under_autocast() -> None:
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight = KMeans(bits=6, dimension=4)(Site("x", W))
    before = weight()
    with torch.autocast("cpu", torch.bfloat16):
        weight.right_inverse(W)
    assert torch.equal(weight(), before)
