"""What training makes small: the task's own loss, the distance to the original's answers or to its hidden states, and
sums of these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import SchemeError
from laconic.model.batches import Batch, tensors_in
from laconic.model.blocks import find_chain
from laconic.model.calling import call

if TYPE_CHECKING:
    from laconic.recover.task import Task


@dataclass
class Answer:
    """What a model gave for a batch: its output, and what the modules that were watched gave, call by call."""

    output: Any
    features: dict[str, list[Tensor]] = field(default_factory=dict)


class Loss(ABC):
    """A loss of one minibatch, a scalar to be minimised. `0.1 * TaskLoss() + 0.9 * KL()` is a weighted sum."""

    @property
    def compares(self) -> bool:
        """Whether it compares with the original, which then is in memory and run beside the model."""
        return False

    def watches(self, model: nn.Module) -> list[str]:
        """The modules whose outputs it reads. Raises: SchemeError where it finds none in this model."""
        return []

    @abstractmethod
    def __call__(self, own: Answer, original: Answer | None, batch: Batch, task: "Task") -> Tensor:
        """The loss of a batch, from the model's answer and, if it `compares`, the original's."""

    def __add__(self, other: "Loss") -> "Weighted":
        return Weighted((*_parts(self), *_parts(other)))

    def __rmul__(self, share: float) -> "Weighted":
        return Weighted(tuple((share * weight, part) for weight, part in _parts(self)))


@dataclass(frozen=True)
class TaskLoss(Loss):
    """The loss of the task: cross-entropy of labels or of the next token, or the user's own."""

    def __call__(self, own: Answer, original: Answer | None, batch: Batch, task: "Task") -> Tensor:
        return task.loss_of(own.output, batch)


@dataclass(frozen=True)
class KL(Loss):
    """T^2 KL(softmax(z_original / T) || softmax(z / T)) in nats, the mean over examples (and positions); T is the
    `temperature`.

    Raises: SchemeError where outputs are no logits. Source: Hinton et al. 2015, section 2. Cost: a forward pass of the
    original.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < float("inf")):
            raise SchemeError(f"KL: expected a temperature above 0, got {self.temperature!r}")

    @property
    def compares(self) -> bool:
        return True

    def __call__(self, own: Answer, original: Answer | None, batch: Batch, task: "Task") -> Tensor:
        assert original is not None
        return distance_of(own.output, original.output, self.temperature)


@dataclass(frozen=True)
class Features(Loss):
    """Mean squared error between what modules of the model and the same modules of the original give.

    `modules`: names or patterns ("layer*", "*.mlp"); without any, the hidden states behind every block of the model's
    chain, found by structure. The mean over entries, then over modules. Raises: SchemeError for a pattern that no
    module matches, and a model without a chain.
    Source: Romero et al. 2015 (FitNets), eq. 3; Jiao et al. 2020 (TinyBERT), eq. 8. Cost: a forward pass of the
    original.
    """

    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.modules, tuple) and all(isinstance(name, str) for name in self.modules)):
            raise SchemeError(f"Features: modules is a tuple of names or patterns, got {self.modules!r}")

    @property
    def compares(self) -> bool:
        return True

    def watches(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_modules() if name]
        if not self.modules:
            chain = find_chain(model)
            if chain is None:
                raise SchemeError("Features: the model shows no chain of blocks; name the modules to compare")
            return [f"{chain}.{i}" for i in range(len(model.get_submodule(chain)))]  # type: ignore[arg-type]
        for pattern in self.modules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SchemeError(f"Features: no module of the model matches {pattern!r}")
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.modules)]

    def __call__(self, own: Answer, original: Answer | None, batch: Batch, task: "Task") -> Tensor:
        assert original is not None
        errors = [
            F.mse_loss(mine.float(), theirs.float())
            for name in original.features
            for mine, theirs in zip(own.features[name], original.features[name], strict=True)
        ]
        if not errors:
            raise SchemeError("Features: none of the modules to compare ran")
        return torch.stack(errors).mean()


@dataclass(frozen=True, repr=False)
class Weighted(Loss):
    """sum_i weight_i loss_i."""

    parts: tuple[tuple[float, Loss], ...]

    def __post_init__(self) -> None:
        for weight, part in self.parts:
            if not (isinstance(weight, int | float) and 0 <= weight < float("inf") and isinstance(part, Loss)):
                raise SchemeError(f"a sum of losses: expected a weight from 0 times a loss, got {weight!r} * {part!r}")

    @property
    def compares(self) -> bool:
        return any(part.compares for _, part in self.parts)

    def watches(self, model: nn.Module) -> list[str]:
        return list(dict.fromkeys(name for _, part in self.parts for name in part.watches(model)))

    def __call__(self, own: Answer, original: Answer | None, batch: Batch, task: "Task") -> Tensor:
        (first, loss), *others = self.parts
        total = first * loss(own, original, batch, task)
        for weight, part in others:
            total = total + weight * part(own, original, batch, task)
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{weight!r} * {part!r}" for weight, part in self.parts)


def _parts(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    return loss.parts if isinstance(loss, Weighted) else ((1.0, loss),)


def answer_of(model: nn.Module, batch: Batch, watched: Sequence[str]) -> Answer:
    """What a model gives for a batch, and what the modules of these names give on the way."""
    with _watching(model, watched) as features:
        return Answer(call(model, batch), features)


@contextmanager
def _watching(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the first tensor of every output of these modules is kept."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found = tensors_in(output)
            if not found:
                raise SchemeError(f"Features: {name} gives no tensor but a {type(output).__name__}")
            seen[name].append(found[0])

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distance_of(output: Any, wanted: Any, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(output / T)) in nats, the mean over examples (and positions), of logits
    [..., classes].
    """
    own, other = (getattr(x, "logits", x) for x in (output, wanted))
    if not (isinstance(own, Tensor) and isinstance(other, Tensor)):
        raise SchemeError(f"KL (distill) needs a model whose output is logits, got a {type(own).__name__}")
    own, other = (x.flatten(0, -2).float() / temperature for x in (own, other))
    return temperature**2 * F.kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True)
