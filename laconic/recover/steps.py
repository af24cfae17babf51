"""How minibatch steps are taken, as a value: the optimizer, the way its rate goes, and what is minimised."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from laconic.errors import SchemeError
from laconic.methods.arguments import check_values
from laconic.recover.losses import KL, Loss, TaskLoss, Weighted
from laconic.recover.optimizers import Optimizer, Parameters
from laconic.recover.schedules import Geometric, Schedule
from laconic.recover.written import QUIET, Usual, given, written

_NUMBERS = ("lr", "lr_end", "momentum", "weight_decay", "clip", "distill", "temperature", "beta2")
_NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


@dataclass(frozen=True, repr=False)
class Steps:
    """How the minibatch steps of a recovery are taken.

    `optimizer`: "sgd", "adam" or "adamw", of which `momentum` is the momentum, or Adam's first beta, `beta2` the
    second, and `weight_decay` the decay (apart from the gradient for "adamw"); or an `Optimizer(name, **arguments)`,
    which says all of that itself, its `lr` too. The learning rate goes by a `schedule`; without one it falls from `lr`
    to `lr_end` geometrically, minibatch by minibatch, over the whole recovery: lr_t = lr (lr_end / lr)^(t / T). `clip`
    bounds the norm of the loss's gradient; `precision` is that of the products in the forward pass. A step takes the
    mean gradient of `accumulate` minibatches and counts as one minibatch everywhere. `loss` is what is minimised: the
    task's, `KL` to the original's answers, `Features`, or a weighted sum. Without one, (1 - distill) TaskLoss + distill
    KL(temperature). What compares with the original takes a third more time per minibatch, and a copy of it in memory.
    Raises: SchemeError for numbers out of range, and for what is said twice.
    Source: Condensa section 4, "L-C Optimizer Settings" (SGD with momentum 0.9, decay over each minibatch; Adam at a
    fixed rate); Hinton et al. 2015, section 2 (distillation).
    """

    optimizer: str | Optimizer = "sgd"
    lr: float = Usual(0.01)
    lr_end: float = Usual(1e-4)
    momentum: float = Usual(0.9)
    weight_decay: float = Usual(0.0)
    clip: float | None = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"
    distill: float = Usual(0.0)
    temperature: float = Usual(3.0)
    accumulate: int = 1
    beta2: float = Usual(0.999)
    schedule: Schedule | None = field(default=None, metadata=QUIET)
    loss: Loss | None = field(default=None, metadata=QUIET)

    def __post_init__(self) -> None:
        check_values("Steps", Steps, {name: getattr(self, name) for name in _NUMBERS})
        if not (0 <= self.distill <= 1 and 0 < self.temperature < math.inf):
            raise SchemeError(
                f"Steps: expected distill in 0 ... 1 and temperature > 0, got {self.distill!r} and {self.temperature!r}"
            )
        if not isinstance(self.optimizer, Optimizer) and self.optimizer not in tuple(_NAMES):
            raise SchemeError(
                "Steps: optimizer must be sgd, adam or adamw, or Optimizer(name, ...) for any other of torch.optim, "
                f"got {self.optimizer!r}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise SchemeError(f"Steps: precision must be float32 or bfloat16, got {self.precision!r}")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise SchemeError(f"Steps: accumulate is a whole number, at least 1, got {self.accumulate!r}")
        if not (0 <= self.momentum < 1 and 0 <= self.beta2 < 1 and 0 <= self.weight_decay < math.inf):
            raise SchemeError(
                f"Steps: expected momentum and beta2 from 0 to below 1 and weight_decay >= 0, got {self.momentum!r}, "
                f"{self.beta2!r} and "
                f"{self.weight_decay!r}"
            )
        if self.clip is not None and not self.clip > 0:
            raise SchemeError(f"Steps: expected a clip above 0, or None, got {self.clip!r}")
        if not isinstance(self.schedule, Schedule | None) or not isinstance(self.loss, Loss | None):
            raise SchemeError(
                f"Steps: expected a schedule such as Cosine() and a loss such as KL(), or None, got {self.schedule!r} "
                f"and {self.loss!r}"
            )
        self._check_said_once()
        if not (0 < self.first_rate < math.inf):
            raise SchemeError(f"Steps: expected lr above 0, got {self.first_rate!r}")
        if self.schedule is None and not (0 < self.lr_end <= self.first_rate):
            raise SchemeError(
                f"Steps: expected 0 < lr_end <= lr, got lr {self.first_rate!r} and lr_end {self.lr_end!r}"
            )

    def _check_said_once(self) -> None:
        """Raises SchemeError where two arguments say the same thing."""
        named = given(self)
        if isinstance(self.optimizer, Optimizer):
            own = ["momentum", "beta2", "weight_decay", *(["lr"] if self.optimizer.lr is not None else [])]
            if twice := [name for name in own if name in named]:
                raise SchemeError(f"Steps: {', '.join(twice)} belongs into {self.optimizer!r}")
        if self.schedule is not None and "lr_end" in named:
            raise SchemeError(f"Steps: lr_end belongs into the schedule, {self.schedule!r}: as a share of lr")
        if self.loss is not None and (twice := [name for name in ("distill", "temperature") if name in named]):
            raise SchemeError(f"Steps: {', '.join(twice)} belongs into the loss, {self.loss!r}")

    def __repr__(self) -> str:
        old = isinstance(self.optimizer, str) and self.schedule is None and self.loss is None
        return written(self) if old else written(self, given(self))

    @property
    def first_rate(self) -> float:
        """The learning rate that the schedule is a factor of."""
        own = self.optimizer.lr if isinstance(self.optimizer, Optimizer) else None
        return float(self.lr if own is None else own)

    @property
    def moves(self) -> Optimizer:
        """The optimizer as a value, whichever way it was said."""
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        decay: dict[str, Any] = {"weight_decay": float(self.weight_decay)}
        if self.optimizer == "sgd":
            return Optimizer("SGD", momentum=float(self.momentum), **decay)
        return Optimizer(_NAMES[self.optimizer], betas=(float(self.momentum), float(self.beta2)), **decay)

    @property
    def grows(self) -> bool:
        """Whether a step grows with the gradient."""
        return self.optimizer.grows if isinstance(self.optimizer, Optimizer) else self.optimizer == "sgd"

    @property
    def carried(self) -> float:
        """How much of a step is carried over to the next one: the momentum."""
        return self.optimizer.momentum if isinstance(self.optimizer, Optimizer) else self.momentum

    @property
    def minimises(self) -> Loss:
        """The loss as a value, whichever way it was said."""
        if self.loss is not None:
            return self.loss
        if not self.distill:
            return TaskLoss()
        return Weighted(((1 - self.distill, TaskLoss()), (float(self.distill), KL(float(self.temperature)))))

    def rate(self, t: int, total: int) -> float:
        """The learning rate of minibatch t of `total`."""
        schedule = self.schedule or Geometric(end=self.lr_end / self.first_rate)
        return self.first_rate * schedule.factor(t, total)

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises SchemeError unless the optimizer can move parameters of these shapes. Nothing is computed."""
        shapes = {(tuple(p.shape), p.dtype): p for p in parameters}
        if shapes and isinstance(self.optimizer, Optimizer):  # those that have a name of ours move any
            self.build([nn.Parameter(torch.empty_like(p, device="meta")) for p in shapes.values()])

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of these parameters, or groups of them. Raises: SchemeError for parameters that it cannot
        move.
        """
        return self.moves.build(parameters, self.first_rate)
