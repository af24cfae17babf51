"""Training one minibatch after the other: the stream of data, the schedule, steps that are skipped when a gradient is not finite."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.disk.tensors import is_finite
from laconic.errors import RecoveryError, SchemeError
from laconic.host.randomness import private_randomness
from laconic.model.blocks import Batch, call, to_device
from laconic.recover.batches import stream
from laconic.recover.task import Task

_SKIPPED = 0.1  # of the minibatches may be skipped, beyond the first few, before training counts as diverged


@dataclass(frozen=True)
class Steps:
    """How the minibatch steps of a recovery are taken.

    The learning rate falls from `lr` to `lr_end` geometrically, minibatch by minibatch, over the whole recovery:
    lr_t = lr (lr_end / lr)^(t / T). `clip` bounds the norm of the loss's gradient; `precision` is that of the products in the forward pass.
    `momentum` is Adam's first beta too, `beta2` its second; "adamw" decays weights apart from the gradient. A step takes the mean gradient of
    `accumulate` minibatches and counts as one minibatch everywhere.
    `distill` mixes in the original model's answers: (1 - distill) loss + distill T^2 KL(softmax(z_original / T) || softmax(z / T)), T the
    `temperature`; a third more time per minibatch, and a copy of the original in memory.
    Source: Condensa section 4, "L-C Optimizer Settings" (SGD with momentum 0.9, decay over each minibatch; Adam at a fixed rate);
    Hinton et al. 2015, section 2 (distillation).
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    lr_end: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: float = 0.0
    temperature: float = 3.0
    accumulate: int = 1
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if not (0 <= self.distill <= 1 and 0 < self.temperature < math.inf):
            raise SchemeError(
                f"Steps: expected distill in 0 ... 1 and temperature > 0, got {self.distill!r} and {self.temperature!r}"
            )
        if self.optimizer not in ("sgd", "adam", "adamw") or self.precision not in ("float32", "bfloat16"):
            raise SchemeError(
                f"Steps: optimizer must be sgd, adam or adamw and precision float32 or bfloat16, got {self.optimizer!r} and {self.precision!r}"
            )
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise SchemeError(f"Steps: accumulate is a whole number, at least 1, got {self.accumulate!r}")
        if not (0 < self.lr_end <= self.lr < math.inf):
            raise SchemeError(f"Steps: expected 0 < lr_end <= lr, got lr {self.lr!r} and lr_end {self.lr_end!r}")
        if not (0 <= self.momentum < 1 and 0 <= self.beta2 < 1 and 0 <= self.weight_decay < math.inf):
            raise SchemeError(
                f"Steps: expected momentum and beta2 from 0 to below 1 and weight_decay >= 0, got {self.momentum!r}, {self.beta2!r} and "
                f"{self.weight_decay!r}"
            )
        if self.clip is not None and not self.clip > 0:
            raise SchemeError(f"Steps: expected a clip above 0, or None, got {self.clip!r}")

    def rate(self, t: int, total: int) -> float:
        """The learning rate of minibatch t of `total`."""
        return self.lr * (self.lr_end / self.lr) ** (t / max(total - 1, 1))

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer in ("adam", "adamw"):
            kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
            return kind(parameters, self.lr, betas=(self.momentum, self.beta2), weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


Hook = Callable[[], None]


@dataclass
class Trainer:
    """Takes minibatch steps on a module; counts them, and those that were skipped since their loss or gradient was not finite.

    `faults` says what was not finite and how often: "the loss", or the first parameter (in module order) whose gradient was not.
    """

    model: nn.Module
    task: Task
    steps: Steps
    total: int
    seed: int = 0
    teacher: nn.Module | None = None
    taken: int = 0
    skipped: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.steps.build(self.parameters)
        self.device = self.parameters[0].device
        self._stream: Iterator[Batch] = stream(self.task.train, self.seed)
        self._drawn = 0

    def run(
        self, count: int, penalize: Hook | None = None, before: Hook | None = None, through: Hook | None = None, after: Hook | None = None,
        limit: float = math.inf, restart: bool = False,
    ) -> float:  # fmt: skip
        """Take `count` steps and return the mean loss of those that were not skipped.

        Hooks: `before` the forward pass, `through` to turn gradients of what the network saw into those of what is trained, `penalize` to add
        to gradients that were clipped, `after` a step. No learning rate exceeds `limit`; with `restart` it falls over these steps alone, from
        `lr` to `lr_end`, and not over the whole recovery. What is drawn at random inside (dropout,
        augmentation) follows from the seed and the minibatches taken before.
        Raises: RecoveryError when a tenth of the minibatches gave no finite gradient.
        """
        losses: list[float] = []
        with private_randomness(self.seed, 0, self.device):
            while self._drawn < self.taken * self.steps.accumulate:  # a resumed run: what was seen before
                next(self._stream)
                self._drawn += 1
        sound = {buffer: buffer.clone() for buffer in self.model.buffers() if buffer.is_floating_point()}
        with private_randomness(self.seed, self.taken, self.device):
            self.model.train()
            for i in range(count):
                rate = self.steps.rate(*((i, count) if restart else (self.taken, self.total)))
                batches = [to_device(next(self._stream), self.device) for _ in range(self.steps.accumulate)]
                self._drawn += len(batches)
                for group in self.optimizer.param_groups:
                    group["lr"] = min(rate, limit)
                loss = self._step(batches, penalize, before, through, after)
                self.taken += 1
                if loss is not None:
                    losses.append(loss)
                    continue
                for buffer, kept in sound.items():  # one bad batch would stay in a norm's running statistics for good
                    if not is_finite(buffer):
                        buffer.copy_(kept)
        return sum(losses) / len(losses) if losses else math.nan

    def forget(self) -> None:
        """The optimizer as it was at the beginning: without momentum and second moments."""
        self.optimizer = self.steps.build(self.parameters)

    def _step(
        self, batches: list[Batch], penalize: Hook | None, before: Hook | None, through: Hook | None, after: Hook | None
    ) -> float | None:  # fmt: skip
        """The mean loss of the minibatches of one step; None if it was skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        if before is not None:
            before()
        value = 0.0
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.steps.precision == "bfloat16"):
                loss = self._loss(batch) / len(batches)
            loss.backward()
            value += float(loss.detach())
        for parameter in self.parameters:
            if (
                parameter.grad is not None and parameter.grad.is_sparse
            ):  # of an embedding: neither clipped nor added to as it is
                parameter.grad = parameter.grad.to_dense()
        if through is not None:
            through()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.steps.clip if self.steps.clip is not None else math.inf)
        if penalize is not None:
            penalize()
        fine = bool(torch.isfinite(norm)) and math.isfinite(value)
        if fine:
            self.optimizer.step()
        else:
            self.skipped += 1
            fault = self._fault(value)
            self.faults[fault] = self.faults.get(fault, 0) + 1
            if self.skipped > 3 + _SKIPPED * self.taken:
                raise RecoveryError(
                    f"training diverged: {self.skipped} of {self.taken + 1} minibatches had a loss or gradient that is not finite; "
                    f"lower lr (it is {self.steps.lr:g}). Not finite: {self.told_faults()}"
                )
        if after is not None:
            after()
        return value if fine else None

    def _fault(self, value: float) -> str:
        """What was not finite."""
        if not math.isfinite(value):
            return "the loss"
        named = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        return next(
            (f"the gradient of {name}" for name, grad in named if not is_finite(grad)), "the norm of the gradient"
        )

    def told_faults(self) -> str:
        """`faults` in words."""
        return ", ".join(f"{what} ({count} times)" if count > 1 else what for what, count in self.faults.items())

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
    return {
        f"{i}.{key}": value for i, values in state.items() for key, value in values.items() if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into an optimizer of the same parameters."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    whole["state"] = state
    optimizer.load_state_dict(whole)
