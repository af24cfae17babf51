"""Direct compression, and fine-tuning of a compressed model with its masks, scales and tables kept: the baselines of L-C."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.recover.compressed import Bench, Best, Snapshot
from laconic.recover.train import Steps, Trainer
from laconic.sites import Slot
from laconic.weights import Sparse, Weight

Listener = Callable[[dict[str, Any]], None]
"""Is told every point of the learning curve; raising StopRecovery from it ends the recovery with the best found so far."""


class StopRecovery(Exception):  # noqa: N818 - a message to the loop, not an error
    """Raised by a listener: what was found is enough, or cannot become enough."""


@dataclass(frozen=True)
class Direct:
    """Direct compression: Theta = C(w), nothing is trained. With `norm_batches`, batch norms' statistics are estimated anew.

    Source: Condensa section 3.3 ("direct compression", DC).
    """

    norm_batches: int = 0

    def __post_init__(self) -> None:
        check_counts(self, 0, norm_batches=self.norm_batches)

    @property
    def minibatches(self) -> int:
        return 0


@dataclass(frozen=True)
class FineTune:
    """Direct compression, then training with side information (masks, scales, tables) kept.

    The forward pass sees D(C(w)), gradients pass straight through to w: for pruning this is training of the survivors, for a quantizer a
    straight-through estimator. The model is judged on validation data `checks` times; the one of least validation loss is returned.
    Source: Han et al. 2015 (fine-tuning with masks); Bengio et al. 2013 (straight-through). Cost: a projection per minibatch.
    """

    minibatches: int = 500
    learn: Steps = field(default_factory=Steps)
    checks: int = 4
    norm_batches: int = 0

    def __post_init__(self) -> None:
        check_counts(self, 1, minibatches=self.minibatches, checks=self.checks)
        check_counts(self, 0, norm_batches=self.norm_batches)
        if not isinstance(self.learn, Steps):
            raise SchemeError(f"FineTune: learn should be Steps(...), got {self.learn!r}")


def check_counts(how: object, least: int, **numbers: object) -> None:
    """Raises SchemeError unless all are whole numbers from `least` on."""
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            raise SchemeError(f"{type(how).__name__}: {name} is a whole number, at least {least}, got {number!r}")


def straight_through(bench: Bench, trainer: Trainer, weights: dict[Slot, Weight], count: int) -> float:
    """Take `count` steps with the weights' side information kept; the module's parameters are w before and after. Returns the mean loss."""
    master = {slot: value.clone() for slot, value in bench.values().items()}
    silent = _silent(bench, weights)
    hush(silent)

    def show_compressed() -> None:
        bench.projection.keep_side(weights, master)
        with torch.no_grad():
            for slot, weight in weights.items():
                bench.parameters[slot].copy_(slot.view.restore(weight.forward()))

    def back_to_master() -> None:
        with torch.no_grad():
            for slot, value in master.items():
                bench.parameters[slot].copy_(value)

    def keep() -> None:
        with torch.no_grad():
            for slot, value in master.items():
                value.copy_(bench.parameters[slot])
        hush(silent)

    with ExitStack() as undo:
        for slot, weight in weights.items():
            if isinstance(weight, Sparse):  # what is cut gets no gradient: it would only count in the norm that is clipped
                undo.callback(bench.parameters[slot].register_post_accumulate_grad_hook(_within(slot.view.restore(weight.mask))).remove)
        loss = trainer.run(count, before=show_compressed, penalize=back_to_master, after=keep)
    bench.projection.keep_side(weights, master)
    return loss


def _within(mask: Tensor) -> Callable[[Tensor], None]:
    def keep(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to_dense() * mask

    return keep


def hush(silent: list[tuple[nn.Parameter, Tensor]]) -> None:
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


def point(snapshot: Snapshot, **more: Any) -> dict[str, Any]:
    """A point of the learning curve."""
    return {"minibatches": snapshot.minibatches, "score": snapshot.judgement.score, "validation_loss": snapshot.judgement.loss, **more}


def tune(bench: Bench, how: FineTune, trainer: Trainer, weights: dict[Slot, Weight], best: Best, listen: Listener, spent: int) -> None:
    """Carry out FineTune's training from the module's present w and the weights' present side information; offer what is found to `best`."""
    for check in range(how.checks):
        count = how.minibatches * (check + 1) // how.checks - how.minibatches * check // how.checks
        if not count:
            continue
        loss = straight_through(bench, trainer, weights, count)
        spent += count
        found = bench.judged(clones(weights), spent)
        best.offer(found)
        listen(point(found, loss=loss, phase="fine-tuning", skipped=trainer.skipped))


def run_finetune(bench: Bench, how: FineTune, best: Best, listen: Listener, seed: int) -> None:
    """Direct compression of the module's w, then `tune`."""
    weights = run_direct(bench, best, listen)
    trainer = Trainer(bench.model, bench.task, how.learn, how.minibatches, seed, bench.teacher)
    tune(bench, how, trainer, clones(weights), best, listen, 0)


def run_direct(bench: Bench, best: Best, listen: Listener) -> dict[Slot, Weight]:
    """Direct compression of the module's w."""
    weights = bench.projection.compress(bench.values())
    best.offer(bench.judged(weights, 0))
    listen(point(best.found, phase="direct"))
    return weights


def clones(weights: dict[Slot, Weight]) -> dict[Slot, Weight]:
    """Weights that later training does not move."""
    return {slot: copy.deepcopy(weight) for slot, weight in weights.items()}
