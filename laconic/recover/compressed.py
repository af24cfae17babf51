"""A module whose parameters change places: trained values, the values a compressed weight decodes to, and snapshots of
the best.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.disk.state import guard
from laconic.errors import RecoveryError
from laconic.host.randomness import private_randomness
from laconic.model.batches import to_device
from laconic.model.calling import call, in_evaluation
from laconic.model.judging import Judgement
from laconic.model.sites import Slot
from laconic.recover.batches import stream
from laconic.recover.projection import Projection
from laconic.recover.task import Task
from laconic.weights import Weight, install
from laconic.weights.demands import check_demands, demands_of, set_demands


@dataclass
class Snapshot:
    """A compressed model: its weights, everything else of its state (biases, norms, buffers), and how it was judged on
    validation data.
    """

    weights: dict[Slot, Weight]
    rest: dict[str, Tensor]
    judgement: Judgement
    minibatches: int


@dataclass
class Best:
    """The snapshot of least validation loss so far; a loss that is NaN is worse than any."""

    snapshot: Snapshot | None = None

    def offer(self, found: Snapshot) -> None:
        if self.snapshot is None or _order(found.judgement.loss) < _order(self.snapshot.judgement.loss):
            self.snapshot = found

    @property
    def found(self) -> Snapshot:
        assert self.snapshot is not None
        return self.snapshot

    def finite(self) -> Snapshot:
        """The best snapshot. Raises: RecoveryError when no compressed model had a finite loss."""
        if not math.isfinite(self.found.judgement.loss):
            raise RecoveryError(
                f"the validation loss of every compressed model is {self.found.judgement.loss}: check the validation "
                "data and the loss"
            )
        return self.found


def _order(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


@dataclass
class Bench:
    """A module under compression. Its parameters are plain and hold the uncompressed w, except while a compressed point
    is looked at.
    """

    model: nn.Module
    projection: Projection
    task: Task
    norm_batches: int = 0
    seed: int = 0
    teacher: nn.Module | None = None
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    parameters: dict[Slot, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {
            slot: self.model.get_submodule(slot.users[0][0]).get_parameter(slot.users[0][1])
            for slot in self.projection.slots
        }

    def values(self) -> dict[Slot, Tensor]:
        """The sites' present values (not copies)."""
        return {slot: parameter.detach() for slot, parameter in self.parameters.items()}

    def rest(self) -> dict[str, Tensor]:
        """Copies of all state that is not a site's: biases, norms, buffers, each tie once."""
        return {name: tensor.detach().clone() for name, tensor in self._others().items()}

    def put_rest(self, rest: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._others().items():
                tensor.copy_(rest[name])

    def _others(self) -> dict[str, Tensor]:
        sites = {id(parameter) for parameter in self.parameters.values()}
        return {
            name: t for name, t in (*self.model.named_parameters(), *self.model.named_buffers()) if id(t) not in sites
        }

    def put(self, weights: Mapping[Slot, Weight]) -> None:
        """Decoded weights in the sites' places; channels that fell silent are silenced whole."""
        with torch.no_grad():
            for slot, weight in weights.items():
                self.parameters[slot].copy_(slot.view.restore(weight.forward()))
        self.silence()

    def silence(self) -> None:
        if self.projection.coupling is not None:
            from laconic.surgery import silence

            silence(self.model, self.projection.coupling)

    @contextmanager
    def rounding(self, weights: Mapping[Slot, Weight]) -> Iterator[None]:
        """Inside this context layers round their inputs as these weights ask for. Raises: SchemeError where they
        cannot.
        """
        layers = [(layer, slot, weight) for slot, weight in weights.items() for layer in slot.layers(self.model)]
        for layer, slot, weight in layers:
            check_demands(layer, weight, slot.name)
        before = [(layer, demands_of(layer)) for layer, _, _ in layers]
        try:
            for layer, _, weight in layers:
                set_demands(layer, weight)
            yield
        finally:
            for layer, source in before:
                set_demands(layer, source)

    def judged(self, weights: dict[Slot, Weight], minibatches: int) -> Snapshot:
        """The compressed model at these weights, judged on validation data as it would be stored. The module is
        afterwards as it was.

        With `norm_batches`, running statistics of norms are estimated anew, from that many minibatches of training
        data. Tensors that are not compressed are rounded to the `types` they will be stored in.
        """
        with torch.no_grad():
            saved, rest = {slot: value.clone() for slot, value in self.values().items()}, self.rest()
            self.put(weights)
            with self.rounding(weights):
                self.estimate_norms()
                others = self._others()
                for name in self.types.keys() & others.keys():
                    others[name].copy_(others[name].to(self.types[name]))
                found = Snapshot(weights, self.rest(), self.task.judge(self.model, self.task.validation), minibatches)
            for slot, value in saved.items():
                self.parameters[slot].copy_(value)
            self.put_rest(rest)
        return found

    def estimate_norms(self) -> None:
        """Running means and variances of batch norms as the plain average over `norm_batches` minibatches; seeded by
        the seed alone.
        """
        norms = [
            m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        if not (norms and self.norm_batches):
            return
        kept, device = {norm: norm.momentum for norm in norms}, next(self.model.parameters()).device
        with in_evaluation(self.model), torch.no_grad(), private_randomness(self.seed, 0, device):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then takes the cumulative average
                norm.train()
            for _, batch in zip(range(self.norm_batches), stream(self.task.train, self.seed), strict=False):
                call(self.model, to_device(batch, device))
        for norm in norms:
            norm.momentum = kept[norm]
        self.silence()

    def show(self, snapshot: Snapshot) -> None:
        """Bring the module's parameters and the rest of its state to a compressed model's."""
        self.put(snapshot.weights)
        self.put_rest(snapshot.rest)

    def install(self, snapshot: Snapshot) -> None:
        """Leave the module compressed: the snapshot's weights installed, in evaluation mode. The rest must be shown
        before.
        """
        self.model.eval()
        for slot, weight in snapshot.weights.items():
            for path, name in slot.users:
                install(self.model.get_submodule(path), name, weight, slot.view)
        guard(self.model)
