"""K-means: the best table of values, exact for scalars."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import NONE, Site, Stats
from laconic.solvers.tables import fit_tables
from laconic.weights import Codebook, Weight
from laconic.weights.codebook import codebook_bits

WEIGHTS = {"none": NONE, "hessian": Stats.SQUARES, "fisher": Stats.FISHER}
"""What says how much an entry counts when a table is fitted."""


@dataclass(frozen=True, repr=False)
class KMeans(Method):
    """Shares 2**bits values (or vectors of `dimension` neighbours) per matrix, or per `rows` rows.

    Minimises sum_i f_i (w_i - c(w_i))^2. For scalars the table is the exact optimum, by dynamic programming over the
    sorted distinct 16-bit values with their summed weights f; for vectors it is k-means++ and Lloyd's iterations.
    `weights`: "none" (f = 1, no data), "hessian" (f = mean square of the input column) or "fisher" (f = E[(dL/dw)^2]
    per entry, which is SqueezeLLM's sensitivity).
    Bits: bits / dimension per weight + 16 x dimension x 2**bits per table.
    Source: Wang & Song 2011 (Ckmeans.1d.dp); Kim et al. 2024 (SqueezeLLM) eq. 4-5. Cost: 2**bits x distinct x
    log(distinct) per table.
    """

    bits: int = 4
    dimension: int = 1
    rows: int | None = None
    weights: Literal["none", "hessian", "fisher"] = "none"
    codec: Literal["dense", "ans"] = "dense"
    iterations: int = 25

    @property
    def wants(self) -> Stats:
        return WEIGHTS[self.weights]

    def __post_init__(self) -> None:
        check_weights(self.weights, "KMeans")

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return codebook_bits(shape, self.bits, self.dimension, self.rows)

    def __call__(self, site: Site) -> Weight:
        weight = Codebook(
            (site.W.shape[0], site.W.shape[1]),
            bits=self.bits,
            dimension=self.dimension,
            rows_per_table=self.rows,
            codec=self.codec,
        )
        weight.set_tables(fit_tables(site, weight, table_weights(site, self.weights, "KMeans"), self.iterations))
        weight.to(site.W.device).right_inverse(site.W)
        return weight


def check_weights(which: str, method: str) -> None:
    """Raises SchemeError for entries' weights that nobody knows."""
    if which not in WEIGHTS:
        raise SchemeError(f"{method}: weights must be 'none', 'hessian' or 'fisher', got {which!r}")


def table_weights(site: Site, which: str, method: str) -> Tensor | None:
    """How much every entry counts when a table is fitted: f [out or 1, in], None if all count alike. Raises:
    SchemeError without statistics.
    """
    f = {"none": None, "hessian": site.importance, "fisher": site.fisher}[which]
    if which != "none" and f is None:
        raise SchemeError(f"{site.name}: {method}(weights={which!r}) needs statistics this site has none of")
    return f
