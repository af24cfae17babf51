"""Direct compression, and training of w through what compression makes of it: masks, scales and tables kept, or clusters that move along."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from laconic.errors import SchemeError
from laconic.model.blocks import Batch
from laconic.model.sites import Slot
from laconic.recover.batches import length_of
from laconic.recover.checkpoint import Checkpoints, Listener
from laconic.recover.compressed import Bench, Best, Snapshot
from laconic.recover.relaxed import Trained
from laconic.recover.train import Steps, Trainer
from laconic.weights import Weight


@dataclass(frozen=True)
class Direct:
    """Direct compression: Theta = C(w), nothing is trained. With `norm_batches`, batch norms' statistics are estimated anew.

    Source: Condensa section 3.3 ("direct compression", DC).
    """

    norm_batches: int = 0

    def __post_init__(self) -> None:
        check_counts(self, 0, norm_batches=self.norm_batches)

    @property
    def total(self) -> int:
        """All minibatches of a run."""
        return 0

    def over(self, train: Iterable[Batch]) -> "Direct":
        """The same: nothing is counted in passes over data."""
        return self


@dataclass(frozen=True)
class FineTune:
    """Direct compression, then training of w through what compression makes of it.

    The forward pass sees D(C(w)) with side information (masks, scales, tables) kept, and gradients pass straight through to w: for pruning this
    is training of the survivors, for a quantizer a straight-through estimator. A method with a soft form of its own (`DKM`) is trained through
    that. `minibatches` steps are taken, or, if given, `epochs` passes over the training data. The compressed model is judged on validation
    data `checks` times; the one of least validation loss is returned. After every check the state is stored, where there is a folder.
    Source: Han et al. 2015 (fine-tuning with masks); Bengio et al. 2013 (straight-through). Cost: a projection per minibatch.
    """

    minibatches: int = 500
    learn: Steps = field(default_factory=Steps)
    checks: int = 4
    norm_batches: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_counts(
            self, 1, minibatches=self.minibatches, checks=self.checks, epochs=1 if self.epochs is None else self.epochs
        )
        check_counts(self, 0, norm_batches=self.norm_batches)
        if not isinstance(self.learn, Steps):
            raise SchemeError(f"FineTune: learn should be Steps(...), got {self.learn!r}")

    @property
    def total(self) -> int:
        """All minibatches of a run."""
        return self.minibatches

    def over(self, train: Iterable[Batch]) -> "FineTune":
        """The same with `epochs` counted in minibatches of this data. Raises: SchemeError for data of unknown length."""
        if self.epochs is None:
            return self
        length = length_of(train)
        if length is None:
            raise SchemeError(
                f"FineTune: epochs need training data that has a length, got a {type(train).__name__}; give minibatches instead"
            )
        return replace(self, epochs=None, minibatches=max(1, self.epochs * length // self.learn.accumulate))


def check_counts(how: object, least: int, **numbers: object) -> None:
    """Raises SchemeError unless all are whole numbers from `least` on."""
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            raise SchemeError(f"{type(how).__name__}: {name} is a whole number, at least {least}, got {number!r}")


def point(snapshot: Snapshot, **more: Any) -> dict[str, Any]:
    """A point of the learning curve."""
    return {
        "minibatches": snapshot.minibatches,
        "score": snapshot.judgement.score,
        "validation_loss": snapshot.judgement.loss,
        **more,
    }


def tune(
    bench: Bench, how: FineTune, trainer: Trainer, trained: Trained, best: Best, listen: Listener, checkpoints: Checkpoints,
    spent: int = 0, start: int = 0, before: int = 0,
) -> None:  # fmt: skip
    """Carry out FineTune's training from check `start` on; offer what is found to `best`. `spent` minibatches and `before` L-steps came before."""
    for check in range(start, how.checks):
        count = how.minibatches * (check + 1) // how.checks - how.minibatches * check // how.checks
        if count:
            loss = trained.run(trainer, count)
            weights = trained.stored()
            found = bench.judged(weights, spent + trainer.taken)
            best.offer(found)
            try:
                listen(point(found, loss=loss, phase="fine-tuning", skipped=trainer.skipped))
            finally:
                checkpoints.write(bench, trainer, weights, {}, best.found, before + check + 1, trained.state())
    tell_faults(bench, trainer)


def run_finetune(
    bench: Bench, how: FineTune, best: Best, listen: Listener, checkpoints: Checkpoints, seed: int
) -> None:
    """Direct compression of the module's w, then `tune`; goes on from a checkpoint if there is one."""
    trainer = Trainer(bench.model, bench.task, how.learn, how.minibatches, seed, bench.teacher)
    resumed = checkpoints.resume(bench, trainer, {}, best, listen)
    trained = Trained(bench, clones(resumed.weights or run_direct(bench, best, listen)))
    trained.restore(resumed.relaxed)
    tune(bench, how, trainer, trained, best, listen, checkpoints, start=resumed.done)


def tell_faults(bench: Bench, trainer: Trainer) -> None:
    """A note about minibatches that were skipped."""
    if trainer.skipped:
        bench.projection.notes.append(
            f"{trainer.skipped} of {trainer.taken} minibatches were skipped; not finite: {trainer.told_faults()}"
        )


def run_direct(bench: Bench, best: Best, listen: Listener) -> dict[Slot, Weight]:
    """Direct compression of the module's w."""
    weights = bench.projection.compress(bench.values())
    best.offer(bench.judged(weights, 0))
    listen(point(best.found, phase="direct"))
    return weights


def clones(weights: dict[Slot, Weight]) -> dict[Slot, Weight]:
    """Weights that later training does not move."""
    return {slot: copy.deepcopy(weight) for slot, weight in weights.items()}
