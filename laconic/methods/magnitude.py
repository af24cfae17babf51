"""Magnitude pruning, with one threshold per layer or one over all layers."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.sites import Site
from laconic.weights import Dense, Sparse, Weight
from laconic.weights.masks import Pattern, density_of, expected_mask_bits, n_of_m

_BINS = 1 << 15


@dataclass(frozen=True, repr=False)
class Magnitude(Method):
    """Sets the smallest weights to zero: the share `sparsity` of them, n:m groups, or whole blocks by their summed squares; needs no data.

    `scope="layer"`: each matrix loses that share. `scope="model"`: one threshold on |w| over all matrices, so each loses what lies below it.
    Survivors keep bfloat16 values; encode them with `>>`, as in `Magnitude(0.5) >> KMeans(bits=4)`.
    Bits: 16 x density + the mask. Raises: SchemeError when the pattern does not tile the matrix.
    Source: Han et al. 2015; the single threshold is Condensa section 3.1's. Cost: one sort of the matrix.
    """

    sparsity: float = 0.5
    pattern: Pattern = "unstructured"
    scope: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        check_sparsity(self, self.sparsity)
        if self.scope not in ("layer", "model"):
            raise SchemeError(f"Magnitude: scope must be 'layer' or 'model', got {self.scope!r}")
        if self.scope == "model" and self.pattern != "unstructured":
            raise SchemeError(f"Magnitude: one threshold over the model is for single weights; pattern {self.pattern!r} needs scope='layer'")

    @property
    def density(self) -> float:
        """The share of entries that survive."""
        return density_of(self.pattern, self.sparsity)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return 16 * self.density * shape[0] * shape[1] + expected_mask_bits(shape, self.pattern, self.sparsity)

    def __call__(self, site: Site) -> Weight:
        weight = sparse(site, self.pattern, self.sparsity)
        weight.fit(site.W.float())
        weight.right_inverse(site.W.float())
        return weight

    def allocation(self) -> Allocation | None:
        return GlobalThreshold(self) if self.scope == "model" else None


def check_sparsity(method: Method, sparsity: float) -> None:
    """Raises SchemeError unless the sparsity is a share of zeros."""
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise SchemeError(f"{type(method).__name__}: sparsity is the share of zeros, at least 0 and below 1, got {sparsity!r}")


def sparse(site: Site, pattern: Pattern, sparsity: float) -> Sparse:
    """A sparse weight with bfloat16 values for a site; an n:m pattern says its own sparsity."""
    values = Dense((site.W.shape[0], site.W.shape[1]))
    return Sparse(values, pattern=pattern, sparsity=0.5 if n_of_m(pattern) else sparsity).to(site.W.device)


class GlobalThreshold(Allocation):
    """The share of each matrix that lies below one threshold on |w|, found from histograms of |w| in 32,768 logarithmic bins."""

    def __init__(self, method: Magnitude) -> None:
        self.method = method
        self.counts: dict[str, Tensor] = {}

    def observe(self, site: Site) -> None:
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for part in site.W.reshape(-1).split(1 << 24):
            exponent = part.float().abs().clamp(min=1e-20).log2()  # from -66.4 to, for any sane weight, 20
            bins = ((exponent + 67) * (_BINS / 100)).long().clamp(0, _BINS - 1)
            histogram += torch.bincount(bins, minlength=_BINS).cpu()
        self.counts[site.name] = histogram

    def resolve(self) -> dict[str, Method]:
        total = torch.stack(list(self.counts.values())).sum(0)
        target = round(self.method.sparsity * int(total.sum()))
        below = total.cumsum(0)
        bin_ = int(torch.searchsorted(below, target))
        before = int(below[bin_ - 1]) if bin_ else 0
        share = (target - before) / max(int(total[bin_]), 1)  # of the bin the threshold falls into
        methods: dict[str, Method] = {}
        for name, histogram in self.counts.items():
            pruned = float(histogram[:bin_].sum()) + share * float(histogram[bin_])
            methods[name] = replace(self.method, sparsity=min(pruned / float(histogram.sum()), 1 - 1e-9), scope="layer")
        return methods
