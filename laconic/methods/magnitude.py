"""Magnitude pruning, with one threshold per layer or one over all layers."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.patterned import Patterned, sparse
from laconic.methods.threshold import Threshold
from laconic.model.sites import Site, Stats
from laconic.solvers.scores import (
    Criterion,
    Scale,
    block_scores,
    check_criterion,
    gradients_for,
    lowest,
    relative,
    terms,
)
from laconic.weights import Weight
from laconic.weights.masks import blocks_of, check_pattern, choose, n_of_m


@dataclass(frozen=True, repr=False)
class Magnitude(Patterned):
    """Sets the weights that matter least to zero: the share `sparsity` of them, n:m groups, or whole blocks; needs no
    data by default.

    `scope="layer"`: each matrix loses that share. `scope="model"`: one threshold over all matrices, so each loses what
    lies below it. `criterion`: "l1", "l2", "linf" and "mean" are |w| for single weights and differ for blocks; "taylor"
    and "hessian" weigh by gradients. `scale="layer"` divides a matrix's scores by their root mean square, so that
    layers compete on equal terms. Survivors keep bfloat16 values; encode them with `>>`, as in
    `Magnitude(0.5) >> KMeans(bits=4)`.
    Bits: 16 x density + the mask. Raises: SchemeError when the pattern does not tile the matrix.
    Source: Han et al. 2015; the single threshold is Condensa section 3.1's. Cost: one sort of the matrix.
    """

    scope: Literal["layer", "model"] = "layer"
    criterion: Criterion = "l2"
    scale: Scale = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self, self.scope)
        check_criterion(type(self).__name__, self.criterion, self.scale)
        if self.scope == "model" and n_of_m(self.pattern):
            raise SchemeError(
                f"Magnitude: pattern {self.pattern!r} says how much every group keeps, so one threshold needs "
                "scope='layer'"
            )

    @property
    def wants(self) -> Stats:
        return gradients_for(self.criterion)

    def units(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """The scores of single weights or blocks, and the entries of each."""
        shape = (site.W.shape[0], site.W.shape[1])
        check_pattern(self.pattern, shape)
        blocks = blocks_of(self.pattern, shape)
        scores = relative(block_scores(site, blocks, self.criterion).flatten(), self.scale)
        return scores, None if max(blocks.block) == 1 else blocks.sizes().flatten()

    def __call__(self, site: Site) -> Weight:
        weight = sparse(site, self.pattern, self.sparsity)
        if n_of_m(self.pattern):
            mask = choose(terms(site, self.criterion), self.pattern, self.sparsity)
        else:
            blocks = blocks_of(self.pattern, weight.shape)
            scores, sizes = self.units(site)
            cut = lowest(scores, sizes, self.sparsity * site.W.numel())
            mask = blocks.spread(~cut.view(blocks.grid), weight.shape)
        weight.set_mask(mask)
        weight.right_inverse(site.W.float())
        return weight

    def allocation(self) -> Allocation | None:
        return Threshold(self, self.sparsity, self.units) if self.scope == "model" else None


def check_scope(method: Method, scope: str) -> None:
    """Raises SchemeError unless the scope is known."""
    if scope not in ("layer", "model"):
        raise SchemeError(f"{type(method).__name__}: scope must be 'layer' or 'model', got {scope!r}")
