"""One threshold over the network: each matrix loses what scores below it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.model.sites import Site
from laconic.solvers.scores import lowest

_EXACT = 1 << 26  # entries whose scores are kept (256 MB); beyond, histograms
_BINS = 1 << 16  # of a float32's upper bits: 256 per octave, so that every bfloat16 value has a bin of its own

Units = Callable[[Site], tuple[Tensor, Tensor | None]]
"""The scores of a site's structures [n], and how many entries each has (None for single entries)."""


class Threshold(Allocation):
    """The share of each matrix that lies below one threshold on the scores of all structures, chosen so that `sparsity`
    of all entries go.

    Every matrix gets the method with `scope="layer"` and its own exact share, so the entries cut are the lowest of the
    whole network (ties: sites in order). With more than 67 million single entries the scores are kept as histograms,
    256 bins an octave: the count stays exact, but the entries in the threshold's own bin are taken from the sites in
    proportion. Cost: a selection over all scores.
    """

    def __init__(self, method: Method, sparsity: float, units: Units) -> None:
        self.method, self.sparsity, self.units = method, sparsity, units
        self.wants = method.wants
        self.scores: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor | None] = {}
        self.coarse = False

    def observe(self, site: Site) -> None:
        scores, sizes = self.units(site)
        scores, self.sizes[site.name] = scores.float().cpu(), sizes
        self.scores[site.name] = _histogram(scores) if self.coarse else scores
        if (
            not self.coarse
            and all(s is None for s in self.sizes.values())
            and sum(s.numel() for s in self.scores.values()) > _EXACT
        ):
            self.coarse = True
            self.scores = {name: _histogram(kept) for name, kept in self.scores.items()}

    def resolve(self) -> dict[str, Method]:
        if self.coarse:
            cut, entries = _from_histograms(list(self.scores.values()), self.sparsity)
        elif all(sizes is None for sizes in self.sizes.values()):
            cut, entries = _from_entries(list(self.scores.values()), self.sparsity)
        else:
            cut, entries = _from_blocks(
                list(self.scores.values()), [s for s in self.sizes.values() if s is not None], self.sparsity
            )
        changed: Any = self.method
        shares = {name: min(gone / n, 1 - 1e-9) for name, gone, n in zip(self.scores, cut, entries, strict=True)}
        return {name: replace(changed, sparsity=share, scope="layer") for name, share in shares.items()}


def _from_entries(scores: list[Tensor], sparsity: float) -> tuple[list[int], list[int]]:
    """How many single entries each site loses, and has."""
    entries = [len(s) for s in scores]
    target = round(sparsity * sum(entries))
    if target == 0:
        return [0] * len(scores), entries
    threshold = torch.cat(scores).kthvalue(target).values
    cut = [int((s < threshold).sum()) for s in scores]
    left = target - sum(cut)  # of those that are equal to the threshold
    for i, s in enumerate(scores):
        ties = min(left, int((s == threshold).sum()))
        cut[i], left = cut[i] + ties, left - ties
    return cut, entries


def _from_blocks(scores: list[Tensor], sizes: list[Tensor], sparsity: float) -> tuple[list[int], list[int]]:
    """How many entries each site loses with the blocks cut, and has."""
    every = torch.cat(sizes)
    cut = lowest(torch.cat(scores), every, sparsity * int(every.sum()))
    gone = (cut * every).split([len(s) for s in sizes])
    return [int(part.sum()) for part in gone], [int(part.sum()) for part in sizes]


def _histogram(scores: Tensor) -> Tensor:
    """Counts of non-negative float32 values by their upper bits, which are ordered as the values are."""
    counts = torch.zeros(_BINS, dtype=torch.int32)
    for part in scores.split(1 << 24):
        counts += torch.bincount(part.contiguous().view(torch.int32) >> 15, minlength=_BINS).int()
    return counts


def _from_histograms(counts: list[Tensor], sparsity: float) -> tuple[list[int], list[int]]:
    entries = [int(c.sum()) for c in counts]
    total = torch.stack(counts).sum(0)
    target, below = round(sparsity * sum(entries)), total.cumsum(0)
    bin_ = int(torch.searchsorted(below, target))
    cut = [int(c[:bin_].sum()) for c in counts]
    left, inside = target - sum(cut), max(int(total[bin_]), 1)
    seen = given = 0
    for i, c in enumerate(counts):  # rounded so that the parts of the bin add up to what is left
        seen += int(c[bin_])
        upto = left * seen // inside
        cut[i], given = cut[i] + upto - given, upto
    return cut, entries
