"""What a run tells of itself: the plan and its costs before the work, the record of every site that is compressed."""

from dataclasses import dataclass, field
from typing import Any

from laconic.host.record import Record


@dataclass(frozen=True)
class SiteRecord(Record):
    """A compressed site and its weight, as the parts of a run and its report hold it.

    `shape` [out, in]; `bits` of the stored tensors; `error`, the relative squared error of the site's outputs on its
    calibration inputs, `weight_error`, that of its values; `checksum`, the CRC-32 of the decoded matrix; `seconds`, the
    site's share of the time that finding it took. Only where they say something: `expert_tokens` per packed expert,
    `unmeasured` (the share of its entries), how its inputs are rounded (`input_bits`, or `inputs` as `Inputs.to_spec`
    has it), and `original_bytes`, which whoever reads the source adds.
    """

    OPTIONAL = frozenset({"expert_tokens", "unmeasured", "input_bits", "inputs", "original_bytes"})

    name: str
    aliases: list[str]
    parameter: str
    shape: list[int]
    role: str
    method: str
    kind: str
    bits: int
    bits_per_weight: float
    error: float
    weight_error: float
    checksum: int
    notes: list[str] = field(default_factory=list)
    expert_tokens: list[int] | None = None
    unmeasured: float | None = None
    input_bits: int | None = None
    inputs: dict[str, Any] | None = None
    seconds: float = 0.0
    original_bytes: int | None = None

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Cost(Record):
    """A stage's peak memory beyond what the process takes before, in bytes, and its time in seconds."""

    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PlannedSite(Record):
    """What the plan comes to for one site; `bytes` and `bits_per_weight` are those expected of its weight, or the
    tensor's own where it stays."""

    name: str
    aliases: list[str]
    shape: list[int]
    method: str
    role: str
    bits_per_weight: float
    bytes: float
    original_bytes: float
    kept: bool
    reason: str


@dataclass(frozen=True)
class Preflight(Record):
    """The plan as numbers: bytes of the weights, peak memory in bytes, seconds; `stages`: memory and seconds of
    each."""

    sites: list[PlannedSite]
    bytes: int
    original_bytes: int
    peak_memory: int
    seconds: float
    stages: dict[str, Cost]
    notes: list[str] = field(default_factory=list)
    coverage: dict[str, Any] = field(default_factory=dict)
