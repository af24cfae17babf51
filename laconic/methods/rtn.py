"""Round to nearest."""

from dataclasses import dataclass
from typing import Literal

from laconic.methods.base import Method
from laconic.model.sites import Site
from laconic.weights import Uniform, Weight
from laconic.weights.uniform import Group, uniform_bits


@dataclass(frozen=True, repr=False)
class RTN(Method):
    """Rounds every weight to the nearest point of a uniform grid; needs no data.

    W_hat = s (clamp(round(W / s + z)) - z) with s and z per group. `clip="minmax"` spans each group's range (z an
    integer, so 0 stays exact); `clip="mse"` shrinks it to the least squared error. `second=(bits, rows)` quantizes
    scales and zeros once more.
    Bits: bits + (16 + bits) / group per weight, 16 / group if symmetric.
    Raises: SchemeError when the group does not divide the columns. Source: Nagel et al. 2021 (white paper), section 2.
    Cost: O(entries).
    """

    bits: int = 4
    group: Group = 64
    symmetric: bool = False
    clip: Literal["minmax", "mse"] = "minmax"
    second: tuple[int, int] | None = None
    codec: Literal["dense", "ans"] = "dense"

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return uniform_bits(shape, self.bits, self.group, symmetric=self.symmetric, second=self.second)

    def __call__(self, site: Site) -> Weight:
        weight = Uniform(
            (site.W.shape[0], site.W.shape[1]),
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            second=self.second,
            codec=self.codec,
        )
        weight.fit(site.W, clip=self.clip)
        weight.right_inverse(site.W)
        return weight
