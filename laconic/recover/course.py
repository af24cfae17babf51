"""A recovery under way: where it begins, and what becomes of the compressed models it finds."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from laconic.errors import CheckpointError, RecoveryError
from laconic.model.sites import Slot
from laconic.recover.base import Recovery
from laconic.recover.checkpoint import Checkpoints, Listener, Saved
from laconic.recover.compressed import Bench, Best, Snapshot
from laconic.recover.curve import Point
from laconic.recover.memory import memory_of
from laconic.recover.train import Trainer
from laconic.weights import Weight

_OF_OTHERS = (KeyError, ValueError, IndexError, RuntimeError)
"""What putting a state in place raises when the state is another version's."""


@dataclass(frozen=True)
class Start:
    """Where a recovery begins: compressed weights, the judgements `done` before, and what a checkpoint kept beside
    them.

    Without a checkpoint the weights are direct compression's and nothing is done. The weights are the recovery's to
    change.
    """

    weights: dict[Slot, Weight]
    done: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Saved | None = None

    def restore(self, trainer: Trainer) -> None:
        """Bring a trainer to where the checkpoint left it; without one nothing happens. Raises: CheckpointError for
        another version's.
        """
        if self.saved is None or self.saved.counts is None:
            return
        try:
            trainer.restore(self.saved.optimizer, self.saved.counts)
        except _OF_OTHERS as error:
            raise CheckpointError(f"{self.saved.file}: damaged, or of another version: {error}") from error


@dataclass
class Course:
    """What a recovery works on and reports to.

    `bench` holds the module, the projection and the task. `listen` hears every point of the learning curve, and may end
    the run by an exception. `say` tells the user something.
    """

    bench: Bench
    listen: Listener
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    seed: int = 0
    say: Callable[[str], None] = lambda message: None
    best: Best = field(default_factory=Best)
    _begun: bool = field(default=False, init=False)

    def begin(self, more: Callable[[Mapping[Slot, Weight]], dict[str, Any]] = lambda weights: {}) -> Start:
        """What the checkpoint holds; without one direct compression of the module's w, judged, told (with `more` of it)
        and offered.
        """
        self._begun = True
        saved = self.checkpoints.resume(self.bench, self.best, self.listen)
        if saved is not None:
            return Start(saved.weights, saved.done, saved.state, saved)
        weights = self.bench.projection.compress(self.bench.values())
        self.best.offer(self.bench.judged(clones(weights), 0))
        self.listen(_point(self.best.found, **({"phase": "direct"} | more(weights))))
        return Start(weights)

    def offer(
        self, weights: dict[Slot, Weight], done: int, minibatches: int, *, trainer: Trainer | None = None,
        state: Mapping[str, Tensor] | None = None, **told: Any,
    ) -> Snapshot:  # fmt: skip
        """Judge a compressed model on validation data, keep it if it is the best, tell it, and store where the run is.

        `done`: how many models were offered or steps taken, which `begin` of a resumed run gives back, as it does
        `state`. `minibatches`: all that were trained on so far. `told` goes into the point of the learning curve. Later
        changes of the weights given do not matter.
        """
        kept = clones(weights)
        found = self.bench.judged(kept, minibatches)
        self.best.offer(found)
        skipped = {} if trainer is None else {"skipped": trainer.skipped}
        try:
            self.listen(_point(found, **told, **skipped))
        finally:  # also when that ends the run: another can go on from here
            self.checkpoints.write(self.bench, weights, self.best.found, done, trainer=trainer, state=state)
        return found

    def outcome(self, how: Recovery) -> Snapshot:
        """The best model. Raises: RecoveryError when none had a finite loss, and for a recovery that left direct
        compression out.
        """
        if not self._begun:
            raise RecoveryError(
                f"{how!r}: its run has to begin with course.begin(), so that it is never worse than that"
            )
        return self.best.finite()

    def tell_memory(self, trainer: Trainer, copies: int) -> None:
        """Say what memory training takes, before it begins; `copies` of the compressed matrices are held beside the
        module's own.
        """
        self.say(str(memory_of(trainer, self.bench.parameters.values(), copies)))

    def tell_faults(self, trainer: Trainer) -> None:
        """A note about minibatches that were skipped."""
        if trainer.skipped:
            self.bench.projection.notes.append(
                f"{trainer.skipped} of {trainer.taken} minibatches were skipped; not finite: {trainer.told_faults()}"
            )


def _point(snapshot: Snapshot, **told: Any) -> Point:
    """A point of the learning curve."""
    return Point(snapshot.minibatches, snapshot.judgement.score, snapshot.judgement.loss, told)


def clones(weights: Mapping[Slot, Weight]) -> dict[Slot, Weight]:
    """Weights that later training does not move."""
    return {slot: copy.deepcopy(weight) for slot, weight in weights.items()}
