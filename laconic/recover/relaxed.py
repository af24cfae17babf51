"""Training of the uncompressed w of a module's sites through what the network sees in their places."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from laconic.model.sites import Slot
from laconic.recover.compressed import Bench
from laconic.recover.train import Trainer
from laconic.weights import Weight
from laconic.weights.base import prefixed
from laconic.weights.relax import Relaxation


@dataclass
class Trained:
    """Sites under training. Between calls the module's parameters are the uncompressed w; during a forward pass what `Relaxation`s make of it.

    The gradient that arrives at what the network saw is taken back to w before anything clips it.
    """

    bench: Bench
    weights: dict[Slot, Weight]
    relaxations: dict[Slot, Relaxation] = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.bench.projection.chosen
        values = self.bench.values()
        self.relaxations = {
            slot: chosen[slot].relax(weight, slot.view.matrix(values[slot])).train()
            for slot, weight in self.weights.items()
        }
        self._silent = _silent(self.bench, self.weights)

    def run(self, trainer: Trainer, count: int) -> float:
        """Take `count` steps. Returns the mean training loss, nats."""
        parameters = self.bench.parameters
        master = {slot: value.clone().requires_grad_() for slot, value in self.bench.values().items()}
        shown: dict[Slot, Tensor] = {}
        _hush(self._silent)

        def show() -> None:
            for slot, relaxation in self.relaxations.items():
                relaxation.advance(min(1.0, trainer.taken / max(trainer.total - 1, 1)))
                shown[slot] = slot.view.restore(relaxation(slot.view.matrix(master[slot])))
                with torch.no_grad():
                    parameters[slot].copy_(shown[slot])

        def through() -> None:
            seen = [
                slot for slot in shown if parameters[slot].grad is not None
            ]  # the others are weights this batch did not use
            if seen:
                arrived = [parameters[slot].grad for slot in seen]
                found = torch.autograd.grad([shown[slot] for slot in seen], [master[slot] for slot in seen], arrived)
                for slot, gradient in zip(seen, found, strict=True):
                    parameters[slot].grad = gradient
            shown.clear()
            with torch.no_grad():
                for slot, value in master.items():
                    parameters[slot].copy_(value)

        def keep() -> None:
            with torch.no_grad():
                for slot, value in master.items():
                    value.copy_(parameters[slot])
            _hush(self._silent)

        with self.bench.rounding(self.weights):
            return trainer.run(count, before=show, through=through, after=keep)

    def stored(self) -> dict[Slot, Weight]:
        """The compressed weights at the present w, which later training does not move."""
        return {
            slot: self.relaxations[slot].stored(slot.view.matrix(value)) for slot, value in self.bench.values().items()
        }

    def state(self) -> dict[str, Tensor]:
        """What the relaxations carry from step to step, by the number of the site."""
        return {
            name: t
            for i, r in enumerate(self.relaxations.values())
            for name, t in prefixed(str(i), dict(r.named_buffers())).items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; nothing to restore is fine."""
        for i, relaxation in enumerate(self.relaxations.values() if state else ()):
            for name, buffer in relaxation.named_buffers():
                buffer.copy_(state[f"{i}.{name}"])


def _hush(silent: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Set what belongs to channels that are cut to zero."""
    with torch.no_grad():
        for parameter, mask in silent:
            parameter.mul_(mask)


def _silent(bench: Bench, weights: dict[Slot, Weight]) -> list[tuple[nn.Parameter, Tensor]]:
    """Biases and norms with channels that are cut, and masks that keep these at zero. Nothing is changed."""
    if bench.projection.coupling is None:
        return []
    sites = {id(parameter) for parameter in bench.parameters.values()}
    others = [p for p in bench.model.parameters() if id(p) not in sites]
    saved, rest = {slot: value.clone() for slot, value in bench.values().items()}, bench.rest()
    with torch.no_grad():
        for parameter in others:
            parameter.fill_(1)
        bench.put(weights)
        masks = [(parameter, parameter.detach().clone()) for parameter in others]
        for slot, value in saved.items():
            bench.parameters[slot].copy_(value)
    bench.put_rest(rest)
    return [(parameter, mask) for parameter, mask in masks if not mask.all()]
