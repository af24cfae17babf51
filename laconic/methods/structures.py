"""Pruning of neurons and filters: whole channels of a network, chosen by one threshold over all of them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Pruning
from laconic.methods.channels import Channels, Kind
from laconic.methods.patterned import check_sparsity
from laconic.model.sites import Site, Stats
from laconic.solvers.scores import Criterion, Scale, check_criterion, gradients_for
from laconic.weights import Weight
from laconic.weights.codes import dense_bytes


@dataclass(frozen=True, repr=False)
class Structures(Pruning):
    """Zeroes the share `sparsity` of the entries of the channels it is for, in whole channels: those that score below
    one threshold.
    """

    sparsity: float = 0.5
    criterion: Criterion = "l2"
    scale: Scale = "none"
    align: int = 1

    needs = Stats.CHANNELS
    kept: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_sparsity(self, self.sparsity)
        check_criterion(type(self).__name__, self.criterion, self.scale)
        if type(self.align) is not int or self.align < 1:
            raise SchemeError(f"{type(self).__name__}: align is a number of structures from 1, got {self.align!r}")

    @property
    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """What it is for."""

    @property
    def wants(self) -> Stats:
        return self.needs | gradients_for(self.criterion)

    def survivors(self, shape: tuple[int, int]) -> float:
        return 1 - self.sparsity

    def mask_bits(self, shape: tuple[int, int]) -> float:
        return 8 * dense_bytes(shape[0], 1)

    def __call__(self, site: Site) -> Weight:
        """The site as if it were the whole network."""
        alone = self.allocation()
        alone.observe(site)
        return alone.resolve()[site.name](site)

    def allocation(self) -> Allocation:
        return Channels(
            self, self.kinds, sparsity=self.sparsity, criterion=self.criterion, scale=self.scale, align=self.align
        )


@dataclass(frozen=True, repr=False)
class NeuronPrune(Structures):
    """Removes neurons: rows of linear layers (1-D blocks), with the rows of all layers that are one channel with them.

    One threshold over the network: of the channels that may be cut, those of the lowest scores go, so many that
    `sparsity` of their entries do. A channel's score joins the entries of all its rows by `criterion`; `scale="layer"`
    divides by the root mean square over its layer (the channels that lie in the same matrices). What stays of a layer
    is rounded up to a multiple of `align`, at least `align` channels. Convolutions, embeddings and rows that may not be
    cut (the network's outputs) stay as they are, in float32; so do the survivors, until `>>` encodes them. Bits: 32 x
    density + one per row. Raises: SchemeError when nothing of the kind can be cut.
    Source: Condensa section 3.1 and Table 1 (NeuronPrune). Cost: O(entries), and a sort of the channels.
    """

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("neuron",)


@dataclass(frozen=True, repr=False)
class FilterPrune(Structures):
    """Removes filters: rows of convolutions (3-D blocks [in, height, width]), with the rows of all layers that are one
    channel with them.

    The threshold, `criterion`, `scale` and `align` are those of `NeuronPrune`. Filters whose outputs are added up
    (residual connections), those of a depthwise convolution and of the layer before it, and a gate that multiplies them
    are cut together. Linear layers and embeddings stay as they are, in float32. Bits: 32 x density + one per row.
    Raises: SchemeError when no filter can be cut. Source: Condensa section 3.1 and Table 1 (FilterPrune). Cost: that of
    `NeuronPrune`.
    """

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("filter",)


@dataclass(frozen=True, repr=False)
class StructurePrune(Structures):
    """Removes neurons and filters, under one threshold for both.

    The threshold, `criterion`, `scale` and `align` are those of `NeuronPrune`. Bits: 32 x density + one per row.
    Raises: SchemeError when nothing can be cut. Source: Condensa section 3.1 and Table 1 (StructurePrune). Cost: that
    of `NeuronPrune`.
    """

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("neuron", "filter")
