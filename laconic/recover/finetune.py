"""Training of what compression made: of w through it, masks, scales and tables kept or moving along, or of scales and
tables themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

from torch import nn

from laconic.errors import SchemeError
from laconic.model.batches import Batch
from laconic.model.sites import Slot
from laconic.recover.base import Recovery
from laconic.recover.batches import length_of
from laconic.recover.checks import check_choice, check_counts, check_steps
from laconic.recover.relaxed import Along, Trained, Trains, beside, relaxed
from laconic.recover.steps import Steps
from laconic.recover.train import Trainer
from laconic.recover.written import QUIET

if TYPE_CHECKING:
    from laconic.recover.course import Course, Start


@dataclass(frozen=True, repr=False)
class FineTune(Recovery):
    """Direct compression, then training of w, or of scales and tables, through what compression makes of it.

    The forward pass sees D(C(w)) with side information (masks, scales, tables) kept, and gradients pass straight
    through to w: for pruning this is training of the survivors, for a quantizer a straight-through estimator. A method
    with a soft form of its own (`DKM`) is trained through that. `trains="side"`: codes and masks stay, scales, float
    zero points, tables, low-rank factors and dense parts are trained instead. `along`: which parameters that are not
    compressed train along: "all", "norms" (of one dimension: norms and biases) or "none". `minibatches` steps are
    taken, or, if given, `epochs` passes over the training data. The compressed model is judged on validation data
    `checks` times; the one of least validation loss is returned. After every check the state is stored, where there is
    a folder.
    Source: Han et al. 2015 (fine-tuning with masks); Bengio et al. 2013 (straight-through). Cost: a projection per
    minibatch.
    """

    minibatches: int = 500
    learn: Steps = field(default_factory=Steps)
    checks: int = 4
    norm_batches: int = 0
    epochs: int | None = None
    trains: Trains = field(default="w", metadata=QUIET)
    along: Along = field(default="all", metadata=QUIET)

    def __post_init__(self) -> None:
        check_counts(
            self, 1, minibatches=self.minibatches, checks=self.checks, epochs=1 if self.epochs is None else self.epochs
        )
        check_counts(self, 0, norm_batches=self.norm_batches)
        check_steps(self, self.learn)
        check_choice(self, "trains", self.trains, get_args(Trains))
        check_choice(self, "along", self.along, get_args(Along))

    @property
    def total(self) -> int:
        return self.minibatches

    @property
    def learns(self) -> tuple[Steps, ...]:
        return (self.learn,)

    def over(self, train: Iterable[Batch]) -> "FineTune":
        if self.epochs is None:
            return self
        length = length_of(train)
        if length is None:
            raise SchemeError(
                f"FineTune: epochs need training data that has a length, got a {type(train).__name__}; give "
                "minibatches instead"
            )
        return replace(self, epochs=None, minibatches=max(1, self.epochs * length // self.learn.accumulate))

    def check(self, model: nn.Module, slots: list[Slot]) -> None:
        super().check(model, slots)
        sites = [model.get_submodule(slot.users[0][0]).get_parameter(slot.users[0][1]) for slot in slots]
        moved = list(beside(model, sites, self.along).values())
        self.learn.check([*moved, *(sites if self.trains == "w" else [])])

    def run(self, course: "Course") -> None:
        self.train(course, course.begin(), course.seed)

    def train(self, course: "Course", start: "Start", seed: int, spent: int = 0, before: int = 0) -> None:
        """Train on from where another recovery ended. `spent` minibatches and `before` of what is done came before this
        one's own.
        """
        bench = course.bench
        trained = Trained(bench, start.weights, relaxed(self.trains), self.along)
        trainer = Trainer(
            bench.model, bench.task, self.learn, self.minibatches, seed, bench.teacher, moved=trained.moved
        )
        start.restore(trainer)
        trained.restore(start.state)
        course.tell_memory(trainer, copies=2)  # the uncompressed values, and what the network sees
        for check in range(start.done - before, self.checks):
            count = self.minibatches * (check + 1) // self.checks - self.minibatches * check // self.checks
            if count:
                loss = trained.run(trainer, count)
                course.offer(
                    trained.stored(), before + check + 1, spent + trainer.taken, trainer=trainer, state=trained.state(),
                    loss=loss, phase="fine-tuning",
                )  # fmt: skip
        course.tell_faults(trainer)
