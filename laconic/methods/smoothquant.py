"""SmoothQuant: the size of large inputs moved into the weights, so that both can be rounded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.methods.ranges import Range, calibrated, form_of, needs_of
from laconic.model.sites import Site, Stats
from laconic.solvers.scaling import scaled
from laconic.weights import Inputs, Uniform, Weight
from laconic.weights.inputs import Granularity, check_bits
from laconic.weights.uniform import Group, uniform_bits


@dataclass(frozen=True, repr=False)
class SmoothQuant(Method):
    """Rounds W diag(s) to a symmetric grid and, when the model runs, the inputs x / s: s takes the outliers out of the
    inputs.

    W x = (W diag(s)) (diag(s)^-1 x), s_j = (max |X_j|)^alpha / (max |W_j|)^(1 - alpha), the maxima over the calibration
    inputs and over the rows of all sites that read them. `activations`: the bits inputs are rounded to, symmetrically,
    None to leave them as they are; by a step per token (the paper's O1) or per tensor (O2), which `range` makes a
    stored one (O3): "minmax" of the calibration inputs, or "mse". Nothing is folded into the layer before: 1 / s is
    stored with each weight. Bits: bits per weight + 16 per row (or group) and column.
    Raises: SchemeError when the group does not divide the columns. Source: Xiao et al. 2022, eq. 3-4 and table 2. Cost:
    O(entries).
    """

    bits: int = 8
    activations: int | None = 8
    alpha: float = 0.5
    group: Group = "channel"
    codec: Literal["dense", "ans"] = "dense"
    granularity: Granularity = "token"
    range: Range = "dynamic"

    needs = Stats.MAX

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SchemeError(
                f"SmoothQuant: alpha is a share from 0 (all in the inputs) to 1 (all in the weights), got {self.alpha}"
            )
        if self.activations is not None:
            check_bits(self.activations, "SmoothQuant: activations")
            form_of("SmoothQuant", self.activations, self.granularity, True, self.range)
        elif (self.granularity, self.range) != ("token", "dynamic"):
            raise SchemeError(
                "SmoothQuant: activations=None leaves inputs as they are: granularity and range say nothing"
            )

    @property
    def joint(self) -> bool:
        return True

    @property
    def rounds(self) -> Inputs | None:
        return Inputs(self.activations, self.granularity) if self.activations is not None else None

    @property
    def wants(self) -> Stats:
        return self.needs | needs_of(self.range)

    @property
    def scales_columns(self) -> bool:
        return True

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return uniform_bits(shape, self.bits, self.group, symmetric=True) + 16 * shape[1]

    def __call__(self, site: Site) -> Weight:
        return self.together([site])[0]

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        s = self._scale(sites)
        return [self._rounded(site, s) for site in sites]

    def _scale(self, sites: Sequence[Site]) -> Tensor:
        """s [in], 1 for a column that no input or no weight uses: it has nothing to be balanced."""
        for site in sites:
            if site.peak is None:
                raise SchemeError(f"{site.name}: SmoothQuant needs the largest magnitude of the inputs")
        inputs = torch.stack([site.peak.amax(0) for site in sites if site.peak is not None]).amax(0)
        weights = torch.stack([site.W.abs().amax(0).float() for site in sites]).amax(0)
        s = inputs**self.alpha / weights ** (1 - self.alpha)
        return torch.where((s > 0) & s.isfinite(), s, 1.0)

    def _rounded(self, site: Site, s: Tensor) -> Weight:
        grid = Uniform(
            (site.W.shape[0], site.W.shape[1]), bits=self.bits, group=self.group, symmetric=True, codec=self.codec
        )
        weight = scaled(grid, s)
        weight.fit(site.W)
        weight.right_inverse(site.W)
        if self.rounds is not None:
            weight.inputs = calibrated(self.rounds, self.range, site, weight)
        return weight
