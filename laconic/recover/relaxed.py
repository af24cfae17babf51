"""Training of a module's sites through what the network sees in their places: of w itself, or of what stands for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError
from laconic.methods.base import Method
from laconic.model.sites import Slot
from laconic.recover.compressed import Bench
from laconic.recover.train import Trainer
from laconic.weights import Weight
from laconic.weights.relax import Relaxation, Tuned
from laconic.weights.spec import prefixed

Relax = Callable[[Method, Weight, Tensor], Relaxation]
"""What stands in a matrix's place while it is trained: from its method, its compressed weight and its uncompressed
values [out, in].
"""
Trains = Literal["w", "side"]
Along = Literal["all", "norms", "none"]


def relaxed(trains: Trains) -> Relax:
    """The relaxations that train "w", each the form its method has for it, or the "side" information, codes and masks
    as they are.
    """
    if trains == "side":
        return lambda method, weight, w: Tuned(weight)
    return lambda method, weight, w: method.relax(weight, w)


def beside(model: nn.Module, sites: list[nn.Parameter], along: Along) -> dict[str, nn.Parameter]:
    """The parameters that train along with the sites': all that require a gradient, those of one dimension
    (norms and biases), or none.
    """
    compressed = {id(site) for site in sites}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in compressed}
    if along == "all":
        return found
    return {name: p for name, p in found.items() if along == "norms" and p.dim() <= 1}


@dataclass
class Trained:
    """Sites under training. Between calls the module's parameters are the uncompressed w; during a forward pass what
    `Relaxation`s make of it.

    The gradient that arrives at what the network saw is taken back to what each relaxation says it trains
    (w, or states of its own) before anything clips it. What is not trained does not move: a site's w whose relaxation
    trains something else, and parameters beside the sites that `along` leaves out. (Running statistics of norms are no
    parameters; they follow the data.)
    """

    bench: Bench
    weights: dict[Slot, Weight]
    relax: Relax = field(default_factory=lambda: relaxed("w"))
    along: Along = "all"
    relaxations: dict[Slot, Relaxation] = field(init=False)
    own: dict[Slot, dict[str, nn.Parameter]] = field(init=False)
    moved: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        chosen, values, sites = self.bench.projection.chosen, self.bench.values(), self.bench.parameters
        self.relaxations = {
            slot: self.relax(chosen[slot], weight, slot.view.matrix(values[slot])).train()
            for slot, weight in self.weights.items()
        }
        says = {slot: relaxation.trained(sites[slot]) for slot, relaxation in self.relaxations.items()}
        self.own = {slot: {n: p for n, p in trained.items() if p is not sites[slot]} for slot, trained in says.items()}
        self._through_w = [slot for slot, trained in says.items() if any(p is sites[slot] for p in trained.values())]
        self.moved = self._all_moved()
        self._silent = silent_of(self.bench, self.weights)

    def _all_moved(self) -> dict[str, nn.Parameter]:
        """What an optimizer is to move, by name: parameters of the module in its order, then states of relaxations."""
        chosen = {id(self.bench.parameters[slot]) for slot in self._through_w}
        along = beside(self.bench.model, list(self.bench.parameters.values()), self.along)
        chosen |= {id(parameter) for parameter in along.values()}
        moved = {name: p for name, p in self.bench.model.named_parameters() if id(p) in chosen}
        for slot, states in self.own.items():
            for name, state in states.items():
                if all(state is not other for other in moved.values()):  # which sites may share
                    moved[f"{name} of {slot.name}"] = state
        return moved

    def run(self, trainer: Trainer, count: int) -> float:
        """Take `count` steps of a trainer of what is `moved`. Returns the mean training loss, nats."""
        parameters = self.bench.parameters
        master = {slot: value.clone() for slot, value in self.bench.values().items()}
        for slot in self._through_w:
            master[slot].requires_grad_()
        shown: dict[Slot, Tensor] = {}
        _hush(self._silent)

        def show() -> None:
            for slot, relaxation in self.relaxations.items():
                relaxation.advance(min(1.0, trainer.taken / max(trainer.total - 1, 1)))
                shown[slot] = slot.view.restore(relaxation(slot.view.matrix(master[slot])))
                with torch.no_grad():
                    parameters[slot].copy_(shown[slot])

        def through() -> None:
            self._take_back(shown, master)
            shown.clear()
            with torch.no_grad():
                for slot, value in master.items():
                    parameters[slot].copy_(value)

        def keep() -> None:
            with torch.no_grad():
                for slot, value in master.items():
                    value.copy_(parameters[slot])
            _hush(self._silent)

        with self.bench.rounding(self.weights), _only(self.bench, self.moved):
            return trainer.run(count, before=show, through=through, after=keep)

    def _take_back(self, shown: Mapping[Slot, Tensor], master: Mapping[Slot, Tensor]) -> None:
        """Gradients that arrived at what the network saw become those of what is trained."""
        parameters = self.bench.parameters
        arrived = {slot: parameters[slot].grad for slot in shown if shown[slot].requires_grad}
        seen = [slot for slot, gradient in arrived.items() if gradient is not None]  # the others this batch did not use
        inputs: list[Tensor] = []
        receivers: list[nn.Parameter] = []
        for slot in seen:
            if master[slot].requires_grad:
                inputs.append(master[slot])
                receivers.append(parameters[slot])
            inputs += self.own[slot].values()
            receivers += self.own[slot].values()
        if seen:
            outputs, gradients = [shown[slot] for slot in seen], [arrived[slot] for slot in seen]
            found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
            for receiver, gradient in zip(receivers, found, strict=True):
                receiver.grad = gradient
        for slot in shown:
            if not master[slot].requires_grad:
                parameters[slot].grad = None

    def stored(self) -> dict[Slot, Weight]:
        """The compressed weights at present, which later training does not move."""
        return {
            slot: self.relaxations[slot].stored(slot.view.matrix(value)) for slot, value in self.bench.values().items()
        }

    def state(self) -> dict[str, Tensor]:
        """What the relaxations carry from step to step, buffers and trained states, by the number of the site."""
        found: dict[str, Tensor] = {}
        for i, (slot, relaxation) in enumerate(self.relaxations.items()):
            found |= prefixed(str(i), dict(relaxation.named_buffers()))
            found |= prefixed(f"{i}.trained", {name: state.detach() for name, state in self.own[slot].items()})
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; nothing to restore is fine. Raises: CheckpointError for the state of other
        relaxations.
        """
        if not state:
            return
        here = self.state()
        if here.keys() != state.keys() or any(here[name].shape != state[name].shape for name in here):
            raise CheckpointError("the state of other relaxations, or of another version")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(state[name])


@contextmanager
def _only(bench: Bench, moved: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are computed of what is moved and of the sites, through which they arrive, and of nothing else;
    earlier ones are gone.
    """
    bench.model.zero_grad(set_to_none=True)  # what no optimizer here moves, none would clear
    wanted = {id(p) for p in (*moved.values(), *bench.parameters.values())}
    others = [p for p in bench.model.parameters() if p.requires_grad and id(p) not in wanted]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _hush(silent: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Set what belongs to channels that are cut to zero."""
    with torch.no_grad():
        for parameter, mask in silent:
            parameter.mul_(mask)


def silent_of(bench: Bench, weights: dict[Slot, Weight]) -> list[tuple[nn.Parameter, Tensor]]:
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
