"""One threshold over the channels of a network: rows that belong together are scored together, and cut together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.cast import Cast
from laconic.methods.cut import Cut
from laconic.model.sites import Site
from laconic.solvers.scores import finish, gather, lowest, relative, terms

Kind = Literal["neuron", "filter"]
"""A channel with a row in a convolution is a filter, any other a neuron."""


@dataclass(frozen=True)
class _Rows:
    """What is kept of a site: its rows' joined terms [out], channels [out], entries per row, and whether its rows are
    filters.
    """

    totals: Tensor
    channels: Tensor
    columns: int
    filters: bool


class Channels(Allocation):
    """Cuts the channels that score lowest, so many that `sparsity` of the entries of all channels of the `kinds` are
    gone.

    A channel is all rows with one number in `Site.channels`, over all sites; a layer is all channels that have rows in
    the same sites. Resolves to `Cut` for sites that lose rows and to a float32 `Cast` for the others.
    """

    def __init__(
        self, method: Method, kinds: tuple[Kind, ...], sparsity: float, criterion: str, scale: str, align: int
    ) -> None:
        self.method, self.kinds, self.sparsity, self.criterion, self.scale, self.align = (
            method,
            kinds,
            sparsity,
            criterion,
            scale,
            align,
        )
        self.wants = method.wants
        self.seen: dict[str, _Rows | None] = {}

    def observe(self, site: Site) -> None:
        self.seen[site.name] = None
        if site.role == "embedding":  # its rows are words
            return
        filters = is_convolution(site) if site.dims else "neuron" not in self.kinds
        if site.channels is None:
            if ("filter" if filters else "neuron") in self.kinds:
                raise SchemeError(
                    f"{site.name}: {self.method!r} has to know which rows are one channel; {MODULES_ONLY}"
                )
            return
        joined = gather(self.criterion)(terms(site, self.criterion), 1)
        self.seen[site.name] = _Rows(joined.cpu().double(), site.channels.cpu(), site.W.shape[1], filters)

    def resolve(self) -> dict[str, Method]:
        sites = [rows for rows in self.seen.values() if rows is not None]
        ids = torch.cat([rows.channels for rows in sites]) if sites else torch.zeros(0, dtype=torch.int64)
        known, index = ids.unique(return_inverse=True)
        cut = torch.zeros(len(known), dtype=torch.bool)
        wanted = self._of_kind(sites, known, index) & (known >= 0)
        if not wanted.any():
            raise SchemeError(f"{self.method!r}: no {' or '.join(self.kinds)} of these layers may be cut")
        totals, sizes = self._joined(sites, len(known), index)
        scores, layers = finish(totals, sizes, self.criterion), _layers(sites, len(known), index)
        for layer in layers[wanted].unique() if self.scale == "layer" else ():
            here = wanted & (layers == layer)
            scores[here] = relative(scores[here], self.scale)
        cut[wanted] = lowest_aligned(scores[wanted], sizes[wanted], layers[wanted], self.sparsity, self.align)
        gone = iter(cut[index].split([len(rows.channels) for rows in sites]))
        methods: dict[str, Method] = {}
        for name, rows in self.seen.items():
            lost = next(gone).nonzero().flatten().tolist() if rows is not None else []
            methods[name] = Cut(rows=tuple(lost)) if lost else Cast("float32")
        return methods

    def _of_kind(self, sites: list[_Rows], known: Tensor, index: Tensor) -> Tensor:
        filters = torch.zeros(len(known), dtype=torch.bool)
        if sites:
            filters[
                index[torch.cat([torch.full_like(rows.channels, rows.filters, dtype=torch.bool) for rows in sites])]
            ] = True
        return (filters & ("filter" in self.kinds)) | (~filters & ("neuron" in self.kinds))

    def _joined(self, sites: list[_Rows], count: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Joined terms and entries of every channel."""
        how = "amax" if self.criterion == "linf" else "sum"
        zeros, columns = (
            torch.zeros(count, dtype=torch.float64),
            torch.cat([torch.full_like(rows.totals, rows.columns) for rows in sites]),
        )
        return zeros.scatter_reduce(0, index, torch.cat([rows.totals for rows in sites]), how), zeros.scatter_reduce(
            0, index, columns, "sum"
        )


MODULES_ONLY = "structures need a module in memory with an example input (lc.search, lc.recover)"


def is_convolution(site: Site) -> bool:
    """Whether a row of W is a filter: W [out, in x kernel] of a parameter [out, in, ...]; packed experts [experts, ...]
    have more rows.
    """
    return len(site.dims) > 2 and site.dims[0] == site.W.shape[0]


def _layers(sites: list[_Rows], count: int, index: Tensor) -> Tensor:
    """The layer of every channel: channels with rows in exactly the same sites share one, so every site keeps some rows
    of its own.
    """
    layer, fresh = torch.zeros(count, dtype=torch.int64), 1
    for here in index.split([len(rows.channels) for rows in sites]):
        members = here.unique()
        _, parts = layer[members].unique(return_inverse=True)  # what has been together so far, and is again
        layer[members] = fresh + parts
        fresh += int(parts.max()) + 1
    return layer


def lowest_aligned(scores: Tensor, sizes: Tensor, layers: Tensor, sparsity: float, align: int) -> Tensor:
    """Which structures [n] are cut, so that what stays of every layer is a multiple of `align` (or the layer whole), at
    least `align`.

    Of each layer, structures in ascending order are joined to steps that lead from one such number to the next; a step
    scores as its last structure, for only below a threshold above it would all of it go. Then the lowest steps are cut
    whose entries come nearest to the share.
    """
    order = scores.argsort(stable=True)
    order = order[layers[order].argsort(stable=True)]  # by layer, ascending within it
    _, number, count = layers[order].unique_consecutive(return_inverse=True, return_counts=True)
    size = count[number]
    rank = torch.arange(len(order)) - (count.cumsum(0) - count)[number]
    first = torch.where(size % align == 0, align, size % align)  # structures of a layer's first step
    step = torch.where(rank < first, 0, 1 + (rank - first).div(align, rounding_mode="floor"))
    free = rank < size - align
    _, chunk = (number * (len(order) + 1) + step)[free].unique(return_inverse=True)  # in order of layer and step
    steps = int(chunk.max()) + 1 if len(chunk) else 0
    chosen = order[free]
    score = torch.zeros(steps, dtype=scores.dtype).scatter_reduce(0, chunk, scores[chosen], "amax", include_self=False)
    entries = torch.zeros(steps, dtype=sizes.dtype).scatter_reduce(0, chunk, sizes[chosen], "sum")
    cut = torch.zeros(len(scores), dtype=torch.bool)
    if steps:
        cut[chosen] = lowest(score, entries, sparsity * float(sizes.sum()))[chunk]
    return cut
