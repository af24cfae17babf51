"""How much a structure of weights matters: criteria over its entries, and the lowest scores that make up a share of all
entries.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.model.sites import NONE, Site, Stats
from laconic.weights.blocks import Blocks

Criterion = Literal["l1", "l2", "linf", "mean", "taylor", "hessian"]
"""Over the entries w of a structure, with F = E[(dL/dw)^2]: sum |w|, sqrt(sum w^2), max |w|, mean |w|, sum |w| sqrt(F)
(first-order Taylor: |w dL/dw| with the root mean square of the gradient), sum w^2 F / 2 (second order, the Fisher
information for the Hessian's diagonal).
Sources: Condensa Table 1 (criteria); Molchanov et al. 2017, eq. 8 (Taylor); LeCun et al. 1990, eq. 5
(optimal brain damage).
"""
Scale = Literal["none", "layer"]
"""Whether scores are compared as they are, or divided by their root mean square over a layer's structures."""
CRITERIA = ("l1", "l2", "linf", "mean", "taylor", "hessian")
SCALES = ("none", "layer")


def check_criterion(method: str, criterion: str, scale: str) -> None:
    """Raises SchemeError, which begins with the method's name, unless both are known."""
    if criterion not in CRITERIA:
        raise SchemeError(f"{method}: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if scale not in SCALES:
        raise SchemeError(f"{method}: scale must be 'none' or 'layer', got {scale!r}")


def gradients_for(criterion: str) -> Stats:
    """The statistics a criterion reads."""
    return Stats.FISHER if criterion in ("taylor", "hessian") else NONE


def terms(site: Site, criterion: str) -> Tensor:
    """What every entry adds to (or offers for) its structure's score, [out, in], none below zero. Raises: SchemeError
    without gradients.
    """
    W = site.W.float()
    if criterion not in ("taylor", "hessian"):
        return W.square() if criterion == "l2" else W.abs()
    if site.fisher is None:
        raise SchemeError(f"{site.name}: the criterion {criterion!r} needs gradients; no gradient reached this weight")
    F = site.fisher.to(W)
    return W.abs() * F.sqrt() if criterion == "taylor" else W.square() * F / 2


def gather(criterion: str) -> Callable[[Tensor, int], Tensor]:
    """How terms are joined along a dimension."""
    return torch.amax if criterion == "linf" else torch.sum


def finish(totals: Tensor, sizes: Tensor, criterion: str) -> Tensor:
    """The scores [n], from joined terms [n] and the number of entries [n] that they come from."""
    if criterion == "l2":
        return totals.sqrt()
    return totals / sizes if criterion == "mean" else totals


def block_scores(site: Site, blocks: Blocks, criterion: str) -> Tensor:
    """The score of every block [grid]; of single entries without the detour of squaring, which tiny ones do not
    survive.
    """
    if max(blocks.block) == 1:
        return terms(site, "l1" if criterion == "l2" else criterion).reshape(blocks.grid)
    totals = blocks.reduce(terms(site, criterion), gather(criterion))
    return finish(totals, blocks.sizes().to(totals), criterion)


def relative(scores: Tensor, scale: str) -> Tensor:
    """The scores [n] of one layer, divided by their root mean square for `scale="layer"`."""
    size = float(scores.double().square().mean().sqrt()) if scale == "layer" and scores.numel() else 0.0
    return scores / size if size > 0 else scores


def lowest(scores: Tensor, sizes: Tensor | None, target: float) -> Tensor:
    """Which structures [n] are cut: those of the lowest scores, as many as bring their entries nearest to `target`.
    Ties: first come.

    `sizes`: the entries of each, None for single ones.
    """
    order = scores.argsort(stable=True)
    size = 1 if sizes is None else int(sizes[0])
    if sizes is None or bool((sizes == size).all()):
        count = round(target / size)
    else:
        sizes = sizes.to(scores.device)
        total = torch.cat([torch.zeros(1, dtype=torch.float64), sizes[order].double().cumsum(0).cpu()])
        count = int((total - target).abs().argmin())
    cut = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    cut[order[:count]] = True
    return cut
