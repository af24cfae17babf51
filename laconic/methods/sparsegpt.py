"""SparseGPT: pruning with error feedback."""

from dataclasses import dataclass

from laconic.methods.patterned import Patterned, sparse
from laconic.model.sites import Site, Stats
from laconic.solvers.column import Sweep, solve
from laconic.weights import Weight


@dataclass(frozen=True, repr=False)
class SparseGPT(Patterned):
    """Prunes column after column, the weights still to come making up for what was lost.

    The mask of every 128 columns (or of every n:m group, or block) is chosen when the sweep reaches them, by w^2 /
    [H^-1]_jj of the live values (L_jj^2 w^2 in `solvers.column`), across all rows. Survivors are updated and keep
    bfloat16 values; encode them with `>>`, which feeds the rounding error forward too. Bits: 16 x density + the mask.
    Raises: SchemeError when the pattern does not tile the matrix.
    Source: Frantar & Alistarh 2023, algorithm 1. Cost: that of GPTQ.
    """

    damping: float = 0.01

    needs = Stats.HESSIAN

    def __call__(self, site: Site) -> Weight:
        weight = sparse(site, self.pattern, self.sparsity)
        solve(weight, site, Sweep(act_order=False, damping=self.damping), weight.fit)
        return weight
