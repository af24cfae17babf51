"""One operator for AFM, LoRD and EoRA."""

import pytest
import torch

from laconic.errors import SchemeError
from laconic.methods.eora import EoRA
from laconic.methods.gptq import GPTQ
from laconic.methods.lowrank import LowRank, weighted_lowrank
from laconic.methods.rtn import RTN
from tests.conftest import make_site, output_loss


@pytest.mark.parametrize("r", [1, 5, 20, 48])
def test_the_remaining_error_is_the_sum_of_dropped_squares(r: int) -> None:
    site = make_site()
    C = site.hessian[0].double()  # type: ignore[index]
    A, B, s = weighted_lowrank(site.W.double(), C, r)
    E = site.W.double() - A @ B
    assert float(((E @ C) * E).sum()) == pytest.approx(float(s[r:].square().sum()), rel=1e-8, abs=1e-12)


def test_without_weights_it_is_the_truncated_svd() -> None:
    W = make_site().W
    A, B, s = weighted_lowrank(W, None, 7)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(A @ B, U[:, :7] * S[:7] @ Vh[:7], atol=1e-5)
    assert torch.allclose(s.float(), S, atol=1e-5)


def test_it_is_the_principal_components_of_the_outputs() -> None:
    """AFM and LoRD keep the leading eigenvectors of E[y y^T]: U_r U_r^T W."""
    site = make_site()
    W, C = site.W.double(), site.hessian[0].double()  # type: ignore[index]
    U = torch.linalg.eigh(W @ C @ W.T).eigenvectors[:, -6:]
    A, B, _ = weighted_lowrank(W, C, 6)
    assert torch.allclose(A @ B, U @ U.T @ W, atol=1e-9)


def test_singular_covariances_do_not_blow_up() -> None:
    site = make_site()
    X = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    A, B, _ = weighted_lowrank(site.W, X.T @ X / 10, 4)
    assert torch.isfinite(A).all()
    assert (A @ B).abs().max() < 100 * site.W.abs().max()


def test_full_rank_restores_and_rank_is_checked() -> None:
    site = make_site()
    assert torch.allclose(LowRank(48, weighted=True)(site)(), site.W, atol=2e-3)
    assert LowRank(0.5)(site).rank == round(0.5 * 48 * 64 / (48 + 64))  # type: ignore[attr-defined]
    with pytest.raises(SchemeError, match="rank 49 of a 48 x 64 matrix"):
        LowRank(49)(site)


def test_inputs_matter() -> None:
    site = make_site(spread=1.5)
    assert output_loss(site, LowRank(8, weighted=True)(site)()) < 0.8 * output_loss(site, LowRank(8)(site)())


def test_eora_wins_back_more_than_a_plain_svd_of_the_residual() -> None:
    """The paper's claim: compensation in the eigenspace beats SVD compensation, which beats none."""
    site = make_site(rows=96, columns=128, spread=1.0)
    base = RTN(bits=2, group=32)
    losses = [output_loss(site, method(site)()) for method in (base + EoRA(8), base + LowRank(8), base)]
    assert losses[0] < 0.95 * losses[1] < 0.95 * losses[2]


def test_factors_can_be_weights_of_any_kind() -> None:
    site = make_site()
    coarse = (GPTQ(bits=2, group=16) + EoRA(8, factors=RTN(bits=4, group="channel")))(site)
    fine = (GPTQ(bits=2, group=16) + EoRA(8))(site)
    assert coarse.bits() < fine.bits()
    assert output_loss(site, coarse()) < output_loss(site, GPTQ(bits=2, group=16)(site)())


def test_groups_of_inputs_are_refused() -> None:
    with pytest.raises(SchemeError, match="groups: 4"):
        LowRank(4, weighted=True)(make_site(groups=4))
