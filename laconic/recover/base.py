"""What every way to recover accuracy is: hyper-parameters as a value, and the training they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

from torch import nn

from laconic.model.batches import Batch
from laconic.model.sites import Slot
from laconic.recover.steps import Steps
from laconic.recover.written import written

if TYPE_CHECKING:
    from laconic.recover.course import Course


class Recovery(ABC):
    """A frozen dataclass of hyper-parameters (`repr=False`), in a file of its own in this folder, where it is found;
    nothing is registered.

    `run` begins with `course.begin()` and gives every compressed model to `course.offer`, which judges, tells and
    stores it. The one of least validation loss is what comes out, direct compression among them.
    """

    norm_batches: int = 0
    """Minibatches over which statistics of batch norms are estimated anew before each judgement."""

    @property
    @abstractmethod
    def total(self) -> int:
        """All minibatches of a run."""

    def total_on(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        """All minibatches of a run on this model, compressed at these sites; `total`, unless it depends on them."""
        return self.total

    @abstractmethod
    def run(self, course: "Course") -> None:
        """Carry it out. Everything random follows from `course.seed`; what a resumed run needs goes into the state that
        is offered.
        """

    @property
    def learns(self) -> tuple[Steps, ...]:
        """How its minibatch steps are taken, phase by phase; a copy of the original is in memory if a loss of them
        compares with it.
        """
        return ()

    @property
    def leaves_w(self) -> bool:
        """Whether the uncompressed w it ends with is where another recovery can start; otherwise that is what the best
        model decodes to.
        """
        return False

    def over(self, train: Iterable[Batch]) -> Self:
        """The same with passes over the training data counted in minibatches. Raises: SchemeError for data of unknown
        length.
        """
        return self

    def warmed(self, share: float = 0.5) -> Self | None:
        """What is left to do from a neighbour's solution, about this share of the run; None where a run is always a
        whole one.
        """
        return None

    def check(self, model: nn.Module, slots: list[Slot]) -> None:
        """Raises SchemeError for a model, compressed at these sites, that cannot be trained so. Nothing is computed."""
        for steps in self.learns:
            steps.minimises.watches(model)

    def __repr__(self) -> str:
        return written(self)
