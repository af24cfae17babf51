"""Wanda: pruning by weights and activations."""

from dataclasses import dataclass

import torch

from laconic.errors import SchemeError
from laconic.methods.patterned import Patterned, sparse
from laconic.model.sites import Site, Stats
from laconic.weights import Weight
from laconic.weights.masks import choose


@dataclass(frozen=True, repr=False)
class Wanda(Patterned):
    """Sets weights with the smallest |w_rj| |x_j| to zero, compared within each row; the others stay as they are.

    `pattern`: "unstructured" (the share `sparsity` of every row), "n:m", or a block. Bits: 16 x density + the mask.
    Raises: SchemeError when the pattern does not tile the matrix. Source: Sun et al. 2024, eq. 1 and section 3. Cost:
    one sort of the rows.
    """

    needs = Stats.SQUARES

    def __call__(self, site: Site) -> Weight:
        if site.importance is None:
            raise SchemeError(f"{site.name}: Wanda needs the mean squares of the inputs")
        score = site.W.float().square() * site.importance
        weight = sparse(site, self.pattern, self.sparsity)
        if self.pattern == "unstructured":
            dropped = round(self.sparsity * score.shape[1])
            mask = torch.ones_like(score, dtype=torch.bool)
            mask.scatter_(1, score.argsort(dim=1, stable=True)[:, :dropped], False)
        else:
            mask = choose(score, self.pattern, self.sparsity)
        weight.set_mask(mask)
        weight.right_inverse(site.W.float())
        return weight
