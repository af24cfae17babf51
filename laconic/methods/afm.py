"""AFM: a layer or table by the principal components of what it puts out, with a bias for the mean that they leave
out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.lowrank import LowRank, principal_directions
from laconic.model.sites import Site, Stats
from laconic.weights import Dense, Weight
from laconic.weights import LowRank as Factors


def output_components(W: Tensor, H: Tensor, centre: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The affine map of rank r nearest to x -> W x in the mean square over inputs with E[x x^T] = H and E[x] = m =
    `centre`.

    With S = H - m m^T and W S W^T = U diag(e) U^T, e falling: U_r [out, r], B = U_r^T W [r, in], bias (I - U_r U_r^T) W
    m [out], and all of e. E |W x - U_r B x - bias|^2 = e_(r+1) + ... exactly. A bias b of the layer itself drops out:
    its outputs W x + b have mean W m + b, and U_r U_r^T (W x) + b + (I - U_r U_r^T) W m is the same map. Computed in
    float64.
    Source: Yu and Wu 2023 (atomic feature mimicking). Cost: O(in^3 + out in min(out, in)).
    """
    W64, m = W.double(), centre.double()
    U, e = principal_directions(W64, H.double() - torch.outer(m, m))
    U = U[:, :r]
    B = U.t() @ W64
    mean = W64 @ m
    return U, B, mean - U @ (U.t() @ mean), e


def table_components(E: Tensor, uses: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a table E [rows, d] nearest to its own on an r-dimensional plane, each row counted as often as it is
    looked up.

    With p = uses / sum(uses), mu = p^T E and sum_v p_v (E_v - mu)(E_v - mu)^T = U diag(e) U^T: the new table (E - mu)
    U_r [rows, r], then y -> U_r y + mu, as one product of A = [(E - mu) U_r, 1] [rows, r + 1] and B = [U_r, mu]^T
    [r + 1, d]; and all of e. sum_v p_v |E_v - (A B)_v|^2 = e_(r+1) + ... exactly. Computed in float64.
    Source: Yu et al. 2024 (for embeddings). Cost: O(rows d^2 + d^3).
    """
    E64 = E.double()
    counts = torch.ones(len(E), dtype=torch.float64) if uses is None or not uses.any() else uses.double().cpu()
    p = (counts / counts.sum()).to(E64.device).unsqueeze(1)
    mu = (p * E64).sum(0)
    centred = E64 - mu
    e, U = torch.linalg.eigh(centred.t() @ (p * centred))
    e, U = e.flip(0), U.flip(1)[:, :r]
    A = torch.cat([centred @ U, torch.ones_like(p)], 1)
    return A, torch.cat([U.t(), mu.unsqueeze(0)]), e


@dataclass(frozen=True, repr=False)
class AFM(Method):
    """W ~ U U^T W with U [out, rank] the leading eigenvectors of the outputs' covariance, and the bias (I - U U^T) mu
    that restores their mean.

    Of all affine maps of that rank it has the least mean squared output error over the calibration inputs: the sum of
    the eigenvalues dropped. An embedding is projected in the same way, its rows weighted by how often they are looked
    up, and needs no bias: its mean is one more column. `rank` is a number of columns, or below 1 the share of the
    break-even rank out x in / (out + in). Factors are bfloat16, or what `factors` makes of them; the bias is float32.
    Bits: 16 rank (out + in) + 32 out; of an embedding 16 (rank + 1)(out + in).
    Raises: SchemeError when the rank exceeds the matrix's, for row groups, and where a layer cannot add to its outputs.
    Source: Yu et al. 2024, "Unified low-rank compression framework for click-through rate prediction", whose layers are
    those of Yu and Wu 2023 (AFM, atomic feature mimicking).
    Cost: one eigendecomposition and one SVD in float64.
    """

    rank: int | float = 0.5
    factors: Method | None = None

    needs = Stats.HESSIAN | Stats.CENTRE | Stats.USES

    @property
    def biased(self) -> bool:
        return True

    def _low(self) -> LowRank:
        return LowRank(self.rank, factors=self.factors)

    def inner_shapes(self, parameter: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Those of U and B."""
        return self._low().inner_shapes(parameter, shape)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return self._low().expected_bits(shape) + 32.0 * shape[0]

    def __call__(self, site: Site) -> Weight:
        low, shape = self._low(), (site.W.shape[0], site.W.shape[1])
        rank = low.columns(shape)
        if site.role == "embedding":
            A, B, _ = table_components(site.W, site.uses, rank)
            return low.stored(site, A.to(site.W.dtype), B.to(site.W.dtype))
        if site.hessian is None or site.centre is None or site.groups > 1:
            raise SchemeError(
                f"{site.name}: AFM needs one covariance for the whole matrix (groups: {site.groups}); give it a rule "
                "of its own"
            )
        U, B, offset, _ = output_components(site.W, site.hessian[0], site.centre[0], rank)
        weight = low.stored(site, U.float(), B.float())
        bias = Dense((1, len(offset)), dtype="float32")
        bias.right_inverse(offset.float().unsqueeze(0))
        return Factors(weight.left, weight.right, bias)
