"""dkm_decode against plain autograd of the formula: values, gradients, limits, what is saved, and input that is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic.clustering import dkm_decode, dkm_naive, init_centroids, temperature
from laconic.errors import SchemeError

RULE = dict(tau=0.3, iterations=3)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(function: Any, weight: Tensor, centroids: Tensor, **how: Any) -> list[Tensor]:
    """Decoded weight, centroids, and the gradients of a loss that reads both."""
    weight, centroids = weight.clone().requires_grad_(), centroids.clone().requires_grad_()
    decoded, last = function(weight, centroids, **how)
    loss = (decoded.double() * draw(*decoded.shape, seed=5)).sum() + (
        last.double() * draw(*last.shape, seed=6)
    ).sum() * 3
    return [decoded.detach(), last.detach(), *torch.autograd.grad(loss, (weight, centroids))]


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("decoded", "centroids", "weight gradient", "centroid gradient"), found, wanted, strict=True):
        assert a.shape == b.shape, name
        assert float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max()), name


@pytest.mark.parametrize("way", ["table", "blocks"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("tables", [1, 2])
def test_gradcheck_of_scalars(way: Any, zero: bool, tables: int) -> None:
    weight = draw(4, 3)[:, [0, 1, 1]].clone().requires_grad_()  # values that occur twice, as 16-bit weights have them
    centroids = draw(tables, 3, 1, seed=1).requires_grad_()

    def decode(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return dkm_decode(w, c, zero=zero, rows_per_table=4 // tables, way=way, **RULE)

    assert torch.autograd.gradcheck(decode, (weight, centroids))


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_gradcheck_of_vectors(dimension: int, zero: bool) -> None:
    weight, centroids = draw(4, 6).requires_grad_(), draw(2, 3, dimension, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, c: dkm_decode(w, c, zero=zero, rows_per_table=2, tau=1.5, iterations=3), (weight, centroids)
    )


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize(
    ("dimension", "tables", "way"),
    [(1, 1, "table"), (1, 1, "blocks"), (1, 4, "table"), (1, 4, "blocks"), (2, 1, "auto"), (4, 4, "auto")],
)
def test_float64_is_the_naive_formula(dimension: int, tables: int, way: Any, zero: bool, tolerance: float) -> None:
    weight, centroids = draw(8, 64), draw(tables, 4, dimension, seed=1)
    how = dict(tau=0.2 * dimension, iterations=6, zero=zero, rows_per_table=8 // tables, tolerance=tolerance)
    assert_equal(
        results(dkm_decode, weight, centroids, way=way, **how), results(dkm_naive, weight, centroids, **how), 1e-11
    )


def test_the_iteration_ends_where_the_naive_one_does() -> None:
    """The tolerance ends it earlier in one table than in the other, and after fewer iterations than allowed."""
    weight = torch.cat([draw(2, 64), draw(2, 64).round()])
    centroids = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(1, 3, 1).repeat(2, 1, 1)
    how = dict(tau=0.05, iterations=30, rows_per_table=2)
    ended, all_of_them = (
        results(dkm_decode, weight, centroids, tolerance=tolerance, **how) for tolerance in (1e-2, 0.0)
    )
    assert not torch.allclose(ended[1], all_of_them[1], atol=1e-6)
    assert_equal(ended, results(dkm_naive, weight, centroids, tolerance=1e-2, **how), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tables", "zero"), [(1, False), (1, True), (4, False)])
def test_16_bit_weights_round_once(dtype: torch.dtype, tables: int, zero: bool) -> None:
    """Against float64 on the same values, only the rounding of the 16-bit results remains; the centroids keep all digits."""
    weight = (0.02 * draw(128, 256)).to(dtype)
    centroids = init_centroids(weight, 3, rows_per_table=128 // tables, zero=zero)
    how = dict(tau=temperature(weight, 0.05), iterations=5, rows_per_table=128 // tables, zero=zero)
    wanted = results(dkm_naive, weight.double(), centroids.double(), **how)
    for way in ("table", "blocks"):
        found = results(dkm_decode, weight, centroids, way=way, **how)
        assert found[0].dtype == found[2].dtype == dtype
        assert_equal(found, wanted, 2 * torch.finfo(dtype).eps)
        assert_equal([found[1]] * 4, [wanted[1]] * 4, 1e-6 if way == "table" else 1e-5)


def test_float32_weights_are_closer_than_plain_float32() -> None:
    weight = 0.02 * draw(64, 512, dtype=torch.float32)
    centroids = init_centroids(weight, 3)
    how = dict(tau=temperature(weight, 0.05), iterations=5)
    wanted = results(dkm_naive, weight.double(), centroids.double(), **how)
    found, plain = (results(function, weight, centroids, **how) for function in (dkm_decode, dkm_naive))
    for name, ours, theirs, exact in zip(
        ("decoded", "centroids", "weight gradient", "centroid gradient"), found, plain, wanted, strict=True
    ):
        assert float((ours - exact).abs().max()) <= min(
            float((theirs - exact).abs().max()), 1e-3 * float(exact.abs().max())
        ), name
    rounded = results(dkm_decode, weight, centroids, rounded=torch.bfloat16, **how)
    assert rounded[0].dtype == torch.float32
    # a straight-through rounding is what autograd makes of two casts, but for the rounding of the gradient
    assert_equal(rounded, results(dkm_naive, weight.bfloat16().double(), centroids.double(), **how), 1e-6)


def test_row_scales_are_a_division_and_a_product() -> None:
    weight, centroids, scale = draw(8, 32), draw(2, 4, 1, seed=1), draw(8, seed=2).abs() + 0.5

    def naive(w: Tensor, c: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        decoded, last = dkm_naive(w / scale.unsqueeze(1), c, **how)
        return decoded * scale.unsqueeze(1), last

    for way in ("table", "blocks"):
        found = results(dkm_decode, weight, centroids, scale=scale, way=way, rows_per_table=4, **RULE)
        assert_equal(found, results(naive, weight, centroids, rows_per_table=4, **RULE), 1e-11)


@pytest.mark.parametrize("way", ["table", "blocks"])
def test_16_bit_weights_are_divided_by_their_rows_scales_in_16_bits(way: Any) -> None:
    """Scales that are powers of two divide without rounding: only the rounding of the results remains."""
    weight, scale = (0.02 * draw(16, 128)).bfloat16(), 2.0 ** torch.arange(-3, 13)
    weight = (weight * scale.unsqueeze(1)).bfloat16()
    centroids = init_centroids(weight / scale.unsqueeze(1), 2)
    how = dict(tau=temperature(weight, 0.05, scale=scale), iterations=4)
    wanted = results(dkm_decode, weight.double(), centroids.double(), scale=scale.double(), way="blocks", **how)
    found = results(dkm_decode, weight, centroids, scale=scale, way=way, **how)
    assert found[0].dtype == found[2].dtype == torch.bfloat16
    for i in (0, 2):
        assert bool(
            (
                (found[i].double() - wanted[i]).abs()
                <= torch.finfo(torch.bfloat16).eps * wanted[i].abs().amax(1, keepdim=True)
            ).all()
        )
    assert_equal([found[1]] * 4, [wanted[1]] * 4, 1e-5)


@pytest.mark.parametrize(("shape", "d"), [((96,), 1), ((96,), 4), ((8, 3, 2, 2), 1), ((8, 3, 2, 2), 3)])
def test_a_tensor_of_any_shape_is_its_rows(shape: tuple[int, ...], d: int) -> None:
    weight, centroids = draw(*shape), draw(3, d, seed=1)
    matrix = weight.reshape(shape[0] if len(shape) > 1 else 1, -1)
    decoded, last, *gradients = results(dkm_decode, weight, centroids, **RULE)
    assert decoded.shape == weight.shape
    assert last.shape == centroids.shape

    def flat(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        found, ended = dkm_naive(w.reshape(matrix.shape), c.unsqueeze(0), **RULE)
        return found.reshape(shape), ended[0]

    assert_equal([decoded, last, *gradients], results(flat, weight, centroids), 1e-11)


def test_a_tied_weight_gets_the_sum_of_both_uses() -> None:
    x = draw(3, 8, seed=3)
    gradients = []
    for function in (dkm_decode, dkm_naive):
        embedding, centroids = nn.Parameter(draw(16, 8)), draw(1, 4, 1, seed=1).requires_grad_()
        first, last = function(embedding, centroids, **RULE)
        second, _ = function(embedding, last, **RULE)
        ((first[[0, 3, 3]] + x) @ second.t()).square().sum().backward()
        gradients.append((embedding.grad, centroids.grad))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "dimension"), [(torch.bfloat16, 1), (torch.float32, 1), (torch.bfloat16, 2)])
def test_only_the_weight_and_the_centroids_are_saved(dtype: torch.dtype, dimension: int) -> None:
    weight = nn.Parameter(draw(128, 128, dtype=dtype))
    centroids, scale = init_centroids(weight, 3, dimension=dimension), torch.ones(128)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        decoded, _ = dkm_decode(weight, centroids, scale=scale, tau=0.1, iterations=5)
    assert {x.data_ptr() for x in kept} == {weight.data_ptr(), centroids.data_ptr(), scale.data_ptr()}
    assert sum(x.nbytes for x in kept if x.data_ptr() != weight.data_ptr()) == centroids.nbytes + scale.nbytes
    decoded.float().sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("dimension", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16), (1, torch.bfloat16)]
)
def test_autocast_changes_nothing(dimension: int, dtype: torch.dtype) -> None:
    """Products in 16 bits would give another forward than the backward pass computes again."""
    weight, centroids = draw(16, 32, dtype=dtype), draw(4, dimension, seed=1, dtype=torch.float32)

    def decode(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return dkm_decode(w, c, **RULE)

    assert_equal(results(decode, weight, centroids), results(dkm_decode, weight, centroids, **RULE), 0.0)


def test_a_second_derivative_is_refused() -> None:
    weight = draw(4, 4).requires_grad_()
    (first,) = torch.autograd.grad(dkm_decode(weight, draw(2), **RULE)[0].square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_sees_no_break(backend: str) -> None:
    weight, centroids = draw(128, 256, dtype=torch.bfloat16), torch.linspace(-2, 2, 8).reshape(1, 8, 1)

    def decode(w: Tensor, c: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        decoded, last = dkm_decode(w * 1, c, **how)
        return decoded + 0, last

    torch._dynamo.reset()
    compiled = torch.compile(decode, backend=backend, fullgraph=True)
    assert_equal(results(compiled, weight, centroids, **RULE), results(decode, weight, centroids, **RULE), 0.0)


def test_a_compiled_function_is_annealed_without_compiling_again() -> None:
    weight, centroids, graphs = draw(16, 16).requires_grad_(), torch.linspace(-2, 2, 4), []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda w, c, tau: dkm_decode(w * 1, c, tau=tau, iterations=2)[0], backend=backend, fullgraph=True
    )
    for tau in (0.5, 0.2, 0.1):
        found, wanted = (
            compiled(weight, centroids, torch.tensor(tau, dtype=torch.float64)),
            dkm_decode(weight, centroids, tau=tau, iterations=2)[0],
        )
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(x.square().sum(), weight)[0] for x in (found, wanted)))
    assert len(graphs) == 1


def test_a_cold_temperature_is_the_nearest_centroid_and_hard_k_means() -> None:
    weight, centroids = draw(8, 64), torch.tensor([-1.0, 0.1, 1.2], dtype=torch.float64)
    index = (weight.unsqueeze(2) - centroids).abs().argmin(2)
    decoded, last = dkm_decode(weight, centroids, tau=1e-9, iterations=0)
    torch.testing.assert_close(decoded, centroids[index])
    torch.testing.assert_close(last, centroids)
    for way in ("table", "blocks"):
        decoded, last = dkm_decode(weight, centroids, tau=1e-9, iterations=1, way=way)
        torch.testing.assert_close(last, torch.stack([weight[index == k].mean() for k in range(3)]))


@pytest.mark.parametrize("way", ["table", "blocks"])
def test_one_centroid_is_the_mean(way: Any) -> None:
    weight = draw(8, 8).requires_grad_()
    decoded, last = dkm_decode(weight, torch.zeros(1, dtype=torch.float64), tau=0.1, iterations=1, way=way)
    torch.testing.assert_close(decoded, weight.mean().expand(8, 8))
    torch.testing.assert_close(last, weight.mean().reshape(1))
    torch.testing.assert_close(
        torch.autograd.grad(decoded[0, 0], weight)[0], torch.full((8, 8), 1 / 64, dtype=torch.float64)
    )


@pytest.mark.parametrize("way", ["table", "blocks"])
def test_few_values_and_centroids_without_weights(way: Any) -> None:
    """More centroids than values, one of them far from all: it stays, and nothing becomes NaN."""
    weight, centroids = (
        torch.tensor([[0.5, -0.5] * 8], dtype=torch.float64),
        torch.tensor([-0.6, -0.1, 0.6, 90.0], dtype=torch.float64).reshape(1, 4, 1),
    )
    found = results(dkm_decode, weight, centroids, tau=0.1, iterations=4, way=way)
    assert_equal(found, results(dkm_naive, weight, centroids, tau=0.1, iterations=4), 1e-11)
    assert float(found[1][0, 3]) == 90.0
    constant = results(
        dkm_decode, torch.full((4, 4), 0.25, dtype=torch.float64), centroids, tau=0.1, iterations=2, way=way
    )
    torch.testing.assert_close(constant[0], torch.full((4, 4), 0.25, dtype=torch.float64))
    assert all(bool(x.isfinite().all()) for x in constant)


def test_a_zero_centroid_stays_zero_and_has_no_gradient() -> None:
    decoded, last, _, gradient = results(dkm_decode, draw(8, 8), draw(1, 4, 1, seed=1), zero=True, **RULE)
    assert float(last[0, 0]) == 0.0 == float(gradient[0, 0])
    assert bool((gradient[0, 1:] != 0).all())
    assert not bool((decoded == 0).any())  # soft: only the hard assignment makes zeros


def test_a_gradient_that_is_not_finite_shows() -> None:
    weight = draw(128, 128, dtype=torch.bfloat16).requires_grad_()
    decoded, _ = dkm_decode(weight, torch.linspace(-1, 1, 4), **RULE)
    gradient = torch.ones_like(decoded)
    gradient[0, 0] = float("nan")
    decoded.backward(gradient)
    assert weight.grad is not None
    assert bool(weight.grad[0, 0].isnan())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tau=0.0), "tau must be a positive number"),
        (dict(tau=-1.0), "tau must be a positive number"),
        (dict(tau=torch.tensor(0.0)), "tau must be a positive number, got a tensor of 0.0"),
        (dict(tau=torch.ones(2)), "tau must be a positive number"),
        (dict(tau=float("nan")), "tau must be a positive number"),
        (dict(tau=float("inf")), "tau must be a positive number"),
        (dict(iterations=-1), "iterations and tolerance"),
        (dict(tolerance=float("nan")), "iterations and tolerance"),
        (dict(weight=torch.zeros(8, 8, dtype=torch.int64)), "expected a float tensor"),
        (dict(weight=torch.zeros(1, 3)), "4 centroids for 3 weights"),
        (dict(weight=torch.full((8, 8), float("nan"))), "NaN or infinity"),
        (dict(weight=torch.full((128, 128), float("inf"), dtype=torch.bfloat16)), "NaN or infinity"),
        (dict(centroids=torch.tensor([0.0, float("nan")])), "NaN or infinity"),
        (dict(centroids=torch.zeros(2, 4, 1)), "2 tables of 8 rows"),
        (dict(centroids=torch.zeros(4, 3)), "vectors of 3 do not divide 8 columns"),
        (dict(centroids=torch.zeros(1, 1, 1, 1)), "centroids must be"),
        (dict(rows_per_table=4), "1 tables of 4 rows"),
        (dict(way="table"), "needs 16-bit weights, got float32; rounded=torch.bfloat16"),
        (dict(way="table", centroids=torch.zeros(4, 2)), "needs scalars"),
        (dict(way="fast"), "way must be"),
        (dict(rounded=torch.float32), "rounded must be"),
        (dict(scale=torch.ones(3)), "scale must be a constant"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = (
        dict(weight=draw(8, 8, dtype=torch.float32), centroids=torch.linspace(-1, 1, 4), **RULE) | change
    )
    with pytest.raises(SchemeError, match=message):
        dkm_decode(arguments.pop("weight"), arguments.pop("centroids"), **arguments)
