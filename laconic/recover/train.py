"""Training one minibatch after the other: the stream of data, its seeds, steps that are skipped when a gradient is not
finite.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.tensors import is_finite
from laconic.errors import RecoveryError, SchemeError
from laconic.host.randomness import private_randomness
from laconic.model.batches import Batch, to_device
from laconic.recover.batches import stream
from laconic.recover.losses import answer_of
from laconic.recover.steps import Steps
from laconic.recover.task import Task

_SKIPPED = 0.1  # of the minibatches may be skipped, beyond the first few, before training counts as diverged

Hook = Callable[[], None]


@dataclass
class Trainer:
    """Takes minibatch steps on a module; counts them, and those that were skipped since their loss or gradient was not
    finite.

    `moved`: what the optimizer moves, by name; without it, every parameter of the module that requires a gradient.
    `teacher`: the original, for losses that compare with it. `faults` says what was not finite and how often: "the
    loss", or the first parameter whose gradient was not.
    Raises: SchemeError where there is nothing to train, or the optimizer cannot move it, or the loss finds no modules.
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
    moved: Mapping[str, nn.Parameter] | None = None

    def __post_init__(self) -> None:
        if self.moved is None:
            self.moved = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.moved:
            raise SchemeError("there is nothing to train: every parameter is compressed, or is to stay as it is")
        self.named, self.parameters = self.moved, list(self.moved.values())
        self.optimizer = self.steps.build(self.parameters)
        self.device = next(self.model.parameters()).device
        self.loss = self.steps.minimises
        self.watched = self.loss.watches(self.model)
        self._stream: Iterator[Batch] = stream(self.task.train, self.seed)
        self._drawn = 0

    def run(
        self,
        count: int,
        penalize: Hook | None = None,
        before: Hook | None = None,
        through: Hook | None = None,
        after: Hook | None = None,
        limit: float = math.inf,
        restart: bool = False,
    ) -> float:
        """Take `count` steps and return the mean loss of those that were not skipped.

        Hooks: `before` the forward pass, `through` to turn gradients of what the network saw into those of what is
        trained, `penalize` to add to gradients that were clipped, `after` a step. No learning rate exceeds `limit`;
        with `restart` it falls over these steps alone, from `lr` to `lr_end`, and not over the whole recovery. What is
        drawn at random inside (dropout, augmentation) follows from the seed and the minibatches taken before.
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
            # of an embedding: neither clipped nor added to as it is
            if parameter.grad is not None and parameter.grad.is_sparse:
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
                    f"training diverged: {self.skipped} of {self.taken + 1} minibatches had a loss or gradient that is "
                    "not finite; "
                    f"lower lr (it is {self.steps.first_rate:g}). Not finite: {self.told_faults()}"
                )
        if after is not None:
            after()
        return value if fine else None

    def _fault(self, value: float) -> str:
        """What was not finite."""
        if not math.isfinite(value):
            return "the loss"
        named = ((name, p.grad) for name, p in self.named.items() if p.grad is not None)
        return next(
            (f"the gradient of {name}" for name, grad in named if not is_finite(grad)), "the norm of the gradient"
        )

    def told_faults(self) -> str:
        """`faults` in words."""
        return ", ".join(f"{what} ({count} times)" if count > 1 else what for what, count in self.faults.items())

    def _loss(self, batch: Batch) -> Tensor:
        own, original = answer_of(self.model, batch, self.watched), None
        if self.loss.compares:
            assert self.teacher is not None
            with torch.no_grad():
                original = answer_of(self.teacher, batch, self.watched)
        return self.loss(own, original, batch, self.task)

    def state(self) -> dict[str, Tensor]:
        """What the optimizer carries from step to step, by the index of the parameter and the name of the quantity."""
        kept: dict[Any, Any] = self.optimizer.state_dict()["state"]
        return {
            f"{i}.{key}": value
            for i, values in kept.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def counts(self) -> dict[str, Any]:
        """What was counted so far, for JSON."""
        return {"taken": self.taken, "skipped": self.skipped, "faults": self.faults}

    def restore(self, state: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        """The inverse of `state` and `counts`, into a trainer of the same parameters."""
        whole = self.optimizer.state_dict()
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            index, key = name.split(".", 1)
            kept.setdefault(int(index), {})[key] = tensor
        whole["state"] = kept
        self.optimizer.load_state_dict(whole)
        self.taken, self.skipped, self.faults = counts["taken"], counts["skipped"], dict(counts["faults"])
