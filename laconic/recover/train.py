"""Training one minibatch after the other: the stream of data, the schedule, steps that are skipped when a gradient is not finite."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.blocks import Batch, call, to_device
from laconic.errors import RecoveryError, SchemeError
from laconic.recover.batches import private_randomness, stream
from laconic.recover.task import Task
from laconic.tensors import is_finite

_SKIPPED = 0.1  # of the minibatches may be skipped, beyond the first few, before training counts as diverged


@dataclass(frozen=True)
class Steps:
    """How the minibatch steps of a recovery are taken.

    The learning rate falls from `lr` to `lr_end` geometrically, minibatch by minibatch, over the whole recovery:
    lr_t = lr (lr_end / lr)^(t / T). `clip` bounds the norm of the loss's gradient; `precision` is that of the products in the forward pass.
    `distill` mixes in the original model's answers: (1 - distill) loss + distill T^2 KL(softmax(z_original / T) || softmax(z / T)), T the
    `temperature`; a third more time per minibatch, and a copy of the original in memory.
    Source: Condensa section 4, "L-C Optimizer Settings" (SGD with momentum 0.9, decay over each minibatch; Adam at a fixed rate);
    Hinton et al. 2015, section 2 (distillation).
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    lr_end: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: float = 0.0
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if not (0 <= self.distill <= 1 and 0 < self.temperature < math.inf):
            raise SchemeError(f"Steps: expected distill in 0 ... 1 and temperature > 0, got {self.distill!r} and {self.temperature!r}")
        if self.optimizer not in ("sgd", "adam") or self.precision not in ("float32", "bfloat16"):
            raise SchemeError(
                f"Steps: optimizer must be sgd or adam and precision float32 or bfloat16, got {self.optimizer!r} and {self.precision!r}"
            )
        if not (0 < self.lr_end <= self.lr < math.inf):
            raise SchemeError(f"Steps: expected 0 < lr_end <= lr, got lr {self.lr!r} and lr_end {self.lr_end!r}")
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise SchemeError(f"Steps: expected 0 <= momentum < 1 and weight_decay >= 0, got {self.momentum!r} and {self.weight_decay!r}")
        if self.clip is not None and not self.clip > 0:
            raise SchemeError(f"Steps: expected a clip above 0, or None, got {self.clip!r}")

    def rate(self, t: int, total: int) -> float:
        """The learning rate of minibatch t of `total`."""
        return self.lr * (self.lr_end / self.lr) ** (t / max(total - 1, 1))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, betas=(self.momentum, 0.999), weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


Hook = Callable[[], None]


@dataclass
class Trainer:
    """Takes minibatch steps on a module; counts them, and those that were skipped since their loss or gradient was not finite."""

    model: nn.Module
    task: Task
    steps: Steps
    total: int
    seed: int = 0
    teacher: nn.Module | None = None
    taken: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.steps.build(self.parameters)
        self.device = self.parameters[0].device
        self._stream: Iterator[Batch] = stream(self.task.train, self.seed)
        self._drawn = 0

    def run(
        self, count: int, penalize: Hook | None = None, before: Hook | None = None, after: Hook | None = None, limit: float = math.inf
    ) -> float:  # fmt: skip
        """Take `count` steps and return the mean loss of those that were not skipped.

        Hooks: `before` the forward pass, `penalize` to add to gradients, `after` a step. No learning rate exceeds `limit`. What is drawn at
        random inside (dropout, augmentation) follows from the seed and the minibatches taken before.
        Raises: RecoveryError when a tenth of the minibatches gave no finite gradient.
        """
        losses: list[float] = []
        with private_randomness(self.seed, 0, self.device):
            while self._drawn < self.taken:  # a resumed run: what was seen before
                next(self._stream)
                self._drawn += 1
        sound = {buffer: buffer.clone() for buffer in self.model.buffers() if buffer.is_floating_point()}
        with private_randomness(self.seed, self.taken, self.device):
            self.model.train()
            for _ in range(count):
                batch = to_device(next(self._stream), self.device)
                self._drawn += 1
                for group in self.optimizer.param_groups:
                    group["lr"] = min(self.steps.rate(self.taken, self.total), limit)
                loss = self._step(batch, penalize, before, after)
                self.taken += 1
                if loss is not None:
                    losses.append(loss)
                    continue
                for buffer, kept in sound.items():  # one bad batch would stay in a norm's running statistics for good
                    if not is_finite(buffer):
                        buffer.copy_(kept)
        return sum(losses) / len(losses) if losses else math.nan

    def _step(self, batch: Batch, penalize: Hook | None, before: Hook | None, after: Hook | None) -> float | None:
        """The loss of one minibatch; None if its step was skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        if before is not None:
            before()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.steps.precision == "bfloat16"):
            loss = self._loss(batch)
        loss.backward()
        for parameter in self.parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:  # of an embedding: neither clipped nor added to as it is
                parameter.grad = parameter.grad.to_dense()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.steps.clip if self.steps.clip is not None else math.inf)
        if penalize is not None:
            penalize()
        value = float(loss.detach())
        fine = bool(torch.isfinite(norm)) and math.isfinite(value)
        if fine:
            self.optimizer.step()
        else:
            self.skipped += 1
            if self.skipped > 3 + _SKIPPED * self.taken:
                raise RecoveryError(
                    f"training diverged: {self.skipped} of {self.taken + 1} minibatches had a loss or gradient that is not finite; "
                    f"lower lr (it is {self.steps.lr:g})"
                )
        if after is not None:
            after()
        return value if fine else None

    def _loss(self, batch: Batch) -> Tensor:
        output, share = call(self.model, batch), self.steps.distill
        loss = self.task.loss_of(output, batch)
        if not share:
            return loss
        assert self.teacher is not None
        with torch.no_grad():
            wanted = call(self.teacher, batch)
        return (1 - share) * loss + share * distance_of(output, wanted, self.steps.temperature)


def distance_of(output: Any, wanted: Any, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(output / T)) in nats, the mean over examples (and positions)."""
    own, other = (getattr(x, "logits", x) for x in (output, wanted))
    if not (isinstance(own, Tensor) and isinstance(other, Tensor)):
        raise SchemeError(f"Steps: distill needs a model whose output is logits, got a {type(own).__name__}")
    own, other = (x.flatten(0, -2).float() / temperature for x in (own, other))
    return temperature**2 * F.kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the index of the parameter and the name of the quantity."""
    state: dict[Any, Any] = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in state.items() for key, value in values.items() if isinstance(value, Tensor)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into an optimizer of the same parameters."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    whole["state"] = state
    optimizer.load_state_dict(whole)
