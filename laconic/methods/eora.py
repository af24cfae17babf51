"""EoRA: low-rank compensation of a compressed matrix in the eigenspace of its inputs."""

from dataclasses import dataclass

from laconic.methods.base import Method
from laconic.methods.lowrank import LowRank
from laconic.model.sites import Site, Stats
from laconic.weights import Weight


@dataclass(frozen=True, repr=False)
class EoRA(Method):
    """Encodes a residual as A B of the given rank, so that `GPTQ(bits=3) + EoRA(rank=16)` has the least output error
    tr(E C E^T).

    C = X^T X / n is the true mean over the calibration inputs (the public code's running update is a decaying average,
    which forgets the first samples), its eigenvalues floored relative to the largest. Bits: 16 rank (out + in), or what
    `factors` makes of them.
    Source: Liu et al. 2024, section 3, by `lowrank.weighted_lowrank`. Cost: one eigendecomposition and one SVD.
    """

    rank: int = 16
    factors: Method | None = None

    needs = Stats.HESSIAN

    def inner_shapes(self, parameter: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """Those of A and B."""
        return LowRank(self.rank).inner_shapes(parameter, shape)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return LowRank(self.rank, factors=self.factors).expected_bits(shape)

    def __call__(self, site: Site) -> Weight:
        return LowRank(self.rank, weighted=True, factors=self.factors)(site)
