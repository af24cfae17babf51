"""One part of a model trained to match: what is trained in it, the error, and the best state that held-out minibatches
saw.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.disk.tensors import is_finite
from laconic.host.randomness import private_randomness
from laconic.model.sites import Slot
from laconic.recover.steps import Steps
from laconic.recover.targets import Part
from laconic.weights import Weight
from laconic.weights.relax import Relaxation

_SMALL = 1e-2  # the size that a state of zeros (a bias) counts as when the learning rate is measured by it


@dataclass
class Trainee:
    """What is trained in a part: sites through relaxations, and beside them norms and biases, by their names in the
    part.

    `w` [out, in]: the uncompressed values. `types`: what a norm or bias is rounded to when it is stored; `masks`:
    entries that stay as they are where False.
    """

    relaxations: dict[Slot, Relaxation]
    w: dict[Slot, nn.Parameter]
    names: dict[Slot, list[str]]
    beside: dict[str, nn.Parameter] = field(default_factory=dict)
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def groups(self) -> list[dict[str, Any]]:
        """What is trained, a group per tensor, each with its `size`: the root of its mean square, which the learning
        rate is relative to.
        """
        states = [state for slot, r in self.relaxations.items() for state in r.trained(self.w[slot]).values()]
        found = {id(state): state for state in (*states, *self.beside.values())}
        return [
            {"params": [state], "size": float(state.detach().square().mean().sqrt()) or _SMALL}
            for state in found.values()
        ]

    def instead(self, stored: bool = False) -> dict[str, Tensor]:
        """The tensors in the parameters' places, differentiable; `stored`: as they would be stored."""
        found: dict[str, Tensor] = {}
        for slot, relaxation in self.relaxations.items():
            seen = slot.view.restore(relaxation.train(not stored)(self.w[slot]))
            found |= dict.fromkeys(self.names[slot], seen)
        for name, state in self.beside.items():
            found[name] = state.to(self.types[name]).to(state.dtype) if stored and name in self.types else state
        return found

    def advance(self, progress: float) -> None:
        for relaxation in self.relaxations.values():
            relaxation.advance(progress)

    def stored(self) -> "Found":
        """The weights and other tensors at this moment, which later training does not move."""
        weights = {slot: r.stored(self.w[slot].detach()) for slot, r in self.relaxations.items()}
        with torch.no_grad():
            return Found(weights, {name: self.instead(stored=True)[name].clone() for name in self.beside})


@dataclass
class Found:
    """What training a part came to: weights by site, norms and biases by their names in the part."""

    weights: dict[Slot, Weight]
    beside: dict[str, Tensor]


@dataclass
class Fitting:
    """How a part was trained: its error on held-out minibatches at the start and at best, relative to the start's on
    the others.

    `found` is None where nothing did better than the start; `fault` says what was not finite, if that ended the
    training. `taken` steps.
    """

    before: float
    after: float
    taken: int = 0
    found: Found | None = None
    fault: str = ""


class Fit(Protocol):
    """How parts are trained: `steps` of one minibatch each, `checks` on held-out ones (a share `held` of all) and what
    is added to the error.
    """

    @property
    def learn(self) -> Steps: ...
    @property
    def steps(self) -> int: ...
    @property
    def checks(self) -> int: ...
    @property
    def held(self) -> float: ...
    @property
    def patience(self) -> int | None: ...
    def penalty(self, relaxations: Sequence[Relaxation]) -> Tensor | None:
        """A scalar added to the error, which is 1 at the start."""


def reconstruct(part: Part, trainee: Trainee, how: Fit, seed: int, device: torch.device) -> Fitting:
    """Train a part for `how.steps` minibatches; what did best on held-out minibatches, as it would be stored, if that
    is better than the start.

    The loss is the mean of importance x (answer - target)^2 over that of the start, plus the penalty. The learning rate
    of a state is relative to its size. Cost: steps x a forward and a backward pass of the part.
    """
    count = len(part.targets)
    held = list(range(count))[-max(1, round(how.held * count)) :]
    fit = [k for k in range(count) if k not in held]
    number = int.from_bytes(hashlib.sha256(part.path.encode()).digest()[:4], "little")
    with private_randomness(seed, number, device):
        start = _error(part, {}, fit)
        if not start > 0:  # it matches already
            return Fitting(0.0, 0.0)
        best = Fitting(before := _error(part, {}, held) / start, before)
        groups = trainee.groups()
        optimizer = how.learn.build(groups)
        states = [state for group in groups for state in group["params"]]
        masks = {id(trainee.beside[name]): mask for name, mask in trainee.masks.items()}
        last, order = 0, _Order(fit)
        for check in range(how.checks):
            until = how.steps * (check + 1) // how.checks
            while best.taken < until:
                trainee.advance(best.taken / max(how.steps - 1, 1))
                rate = how.learn.rate(best.taken, how.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"]
                k = order.next()
                loss = _difference(part, part.run(k, trainee.instead()), k) / start
                penalty = how.penalty(list(trainee.relaxations.values()))
                loss = loss if penalty is None else loss + penalty
                gradients = torch.autograd.grad(loss, states, allow_unused=True)
                for state, gradient in zip(states, gradients, strict=True):
                    mask = masks.get(id(state))
                    state.grad = gradient if gradient is None or mask is None else gradient * mask
                if not _fine(loss, gradients):
                    best.fault = f"step {best.taken}"
                    return best
                if how.learn.clip is not None:
                    nn.utils.clip_grad_norm_(states, how.learn.clip)
                optimizer.step()
                best.taken += 1
            error = _error(part, trainee.instead(stored=True), held) / start
            if error < best.after:
                best.after, best.found, last = error, trainee.stored(), check
            elif how.patience is not None and check - last >= how.patience:
                break
    return best


class _Order:
    """Minibatches without end, pass after pass in a new order, drawn from torch's generator."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self.left = list(numbers), list[int]()

    def next(self) -> int:
        if not self.left:
            self.left = [self.numbers[i] for i in torch.randperm(len(self.numbers)).tolist()]
        return self.left.pop()


def _difference(part: Part, answer: Tensor, k: int) -> Tensor:
    """The mean of importance x (answer - target)^2 in minibatch k, a scalar."""
    squared = (answer.float() - part.targets[k].to(answer.device).float()).square()
    return squared.mean() if part.importance is None else (squared * part.importance[k].to(squared)).mean()


@torch.no_grad()
def _error(part: Part, instead: Mapping[str, Tensor], numbers: Sequence[int]) -> float:
    """The mean difference over minibatches, which count alike."""
    return sum(float(_difference(part, part.run(k, instead), k)) for k in numbers) / len(numbers)


def _fine(loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
    return math.isfinite(float(loss.detach())) and all(g is None or is_finite(g) for g in gradients)
