"""DKM: clusters that are trained, by attention between weights and centroids."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.clustering.relax import SoftClusters, Softness
from laconic.clustering.start import with_zero
from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.kmeans import WEIGHTS, check_weights, table_weights
from laconic.model.sites import Site, Stats
from laconic.solvers.tables import fit_tables
from laconic.weights import Codebook, Sparse, Weight
from laconic.weights.codebook import codebook_bits
from laconic.weights.relax import Relaxation

_COOLS = 1 / 40  # on digits, at 1 bit a high beginning that cools is best; at 2 bits beginning and end matter little
_LLOYD = 25  # iterations of k-means for vectors, as KMeans takes
_HALVES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, repr=False)
class DKM(Method):
    """Shares 2**bits values (or vectors of `dimension` neighbours) that move with the weights while the model is
    trained.

    A = softmax(-|w - c|^2 / tau), c <- A^T w / sum A (`iterations` times a step), the network computes with A c; in the
    end every entry takes its nearest centroid. tau falls by equal factors from `tau` to `tau_end`, both times the
    variance of what is clustered; None: 4^(1 - bits / dimension), which shrinks as the squared distance of neighbouring
    centroids does, and a fortieth of the beginning. Without training this is `KMeans`: exact k-means of each matrix, or
    per `rows` rows, which is also where training starts; `weights` as there. `row_scale` divides every row by its root
    mean square before, and stores that (16 bits a row). `zero` keeps one centroid at exactly 0. float32 weights are
    clustered as `rounded` has them, which makes the step a count and a look-up; None clusters them as they are, at the
    cost of every entry times 2**bits.
    Bits: bits / dimension per weight + 16 x dimension x 2**bits per table. Raises: SchemeError.
    Source: Cho et al. 2022 (DKM) section 3; Cho et al. 2023 (eDKM) section 2. The public code of coremltools uses one
    tau for all layers; here it is relative to each layer's variance. Cost: see docs/edkm.md.
    """

    bits: int = 3
    dimension: int = 1
    rows: int | None = None
    row_scale: bool = False
    zero: bool = False
    tau: float | None = None
    tau_end: float | None = None
    iterations: int = 5
    weights: Literal["none", "hessian", "fisher"] = "none"
    rounded: Literal["bfloat16", "float16"] | None = "bfloat16"
    codec: Literal["dense", "ans"] = "dense"

    @property
    def soft(self) -> bool:
        return True

    @property
    def wants(self) -> Stats:
        return WEIGHTS[self.weights]

    def __post_init__(self) -> None:
        check_weights(self.weights, "DKM")
        if not 1 <= self.bits <= 8:
            raise SchemeError(f"DKM: bits must be 1 to 8, got {self.bits!r}")
        if not all(tau is None or tau > 0 for tau in (self.tau, self.tau_end)):
            raise SchemeError(
                f"DKM: tau must be positive, got {self.tau!r} and {self.tau_end!r}; towards 0 the nearest centroid is "
                "taken"
            )
        if self.iterations < 1:
            raise SchemeError(f"DKM: expected at least 1 iteration a step, got {self.iterations!r}")
        if self.rounded not in _HALVES:
            raise SchemeError(f"DKM: rounded must be 'bfloat16', 'float16' or None, got {self.rounded!r}")

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return codebook_bits(shape, self.bits, self.dimension, self.rows) + (16 * shape[0] if self.row_scale else 0)

    def __call__(self, site: Site) -> Weight:
        book = Codebook(
            (site.W.shape[0], site.W.shape[1]),
            bits=self.bits,
            dimension=self.dimension,
            rows_per_table=self.rows,
            row_scale=self.row_scale,
            codec=self.codec,
        )
        if site.W.numel() // (self.dimension * len(book.tables())) < 2**self.bits:
            raise SchemeError(
                f"{site.name}: {2**self.bits} centroids for {site.W.numel() // len(book.tables())} weights a table; "
                "use fewer bits"
            )
        f, clustered, scale = table_weights(site, self.weights, "DKM"), site, None
        if self.row_scale:
            scale = _row_scale(site)
            f, clustered = scale.square() if f is None else f * scale.square(), site.having(W=site.W.float() / scale)
        tables = fit_tables(clustered, book, f, _LLOYD)
        book.to(site.W.device).set_tables(with_zero(tables) if self.zero else tables, scale)
        book.right_inverse(site.W)
        return book

    def relax(self, weight: Weight, W: Tensor) -> Relaxation:
        first = 4.0 ** (1 - self.bits / self.dimension) if self.tau is None else self.tau
        how = Softness(
            first,
            first * _COOLS if self.tau_end is None else self.tau_end,
            self.iterations,
            self.zero,
            _HALVES[self.rounded],
        )
        return SoftClusters(weight, how, _variance(weight, W.detach().float()) * self.dimension)


def _row_scale(site: Site) -> Tensor:
    """The root mean square of every row [out, 1]; 1 for a row of zeros."""
    scale = site.W.float().square().mean(1, keepdim=True).sqrt()
    return torch.where(scale > 0, scale, 1.0).bfloat16().float()


def _variance(weight: Weight, W: Tensor) -> float:
    """The variance of what is clustered: the survivors of a mask, rows divided by their scales."""
    if isinstance(weight, Codebook) and weight.row_scale is not None:
        W = W / weight.row_scale.forward().detach().t()
    kept = W[weight.mask] if isinstance(weight, Sparse) else W
    return float(kept.double().var(correction=0)) if kept.numel() else 0.0
