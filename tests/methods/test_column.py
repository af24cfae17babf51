"""The column solver against GPTQ written out from the paper, and its limits."""

import pytest
import torch
from torch import Tensor

from laconic.solvers.column import Sweep, factor, solve
from laconic.weights import Codebook, Dense, Sparse, Uniform
from tests.conftest import make_site, output_loss, rows_agree


def gptq_from_the_paper(W: Tensor, H: Tensor, grid: Uniform, damping: float = 0.01) -> Tensor:
    """Algorithm 1 of the paper, a column at a time, with U = chol(H^-1), in float64."""
    n = len(H)
    H = H.double() + damping * H.diagonal().double().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, Q = W.double().clone(), torch.zeros_like(W)
    for j in range(n):
        Q[:, j] = grid.nearest(W[:, j : j + 1].float(), j)[:, 0]
        error = (W[:, j] - Q[:, j]) / U[j, j]
        W[:, j:] -= error.unsqueeze(1) * U[j, j:].unsqueeze(0)
    return Q


def fitted(bits: int = 3, group: int = 16, rows: int = 48) -> Uniform:
    grid = Uniform((rows, 64), bits=bits, group=group)
    grid.fit(make_site(rows).W)
    return grid


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_gptq(bits: int) -> None:
    site, grid = make_site(), fitted(bits)
    expected = gptq_from_the_paper(site.W, site.hessian[0], grid)  # type: ignore[index]
    solve(grid, site, Sweep(act_order=False))
    assert rows_agree(grid(), expected.float())


def test_act_order_is_gptq_on_permuted_columns() -> None:
    site, grid = make_site(), fitted()
    H = site.hessian[0]  # type: ignore[index]
    order = H.diagonal().argsort(descending=True, stable=True)

    class Permuted:
        def nearest(self, w: Tensor, j: int) -> Tensor:
            return grid.nearest(w, int(order[j]))

    expected = torch.empty_like(site.W)
    expected[:, order] = gptq_from_the_paper(site.W[:, order], H[order][:, order], Permuted())  # type: ignore[arg-type]
    solve(grid, site, Sweep(act_order=True))
    assert rows_agree(grid(), expected)


@pytest.mark.parametrize("block", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_size_does_not_matter(block: int, act_order: bool) -> None:
    site = make_site()
    whole, blocked = fitted(), fitted()
    solve(whole, site, Sweep(act_order, block=128))
    solve(blocked, site, Sweep(act_order, block=block))
    assert rows_agree(whole.codes, blocked.codes)


def test_its_loss_is_the_sum_of_its_steps() -> None:
    """tr(E H E^T) = ||E L||^2 with the damped H: the identity that makes every step's loss visible."""
    site, grid = make_site(), fitted()
    H = site.hessian[0].double()  # type: ignore[index]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(64)
    solve(grid, site, Sweep(act_order=False))
    E = site.W.double() - grid().double()
    L = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    assert float(((E @ H) * E).sum()) == pytest.approx(float((E @ L).square().sum()), rel=1e-9)


def test_without_correlation_it_is_plain_rounding() -> None:
    site, grid, rounded = make_site(), fitted(), fitted()
    rounded.right_inverse(site.W)
    solve(grid, site.having(hessian=torch.eye(64).unsqueeze(0)), Sweep())
    assert torch.equal(grid.codes, rounded.codes)


def test_groups_are_fitted_to_live_values() -> None:
    """With groups smaller than the block the public code fits grids on stale values; here the sweep's own errors are in them."""
    site, seen = make_site(), []
    grid = Uniform((48, 64), bits=2, group=16)

    def fit(w: Tensor, j: int, importance: Tensor) -> None:
        seen.append((j, w.clone()))
        grid.fit(w, j, importance)

    solve(grid, site, Sweep(act_order=False), fit)
    assert [j for j, _ in seen] == [0, 16, 32, 48]
    assert torch.equal(seen[0][1], site.W[:, :16])
    # the live values are the best real-valued completion: the least-squares answer to the errors already made
    H = site.hessian[0].double() + 0.01 * site.hessian[0].diagonal().mean() * torch.eye(64)  # type: ignore[index]
    E = (site.W - grid()).double()[:, :16]
    completion = site.W[:, 16:].double() + E @ H[:16, 16:] @ torch.linalg.inv(H[16:, 16:])
    assert torch.allclose(seen[1][1].double(), completion[:, :16], atol=1e-5)


@pytest.mark.parametrize("weight", ["sparse", "nm", "vector"])
def test_any_column_set_gets_error_feedback(weight: str) -> None:
    site = make_site(rows=64, columns=128, spread=1.0)
    if weight == "vector":
        vectors = site.W.reshape(-1, 2)
        table = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:64]].unsqueeze(0)
        book = Codebook((64, 128), bits=6, dimension=2)
        book.set_tables(table)
        book.right_inverse(site.W)
        before = output_loss(site, book())
        solve(book, site, Sweep())
        after = output_loss(site, book())
    else:
        sparse = Sparse(Dense((64, 128)), pattern="2:4" if weight == "nm" else "unstructured")
        sparse.fit(site.W)
        sparse.right_inverse(site.W)
        before = output_loss(site, sparse())
        solve(sparse, site, Sweep(act_order=False), sparse.fit)
        after = output_loss(site, sparse())
    assert after < 0.8 * before


