"""Any method, and the inputs of its layer rounded while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.ranges import Range, calibrated, form_of, needs_of
from laconic.model.sites import Site, Stats
from laconic.weights import Inputs, Weight
from laconic.weights.inputs import Granularity
from laconic.weights.relax import Relaxation


@dataclass(frozen=True, repr=False)
class RoundInputs(Method):
    """Compresses W [out, in] by `method` and lets its layer round the inputs x to `bits` whenever it runs: y = W_hat
    Q(x).

    Q rounds to d (clamp(round(x / d) + z) - z). `granularity`: "token", a step d for every row of x, for linear layers;
    "tensor", one for the whole input, for convolutions too. `symmetric`: z = 0, else z is the code of 0. `range`, where
    d and z come from: "dynamic", every input itself; "minmax" or "mse", stored: the range of all calibration inputs, or
    the one within it that rounds a sample of them best.
    Bits: those of the method. Raises: SchemeError where `method` rounds inputs or cuts channels, and for a static range
    per token.
    Source: Jacob et al. 2018, section 2; Nagel et al. 2021, sections 2.2 and 3.1. Cost: the method's; "mse" 55 to 275
    passes over a sample.
    """

    method: Method
    bits: int = 8
    granularity: Granularity = "token"
    symmetric: bool = True
    range: Range = "dynamic"

    def __post_init__(self) -> None:
        form_of("RoundInputs", self.bits, self.granularity, self.symmetric, self.range)
        if self.method.rounds is not None:
            raise SchemeError(f"RoundInputs: {self.method!r} rounds inputs already")
        if self.method.wants & Stats.CHANNELS:
            raise SchemeError(f"RoundInputs: {self.method!r} cuts channels, which comes first: cut >> RoundInputs(...)")

    @property
    def wants(self) -> Stats:
        return self.method.wants | needs_of(self.range)

    @property
    def rounds(self) -> Inputs | None:
        return form_of("RoundInputs", self.bits, self.granularity, self.symmetric, self.range)

    @property
    def joint(self) -> bool:
        return self.method.joint

    @property
    def biased(self) -> bool:
        return self.method.biased

    @property
    def scales_columns(self) -> bool:
        return self.method.scales_columns

    @property
    def soft(self) -> bool:
        return self.method.soft

    def relax(self, weight: Weight, W: Tensor) -> Relaxation:
        return self.method.relax(weight, W)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return self.method.expected_bits(shape)

    def allocation(self) -> Allocation | None:
        inner = self.method.allocation()
        return _Around(self, inner) if inner is not None else None

    def __call__(self, site: Site) -> Weight:
        return self.together([site])[0]

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        weights = self.method.together(sites)
        form = form_of("RoundInputs", self.bits, self.granularity, self.symmetric, self.range)
        for site, weight in zip(sites, weights, strict=True):
            weight.inputs = calibrated(form, self.range, site, weight)
        return weights


@dataclass
class _Around(Allocation):
    """The inner method's allocation; what it resolves to rounds inputs as the whole does."""

    whole: RoundInputs
    inner: Allocation

    def __post_init__(self) -> None:
        self.wants = self.inner.wants

    def observe(self, site: Site) -> None:
        self.inner.observe(site)

    def resolve(self) -> dict[str, Method]:
        found: dict[str, Method] = {
            name: replace(self.whole, method=method) for name, method in self.inner.resolve().items()
        }
        self.notes = self.inner.notes
        return found
