"""Another float type."""

from dataclasses import dataclass

from laconic.methods.base import Method
from laconic.model.sites import Site
from laconic.weights import Dense, Weight


@dataclass(frozen=True, repr=False)
class Cast(Method):
    """Every value rounded to a float type: "float16", "bfloat16" or "float32"; needs no data.

    Bits: those of the type. Raises: SchemeError when a value does not fit it. Source: Condensa section 3.1 (quantize).
    Cost: O(entries).
    """

    dtype: str = "float16"

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return float(Dense((1, 1), dtype=self.dtype).bits()) * shape[0] * shape[1]

    def __call__(self, site: Site) -> Weight:
        weight = Dense((site.W.shape[0], site.W.shape[1]), dtype=self.dtype)
        weight.right_inverse(site.W)
        return weight
