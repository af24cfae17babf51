"""What memory end-to-end training takes, told before it begins."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from laconic.recover.train import Trainer


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds from its first step on; activations, which depend on the data, come on top.

    `parameters`: the model's, its buffers, and states of relaxations that are trained. `gradients`: of all that is
    moved, and of the compressed matrices, through which gradients arrive. `optimizer`: what it carries from step to
    step. `original`: the copy that losses compare with. `copies`: further forms of the compressed matrices (the
    uncompressed ones, multipliers, targets).
    """

    parameters: int
    gradients: int
    optimizer: int
    original: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.original + self.copies

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "original": self.original,
            "copies of what is compressed": self.copies,
        }
        told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        return f"training takes {_size(self.total)} of memory, and activations: {told}"


def memory_of(trainer: Trainer, compressed: Iterable[nn.Parameter], copies: int) -> Memory:
    """What a trainer takes of a model with these compressed matrices, of which `copies` are held beside the model's
    own.

    Exact but for the allocator's rounding. Cost: a step of the optimizer on shapes alone.
    """
    sites, of_model = list(compressed), {id(parameter) for parameter in trainer.model.parameters()}
    with_gradient = {id(parameter): parameter.nbytes for parameter in (*trainer.parameters, *sites)}
    own = [parameter for parameter in trainer.parameters if id(parameter) not in of_model]
    return Memory(
        parameters=_bytes(trainer.model) + sum(state.nbytes for state in own),
        gradients=sum(with_gradient.values()),
        optimizer=trainer.steps.moves.state_bytes(trainer.parameters),
        original=_bytes(trainer.teacher) if trainer.teacher is not None and trainer.loss.compares else 0,
        copies=copies * sum(site.nbytes for site in sites),
    )


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _size(size: int) -> str:
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size} bytes"
