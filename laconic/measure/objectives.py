"""What a search can maximise or minimise: figures of a compressed model, counted or measured."""

import tempfile
from dataclasses import dataclass
from typing import Any

from torch import nn

from laconic.disk import store
from laconic.engine.saved import save
from laconic.errors import SearchError
from laconic.measure.candidate import Candidate, Objective
from laconic.measure.goals import Maximize, Minimize, at_least, within  # noqa: F401 - the documented place of all four
from laconic.measure.layers import count_macs, nonzeros
from laconic.measure.timing import resized, seconds_per_call, side_by_side, spread
from laconic.model.batches import Batch, examples_in
from laconic.scheme.expressions import nearest
from laconic.weights import installed


def stored_bytes(candidate: Candidate) -> float:
    """Bytes of the files the model is stored in: weights, scales, masks, manifest, headers. Cost: one save, if it is
    not stored yet."""
    if candidate.path is not None:
        return float(store.stored_bytes(candidate.path))
    with tempfile.TemporaryDirectory() as folder:
        return float(save(candidate.model, folder, **candidate.fields))


def nonzero_bytes(candidate: Candidate) -> float:
    """Bytes of the non-zero parameters, each at the width it is stored in; masks, indices and buffers do not count.

    A Weight counts as its `nonzero_bits` says: plain values that are not zero, what survives a mask, codes with their
    scales in full. Raises: SearchError when no parameter is left. Source: Condensa section 4, objective 1 ("the number
    of bytes consumed by the model's non-zero parameters"), its r_c.
    """
    return nonzero_bytes_of(candidate.model)


def nonzero_bytes_of(model: nn.Module) -> float:
    """`nonzero_bytes` of a module with or without installed Weights; every tie counts once."""
    weights = {id(weight): weight for weight in installed(model).values()}
    plain = [p for name, p in model.named_parameters() if ".parametrizations." not in f".{name}"]
    bits = sum(weight.nonzero_bits() for weight in weights.values())
    return bits / 8 + sum(nonzeros(p) * p.element_size() for p in plain)


def parameters(candidate: Candidate) -> float:
    """Parameters of the network that would run, zeros included; a tie counts once."""
    return float(sum(p.numel() for p in candidate.network.parameters()))


def macs(candidate: Candidate) -> float:
    """Multiply-accumulates per example with weights that are not zero, and those between activations; see
    `layers.count_macs`.

    Source: Condensa section 4.1, s_F. Cost: one call.
    """
    return sum(count_macs(candidate.network, candidate.example).values())


def flops(candidate: Candidate) -> float:
    """Floating-point operations per example: two per multiply-accumulate. Source: Condensa section 4, objective 2.
    Cost: one call."""
    return 2 * macs(candidate)


@dataclass(frozen=True)
class Latency:
    """Measured seconds per call of the network, the median of repeated calls after a warm-up.

    `batch` examples at a time (None: those of the candidate's example). `threads` of the processor (None: as many as
    are set). `channels_last` measures a copy in that memory format, `compile` one from torch.compile. Raises:
    SearchError where torch.compile has no compiler. Cost: (repeats + warmup) calls.
    """

    batch: int | None = None
    repeats: int = 20
    warmup: int = 3
    threads: int | None = None
    compile: bool = False
    channels_last: bool = False

    @property
    def __name__(self) -> str:
        return "latency"

    def seconds(self, candidate: Candidate) -> list[float]:
        """Every measurement, of which `spread` gives median and quartiles."""
        return seconds_per_call({"network": candidate.network}, self._example(candidate), **self._options())["network"]

    def relative(self, candidate: Candidate) -> float:
        """The measure as a multiple of the reference's: the median ratio of rounds that measure both, so that other
        work on the machine cancels.

        Cost: twice a measure.
        """
        networks = {"reference": candidate.reference, "network": candidate.network}
        return self._multiple(float(side_by_side(networks, self._example(candidate), **self._options())[1]["speedup"]))

    def _multiple(self, speedup: float) -> float:
        return 1 / speedup

    def _options(self) -> dict[str, Any]:
        """How networks are timed, as `seconds_per_call` takes it."""
        return {name: getattr(self, name) for name in ("repeats", "warmup", "threads", "compile", "channels_last")}

    def _example(self, candidate: Candidate) -> Batch:
        return candidate.example if self.batch is None else resized(candidate.example, self.batch)

    def spread(self, candidate: Candidate) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the measure."""
        return spread(self.seconds(candidate))

    def __call__(self, candidate: Candidate) -> float:
        return self.spread(candidate)[1]


@dataclass(frozen=True)
class Throughput(Latency):
    """Measured examples per second: the batch's size over the seconds of one call. Arguments, Raises and cost as
    `Latency`."""

    @property
    def __name__(self) -> str:
        return "throughput"

    def spread(self, candidate: Candidate) -> tuple[float, float, float]:
        count = examples_in(self._example(candidate))
        low, middle, high = spread(self.seconds(candidate))
        return count / high, count / middle, count / low

    def _multiple(self, speedup: float) -> float:
        return speedup


latency, throughput = Latency(), Throughput()


OBJECTIVES: dict[str, tuple[Objective, type[Maximize] | type[Minimize]]] = {
    "stored_bytes": (stored_bytes, Minimize),
    "nonzero_bytes": (nonzero_bytes, Minimize),
    "parameters": (parameters, Minimize),
    "macs": (macs, Minimize),
    "flops": (flops, Minimize),
    "latency": (latency, Minimize),
    "throughput": (throughput, Maximize),
}
"""Every objective by name, and which way it is better."""

_WORDS: dict[str, type[Maximize] | type[Minimize]] = {
    "max": Maximize,
    "maximize": Maximize,
    "maximise": Maximize,
    "min": Minimize,
    "minimize": Minimize,
    "minimise": Minimize,
}


def parse_objective(text: str) -> Maximize | Minimize:
    """The goal a text names: `throughput`, `stored_bytes` (the better way is known), `min latency`, `maximize
    throughput`.

    Raises: SearchError with the nearest spelling of an unknown name.
    """
    *before, name = text.split() or [""]
    if name not in OBJECTIVES:
        raise SearchError(f"objective {text!r}: unknown name {name!r}{nearest(name, list(OBJECTIVES))}")
    if len(before) > 1 or (before and before[0].lower() not in _WORDS):
        raise SearchError(f"objective {text!r}: expected NAME, 'min NAME' or 'max NAME'")
    function, usual = OBJECTIVES[name]
    wanted = _WORDS[before[0].lower()] if before else usual
    return wanted(function)
