"""Where a uniform grid lies: by the range of the values, or by least squared error."""

from typing import Literal

import torch
from torch import Tensor

Clip = Literal["minmax", "mse"]
# candidate ranges from 1 down to 0.2 of the full one; Gaussian groups of 64 need about 0.55 at 2 bits, 0.33 at 1 bit
_SHRINKS = 40
_SMALLEST = 1e-12  # scale of an all-zero group: anything positive that bfloat16 holds


def fit_grid(
    w: Tensor, bits: int, *, symmetric: bool, integer: bool, importance: Tensor | None = None, clip: Clip = "minmax"
) -> tuple[Tensor, Tensor]:
    """Scale and zero [rows, groups] for w [rows, groups, columns] on the integers -2**(bits-1) .. 2**(bits-1) - 1.

    "minmax" spans the range (0 included when `integer` zeros are asked for, so that 0 stays exact); "mse" shrinks that
    range by the factor with the least sum of importance x squared error. Cost: O(entries), x 40 for "mse".
    """
    if symmetric:
        high = w.abs().amax(-1)
        low = -high
    else:
        low, high = w.amin(-1), w.amax(-1)
        if integer:
            low, high = low.clamp(max=0), high.clamp(min=0)
    best = _grid(low, high, bits, symmetric, integer)
    if clip == "minmax":
        return best
    least = _error(w, *best, bits, symmetric, importance)
    for shrink in torch.linspace(1, 0.2, _SHRINKS)[1:].tolist():
        candidate = _grid(low * shrink, high * shrink, bits, symmetric, integer)
        error = _error(w, *candidate, bits, symmetric, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, candidate[0], best[0]), torch.where(better, candidate[1], best[1])
    return best


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool, integer: bool) -> tuple[Tensor, Tensor]:
    # from -2**(b-1) to 2**(b-1) - 1; the largest value rounds to the outermost level, half a step off at most
    if symmetric:
        scale = (high / max(2 ** (bits - 1) - 0.5, 0.5)).clamp(min=_SMALLEST)
        return _stored(scale), torch.zeros_like(scale)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_SMALLEST)
    # a nearly constant group far from 0 would need a zero of thousands of steps, which no shared second level can hold
    if not integer:
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) / 2 ** (bits + 1))
    scale = _stored(scale)  # so that the zero fits the stored scale
    zero = -low / scale - 2 ** (bits - 1)
    return scale, zero.round() if integer else zero


def _stored(scale: Tensor) -> Tensor:
    """The scale as bfloat16 holds it, rounded up: down, 2**-9 of it times 255 steps would cut half a step off an 8-bit
    range."""
    nearest = scale.bfloat16()
    up = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.to(scale.dtype) < scale, up, nearest).to(scale.dtype)


def _error(w: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool, importance: Tensor | None) -> Tensor:
    s = scale.unsqueeze(-1)
    z = zero.unsqueeze(-1) - 0.5 * float(symmetric and bits == 1)
    q = (w / s + z).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    squared = ((q - z) * s - w).square_()
    return (squared * importance).sum(-1) if importance is not None else squared.sum(-1)
