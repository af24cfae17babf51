"""Low rank: the best product of thin factors, plain or under the second moments of the input. One operator serves LoRD
and EoRA, and with centred moments AFM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import NONE, Site, Stats
from laconic.weights import LowRank as Factors
from laconic.weights import Weight

# smallest eigenvalue of C, relative to the largest: below it, directions carry no signal and 1 / sqrt would blow up
# noise
_FLOOR = 1e-6


def weighted_lowrank(M: Tensor, C: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-r product A B that minimises tr((M - A B) C (M - A B)^T), and all singular values of M C^(1/2).

    With C = Q diag(l) Q^T and S = Q diag(l)^(1/2): svd(M S) = U diag(s) V^T gives A = U_r diag(s_r)^(1/2), B =
    diag(s_r)^(1/2) V_r^T S^-1. The remaining error is exactly the sum of the squared singular values dropped. M
    [out, in], C [in, in] or None for the identity, A [out, r], B [r, in]. Computed in float64.
    Source: EoRA (Liu et al. 2024) section 3; equal to PCA of the outputs M x about zero (LoRD). Cost: O(in^3 + out in
    min(out, in)).
    """
    M64 = M.double()
    if C is None:
        U, s, Vh = torch.linalg.svd(M64, full_matrices=False)
        back = None
    else:
        Q, root = _root(C.double())
        U, s, Vh = torch.linalg.svd(M64 @ (Q * root), full_matrices=False)
        back = (Q / root).t()
    split = s[:r].sqrt()
    B = split.unsqueeze(1) * (Vh[:r] if back is None else Vh[:r] @ back)
    return (U[:, :r] * split).to(M.dtype), B.to(M.dtype), s


def principal_directions(M: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors U [out, min(out, in)] of M C M^T, in the order of their eigenvalues e [min(out, in)], largest
    first.

    By the SVD of M C^(1/2), so that out may be large. M [out, in], C [in, in], both float64; the span of all of U is
    that of M's columns.
    """
    Q, root = _root(C)
    U, s, _ = torch.linalg.svd(M @ (Q * root), full_matrices=False)
    return U, s.square()


def _root(C: Tensor) -> tuple[Tensor, Tensor]:
    """Q and diag(l)^(1/2) of C = Q diag(l) Q^T, eigenvalues floored."""
    eigenvalues, Q = torch.linalg.eigh(C)
    return Q, eigenvalues.clamp(min=float(eigenvalues[-1].clamp(min=1e-30)) * _FLOOR).sqrt()


@dataclass(frozen=True, repr=False)
class LowRank(Method):
    """W ~ A B with A [out, rank], B [rank, in]. `weighted=True` minimises the output error under the calibration inputs
    (LoRD).

    `rank` is a number of columns, or below 1 the share of the break-even rank out x in / (out + in). Factors are
    bfloat16, or what the method `factors` makes of them. Bits: 16 rank (out + in) with bfloat16 factors; a note where
    that is no less than the matrix takes at 16.
    Raises: SchemeError when the rank exceeds the matrix's. Source: Eckart-Young; Kaushal et al. 2023 (LoRD). Cost: one
    SVD.
    """

    rank: int | float = 0.5
    weighted: bool = False
    factors: Method | None = None

    @property
    def wants(self) -> Stats:
        return Stats.HESSIAN if self.weighted else NONE

    def columns(self, shape: tuple[int, int]) -> int:
        """The rank for a matrix [out, in]. Raises: SchemeError when it exceeds the matrix's."""
        out, columns = shape
        rank = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * out * columns / (out + columns)))
        if not 0 < rank <= min(out, columns):
            raise SchemeError(f"rank {rank} of a {out} x {columns} matrix; it must be 1 to {min(out, columns)}")
        return rank

    def inner_shapes(self, parameter: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Those of A and B."""
        return [(shape[0], self.columns(shape)), (self.columns(shape), shape[1])]

    def expected_bits(self, shape: tuple[int, int]) -> float:
        sides = self.inner_shapes("factors", shape)
        return sum(
            self.factors.expected_bits(side) if self.factors is not None else 16.0 * side[0] * side[1] for side in sides
        )

    def __call__(self, site: Site) -> Weight:
        rank = self.columns((site.W.shape[0], site.W.shape[1]))
        if self.weighted and (site.hessian is None or site.groups > 1):
            raise SchemeError(
                f"{site.name}: weighted low rank needs one Hessian for the whole matrix (groups: {site.groups})"
            )
        C = site.hessian[0] if self.weighted and site.hessian is not None else None
        A, B, _ = weighted_lowrank(site.W.float(), C, rank)
        return self.stored(site, A, B)

    def stored(self, site: Site, A: Tensor, B: Tensor) -> Factors:
        """The product A B of given factors A [out, r], B [r, in] as it is stored; noted where that saves nothing."""
        if self.factors is None:
            weight = Factors.of(A, B)
        else:
            # the factors see no inputs of their own, so their method must do without statistics
            given = [
                Site(f"{site.name}.{side}", part, seed=site.seed, notes=site.notes)
                for side, part in (("left", A), ("right", B))
            ]
            weight = Factors(*map(self.factors, given))
        out, columns = site.W.shape
        if weight.bits() >= 16 * out * columns:
            site.notes.append(
                f"{site.name}: rank {weight.rank} takes {weight.bits() / (out * columns):.3g} bits per weight, no less "
                "than the matrix itself; "
                f"below {out * columns / (out + columns):.0f} it saves"
            )
        return weight
