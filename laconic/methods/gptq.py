"""GPTQ: rounding with error feedback, onto a grid of fixed width or, entropy-coded, at any real rate."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.rate import WaterFilling, check_rate, fixed_width, is_small, solve_rate
from laconic.model.sites import Site, Stats
from laconic.solvers.column import Sweep, solve
from laconic.weights import Uniform, Weight
from laconic.weights.uniform import Group, uniform_bits


@dataclass(frozen=True, repr=False)
class GPTQ(Method):
    """Rounds column after column, each time moving the columns still to come so that they make up for the error so far.

    Minimises tr((W - W_hat) H (W - W_hat)^T), H = X^T X / n, by the sweep of `solvers.column`. With `bits` (default 4):
    grids per `group`, (16 + bits) / group bits per weight on top. With `rate` (bits per weight, any real number): one
    unbounded uniform grid per matrix, entropy-coded, its step found so that the STORED bytes meet the rate, for each
    matrix (`over="matrix"`) or on average over all of them with one slope (`over="model"`: reverse water-filling under
    the Hessian and the sensitivity of the loss to each output, which costs one backward pass; matrices so small that
    side information would take half of their bits have 8 bits each then). Decoding costs one ANS pass, 60-75 million
    weights per second and core; see `docs/methods/gptq.md`.

    Differs from the public code: grids of groups are fitted to the live weights also where the group is smaller than
    the block; columns that no calibration input used are rounded, not zeroed; with act_order groups are always static,
    so no index per column is stored.
    Raises: SchemeError when the group does not divide the columns, or the rate cannot be met. Source: Frantar et al.
    2022, algorithm 1.
    Cost: n^3 / 3 + rows n^2 operations.
    """

    bits: int | None = None
    group: Group = 64
    symmetric: bool = False
    clip: Literal["minmax", "mse"] = "mse"
    act_order: bool = True
    damping: float = 0.01
    rate: float | None = None
    over: Literal["model", "matrix"] = "model"

    needs = Stats.HESSIAN

    def __post_init__(self) -> None:
        if self.rate is not None and self.bits is not None:
            raise SchemeError(
                f"GPTQ: give bits (a fixed width) or rate (entropy-coded), not both; got bits={self.bits}, "
                f"rate={self.rate}"
            )
        if self.rate is not None and not 0 < self.rate <= 16:
            raise SchemeError(f"GPTQ: rate is in bits per weight, above 0 and up to 16, got {self.rate}")
        if self.over not in ("model", "matrix"):
            raise SchemeError(f"GPTQ: over must be 'model' or 'matrix', got {self.over!r}")
        if self.damping <= 0:
            raise SchemeError(f"GPTQ: damping must be positive, got {self.damping}")

    @property
    def sweep(self) -> Sweep:
        return Sweep(self.act_order, self.damping)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        if self.rate is not None and self.over == "model" and is_small(shape, self.rate):
            return fixed_width(self, shape).expected_bits(shape)
        if self.rate is not None:
            check_rate(shape, self.rate)
            return self.rate * shape[0] * shape[1]
        return uniform_bits(shape, self.bits or 4, self.group, symmetric=self.symmetric)

    def __call__(self, site: Site) -> Weight:
        if self.rate is not None:
            return solve_rate(site, self.rate, self.sweep)
        weight = Uniform(
            (site.W.shape[0], site.W.shape[1]), bits=self.bits or 4, group=self.group, symmetric=self.symmetric
        )
        weight.to(site.W.device)

        def fit(w: Tensor, j: int, importance: Tensor) -> None:
            weight.fit(w, j, importance, clip=self.clip)

        solve(weight, site, self.sweep, fit)
        return weight

    def allocation(self) -> Allocation | None:
        return WaterFilling(self, self.rate, self.sweep) if self.rate is not None and self.over == "model" else None
