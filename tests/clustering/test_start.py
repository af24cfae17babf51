"""Starting centroids, temperatures, and the weight that is stored at the end."""

from typing import Any

import pytest
import torch

from laconic.clustering import annealed, dkm_decode, harden, init_centroids, temperature
from laconic.errors import SchemeError
from laconic.weights import Codebook
from tests.clustering.test_decode import draw


def test_scalar_centroids_start_at_the_optimum() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 3.0], [3.0, 7.0, 7.0, 8.0]])
    assert init_centroids(weight, 1).flatten().tolist() == pytest.approx([9 / 5, 22 / 3], rel=1e-3)
    assert init_centroids(weight, 1, rows_per_table=1).flatten().tolist() == pytest.approx([1, 3, 3, 22 / 3], rel=1e-3)


def test_starting_centroids_are_the_same_every_time() -> None:
    weight, state = draw(16, 64, dtype=torch.bfloat16), torch.random.get_rng_state()
    for dimension in (1, 4):
        first, second = (init_centroids(weight, 3, dimension=dimension, rows_per_table=8) for _ in range(2))
        assert first.shape == (2, 8, dimension)
        assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_zero_centroid_replaces_the_nearest_to_zero() -> None:
    weight = draw(16, 64)
    free, held = init_centroids(weight, 3), init_centroids(weight, 3, zero=True)
    assert float(held[0, 0]) == 0.0
    nearest = int(free.abs().argmin())
    assert held[0, 1:].flatten().sort().values.tolist() == [
        float(c) for k, c in enumerate(free.flatten()) if k != nearest
    ]


def test_a_constant_tensor_has_centroids_and_a_temperature() -> None:
    weight = torch.full((4, 8), 0.5)
    centroids, tau = init_centroids(weight, 2), temperature(weight, 0.1)
    assert tau == 0.1
    decoded, _ = dkm_decode(weight, centroids, tau=tau, iterations=3)
    torch.testing.assert_close(decoded, weight)


def test_temperature_follows_the_variance() -> None:
    weight = draw(64, 64)
    assert temperature(weight, 0.1) == pytest.approx(0.1 * float(weight.var(correction=0)), rel=1e-5)
    assert temperature(3 * weight, 0.1) == pytest.approx(9 * temperature(weight, 0.1), rel=1e-5)
    assert temperature(weight, 0.1, dimension=4) == pytest.approx(4 * temperature(weight, 0.1), rel=0.05)
    scale = torch.arange(1.0, 65.0)
    assert temperature(weight * scale.unsqueeze(1), 0.1, scale=scale) == pytest.approx(
        temperature(weight, 0.1), rel=1e-5
    )


def test_annealing_goes_by_equal_factors() -> None:
    assert [annealed(8.0, 2.0, p) for p in (0, 0.5, 1)] == pytest.approx([8.0, 4.0, 2.0])


@pytest.mark.parametrize(("dimension", "tables", "scaled"), [(1, 1, False), (1, 4, True), (2, 1, False), (4, 2, False)])
def test_harden_is_the_cold_limit_and_packs(dimension: int, tables: int, scaled: bool) -> None:
    weight = draw(8, 64, dtype=torch.float32)
    scale = torch.linspace(0.5, 2, 8).bfloat16().float() if scaled else None
    rows = 8 // tables
    centroids = init_centroids(
        weight if scale is None else weight / scale.unsqueeze(1), 3, dimension=dimension, rows_per_table=rows, zero=True
    )
    centroids = centroids.half().float()
    book = harden(weight, centroids, rows_per_table=rows, scale=scale)
    cold, _ = dkm_decode(weight, centroids, tau=1e-7, iterations=0, rows_per_table=rows, scale=scale)
    torch.testing.assert_close(book.forward(), cold)
    if dimension == 1:
        assert bool((book.forward() == 0).any())
    restored = Codebook.unpack(*book.pack())
    assert torch.equal(restored.forward(), book.forward())


def test_harden_fills_up_a_table() -> None:
    book = harden(draw(4, 8, dtype=torch.float32), torch.tensor([-1.0, 0.0, 1.0]))
    assert book.bit_width == 2
    assert set(book.forward().flatten().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_centroids(torch.ones(2, 2), 9), "bits must be 1 to 8"),
        (lambda: init_centroids(torch.full((2, 2), float("nan")), 1), "NaN"),
        (lambda: init_centroids(torch.ones(2, 3), 1, dimension=2), "dimension 2 does not divide 3"),
        (lambda: temperature(torch.ones(2, 2), 0.0), "relative must be a positive number"),
        (lambda: temperature(torch.full((2, 2), float("inf")), 0.1), "NaN or infinity"),
        (lambda: annealed(1.0, 0.0, 0.5), "must be positive"),
        (lambda: harden(torch.ones(4, 4), torch.zeros(2, 2, 1)), "2 tables do not serve 4 rows"),
        (lambda: harden(torch.full((4, 4), float("nan")), torch.zeros(2)), "NaN or infinity"),
        (lambda: harden(torch.ones(4, 4), torch.tensor([0.0, float("nan")])), "NaN or infinity"),
        (lambda: harden(torch.ones(4, 4), torch.zeros(2), scale=torch.ones(3)), "4"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        call()
