"""What a weight changes in the outputs of its layer, as a share of them."""

import math

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.model.sites import Site
from laconic.weights import Weight

_ROWS, _PARTS = 512, 8  # rows looked at, and the runs of neighbouring rows they come in


def output_error(site: Site, weight: Weight) -> float:
    """The relative squared output error tr(E H E^T) / tr(W H W^T), E = W - W_hat; with H = I when the site has no
    Hessian.

    W and W_hat [out, in], H [groups, in, in] or its diagonal [groups, in]. An output bias b [out] counts where the mean
    input m [groups, in] is known: E |E x - b|^2 = tr(E H E^T) - 2 b^T E m + |b|^2. Taken over at most 512 evenly spaced
    rows per group, so that reporting it costs little beside finding the weight.
    Raises: SchemeError when it is not finite, which no figure may be.
    """
    rows = site.W.shape[0] // site.groups
    stride, taken = max(1, rows // _PARTS), max(1, min(_ROWS // _PARTS, rows // _PARTS))
    metrics = site.hessian if site.hessian is not None else site.squares
    bias = weight.output_bias() if site.centre is not None and site.hessian is not None else None
    left = total = 0.0
    for g in range(site.groups):
        metric = None if metrics is None else metrics[g]
        last = (g + 1) * rows
        for start in range(g * rows, last, stride):
            stop = min(start + taken, last)
            W = site.W[start:stop].float()
            E = W - weight.rows(start, stop).to(W)
            left += energy(E, metric)
            if bias is not None and site.centre is not None:
                b = bias[start:stop].to(W)
                left += (b * (b - 2 * (E @ site.centre[g].to(W)))).sum(dtype=torch.float64).item()
            total += energy(W, metric)
    if not math.isfinite(left) or not math.isfinite(total):
        raise SchemeError(
            f"{site.name}: its output error is not finite ({left} of {total}): the statistics or the decoded values "
            "are not"
        )
    return max(left, 0.0) / total if total > 0 else 0.0


def energy(E: Tensor, metric: Tensor | None) -> float:
    """tr(E H E^T) for E [rows, in] and H [in, in], its diagonal [in], or None for the identity; products in float32,
    the sum in float64.
    """
    if metric is None:
        return E.square().sum(dtype=torch.float64).item()
    image = E @ metric if metric.dim() == 2 else E * metric
    return (image * E).sum(dtype=torch.float64).item()