def test_a_mask_is_respected_and_its_error_fed_forward() -> None:
    site = make_site()
    mask = torch.rand(48, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    grid, rounded = fitted(4), fitted(4)
    solve(grid, site.having(mask=mask), Sweep())
    rounded.right_inverse(site.W * mask)
    zeros = grid.nearest(torch.zeros(48, 1), 0)  # 0 is a point of the grid
    assert (zeros == 0).all()
    assert (grid()[~mask] == 0).all()
    assert output_loss(site, grid()) < output_loss(site, rounded() * mask)


def test_groups_of_rows_use_their_own_hessian() -> None:
    site = make_site(groups=3)
    grid = Uniform((48, 64), bits=3, group=16)
    grid.fit(site.W)
    solve(grid, site, Sweep(act_order=False))
    for g in range(3):
        rows = slice(16 * g, 16 * (g + 1))
        alone = Uniform((16, 64), bits=3, group=16)
        alone.fit(site.W[rows])
        solve(alone, site.having(W=site.W[rows], groups=1, hessian=site.hessian[g : g + 1]), Sweep(act_order=False))  # type: ignore[index]
        assert rows_agree(alone(), grid()[rows])


def test_columns_without_input_are_rounded_not_zeroed() -> None:
    site = make_site()
    H = site.hessian.clone()  # type: ignore[union-attr]
    H[:, 5], H[:, :, 5] = 0, 0
    grid, rounded = fitted(), fitted()
    rounded.right_inverse(site.W)
    solve(grid, site.having(hessian=H), Sweep())
    assert torch.equal(grid()[:, 5], rounded()[:, 5])


@pytest.mark.parametrize("act_order", [False, True])
def test_a_rank_deficient_hessian_is_solved_and_listed(act_order: bool) -> None:
    X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    site = make_site().having(hessian=(X.T @ X / 5).unsqueeze(0), notes=[])
    grid = fitted()
    solve(grid, site, Sweep(act_order, damping=1e-10))
    assert "positive definite; solved with damping" in site.notes[0]
    assert torch.isfinite(grid()).all()
    assert output_loss(site, grid()) < output_loss(site, torch.zeros(48, 64))


@pytest.mark.parametrize(
    ("hessian", "reason"), [("zero", "no input was seen"), ("nan", "not finite"), ("indefinite", "at any damping")]
)
def test_a_hopeless_hessian_falls_back_to_rounding_and_is_listed(hessian: str, reason: str) -> None:
    H = {
        "zero": torch.zeros(64, 64),
        "nan": torch.full((64, 64), torch.nan),
        "indefinite": torch.eye(64) - 2 * torch.ones(64, 64),
    }[hessian]
    if hessian == "indefinite":
        H.diagonal().fill_(1.0)
    site = make_site().having(hessian=H.unsqueeze(0), notes=[])
    grid, rounded = fitted(), fitted()
    rounded.right_inverse(site.W)
    solve(grid, site, Sweep())
    assert reason in site.notes[0]
    assert "block.0.layer" in site.notes[0]
    assert torch.equal(grid.codes, rounded.codes)


def test_groups_of_one_kind_are_one_line() -> None:
    """Experts whose few tokens leave the Hessian indefinite, as rounding may: one note with their numbers."""
    notes: list[str] = []
    H = torch.eye(8).repeat(6, 1, 1)
    H[[1, 2, 4], 0, 1] = H[[1, 2, 4], 1, 0] = 3.0
    factor(H, torch.arange(8), 0.01, "experts", notes)
    assert len(notes) == 1
    assert notes[0].startswith("experts: row groups 1-2, 4 of 6: Hessian not positive definite")
