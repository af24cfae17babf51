"""The static range of a layer's inputs: from the least to the largest value seen, or narrower where that rounds a
sample of them better."""

from collections.abc import Iterable

import torch
from torch import Tensor

from laconic.weights.inputs import Inputs, round_input

# shares of a range: from all of it to a thousandth, where only outliers make it so wide
_COARSE = [2.0 ** (-k / 4) for k in range(40)]
_FINE = [2.0 ** (k / 32) for k in range(-7, 8)]  # around the best of them
_ROUNDS = 2  # of a search for one end after the other


def least_error(sample: Tensor, low: float, high: float, bits: int, symmetric: bool) -> Inputs:
    """Static inputs of the range within `low` to `high` that rounds a sample of values [...] with the least squared
    error.

        argmin over (l, h) of |x - Q(x; l, h)|^2, low <= l <= 0 <= h <= high

    Symmetric: both ends are shrunk together, by shares on two grids, coarse and fine. Else first together, then one
    after the other. The whole range is among those tried, so the error is never larger than its. Values are compared in
    float32, summed in float64. Source: Banner et al. 2019 (ACIQ), section 3; Nagel et al. 2021, section 3.1 (MSE).
    Cost: 55 passes over the sample, 275 if not symmetric.
    """

    def error(ends: tuple[float, float]) -> float:
        return _squared_error(sample, Inputs.within(*ends, bits, symmetric))

    def best(candidates: Iterable[tuple[float, float]]) -> tuple[float, float]:
        return min(candidates, key=error)

    def searched(start: tuple[float, float], moves_low: bool, moves_high: bool) -> tuple[float, float]:
        def shrunk(ends: tuple[float, float], share: float) -> tuple[float, float]:
            return max(low, ends[0] * share if moves_low else ends[0]), min(
                high, ends[1] * share if moves_high else ends[1]
            )

        coarse = best(shrunk(start, share) for share in _COARSE)
        return best([coarse, *(shrunk(coarse, share) for share in _FINE)])

    ends = searched((low, high), True, True)
    for _ in range(0 if symmetric or low == 0 or high == 0 else _ROUNDS):
        ends = searched((ends[0], high), False, True)
        ends = searched((low, ends[1]), True, False)
    return Inputs.within(*min(ends, (low, high), key=error), bits, symmetric)


def _squared_error(sample: Tensor, inputs: Inputs) -> float:
    with torch.no_grad():
        return float((round_input(sample, inputs) - sample).square().sum(dtype=torch.float64))
