"""The learning-compression algorithm: training and compression in turns, bound together by an augmented Lagrangian."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.model.batches import Batch
from laconic.model.sites import Slot
from laconic.recover.base import Recovery
from laconic.recover.checks import check_counts, check_steps
from laconic.recover.compressed import Bench
from laconic.recover.course import Course, Start, clones
from laconic.recover.finetune import FineTune
from laconic.recover.steps import Steps
from laconic.recover.train import Trainer
from laconic.weights import Weight

_FAR = 0.5  # of ||w||: measured on digits, runs that end beyond it recover little (docs/recovery.md)
# steps of Adam and its kin do not grow with the gradient, so no pull can be counted; measured to be a fair beginning
_ADAM_MU = 0.1


@dataclass(frozen=True, repr=False)
class LC(Recovery):
    """min L(w) s.t. w = D(Theta) by alternating two steps, for j = 0 ... steps - 1 with mu_j = mu a^j:

        L:  w     <- argmin L(w) + mu_j / 2 ||w - D(Theta) - lambda / mu_j||^2     (`minibatches` steps of training;
        `first` at j = 0)
        C:  Theta <- C(w - lambda / mu_j)                                          (the scheme's projection, whatever it
        is)
            lambda <- lambda - mu_j (w - D(Theta))

    `restart_rate`: the learning rate falls from lr to lr_end in every L-step anew and not once over the run;
    `restart_optimizer`: an L-step begins without the momentum of the one before. Both as the published code has them;
    the paper says neither. `multipliers=False` leaves lambda at zero: the quadratic penalty. `refit=False` keeps masks,
    scales and tables of the first projection and moves values only. `then` trains on with side information kept. The
    model of least validation loss is returned. The learning rate never exceeds 1 / mu_j. Shorter L-steps pull w less
    towards D(Theta), so they need a larger mu: what counts is the pull mu x learning rate x minibatches /
    (1 - momentum). The paper's mu = 1e-3 belongs to L-steps of 4,500 minibatches, where the pull begins at 4.5.
    `mu=None` takes the mu whose pull is 1, which was measured best on short L-steps (0.1 where steps do not grow with
    the gradient, as Adam's).
    Source: Carreira-Perpinan 2017, fig. 2; Carreira-Perpinan and Idelbayev 2018; Condensa sections 3.3 and 4
    (defaults).
    Cost: first + (steps - 1) x minibatches training steps, steps + 1 projections and validations.
    """

    steps: int = 30
    minibatches: int = 100
    first: int | None = None
    mu: float | None = None
    a: float = 1.1
    learn: Steps = field(default_factory=Steps)
    multipliers: bool = True
    refit: bool = True
    then: FineTune | None = None
    norm_batches: int = 0
    restart_rate: bool = False
    restart_optimizer: bool = False

    def __post_init__(self) -> None:
        check_counts(
            self, 1, steps=self.steps, minibatches=self.minibatches, first=1 if self.first is None else self.first
        )
        check_counts(self, 0, norm_batches=self.norm_batches)
        check_steps(self, self.learn)
        if not isinstance(self.then, FineTune | None):
            raise SchemeError(f"LC: then should be FineTune(...) or None, got {self.then!r}")
        if not (0 < self.start_mu < math.inf and 1 <= self.a < math.inf):
            raise SchemeError(f"LC: expected mu > 0 and a >= 1, got {self.mu!r} and {self.a!r}")

    @property
    def start_mu(self) -> float:
        """mu_0: as given, or such that the pull of the first L-step is 1."""
        if self.mu is not None:
            return self.mu
        if not self.learn.grows:
            return _ADAM_MU
        return (1 - self.learn.carried) / (self.learn.first_rate * self.minibatches)

    def count(self, step: int) -> int:
        """The minibatches of an L-step."""
        return self.first if step == 0 and self.first is not None else self.minibatches

    @property
    def total(self) -> int:
        return self._alternating + (self.then.total if self.then else 0)

    @property
    def _alternating(self) -> int:
        """The minibatches of all L-steps."""
        return sum(self.count(j) for j in range(self.steps))

    @property
    def learns(self) -> tuple[Steps, ...]:
        return (self.learn,) if self.then is None else (self.learn, *self.then.learns)

    @property
    def leaves_w(self) -> bool:
        return self.then is None

    def over(self, train: Iterable[Batch]) -> "LC":
        return replace(self, then=self.then.over(train)) if self.then is not None else self

    def warmed(self, share: float = 0.5) -> "LC":
        """What a run from a neighbour's solution needs: no longer first step, and the later `share` of the steps, at
        their values of mu.
        """
        kept = max(1, round(self.steps * share))
        return replace(self, steps=kept, first=None, mu=self.start_mu * self.a ** (self.steps - kept))

    def check(self, model: nn.Module, slots: list[Slot]) -> None:
        super().check(model, slots)
        self.learn.check(p for p in model.parameters() if p.requires_grad)
        if self.then is not None:
            self.then.check(model, slots)

    def run(self, course: Course) -> None:
        bench = course.bench
        start = course.begin(
            lambda weights: {"step": -1, "mu": 0.0, "phase": "direct", "distance": _distance(bench, weights)}
        )
        if start.done <= self.steps:
            self._alternate(course, start)
        if self.then is None:
            return
        if start.done <= self.steps:  # from the best compressed point: w is what it decodes to, its masks stay
            bench.show(course.best.found)
            start = Start(clones(course.best.found.weights), self.steps)
        self.then.train(course, start, course.seed + 1, spent=self._alternating, before=self.steps)

    def _alternate(self, course: Course, start: Start) -> None:
        """The L- and C-steps."""
        bench, weights = course.bench, start.weights
        trainer = Trainer(bench.model, bench.task, self.learn, self._alternating, course.seed, bench.teacher)
        start.restore(trainer)
        lam = {slot: torch.zeros_like(value) for slot, value in bench.values().items()}
        _put(lam, start.state)
        course.tell_memory(trainer, copies=2)  # lambda, and what w is pulled to
        for j in range(start.done, self.steps):
            mu = self.start_mu * self.a**j
            if self.restart_optimizer:
                trainer.forget()
            loss = _learn(bench, trainer, weights, lam, mu, self.count(j), self.restart_rate)
            values = bench.values()
            shifted = {slot: value - lam[slot] / mu for slot, value in values.items()}
            if self.refit:
                weights = bench.projection.compress(shifted)
            else:
                bench.projection.keep_side(weights, shifted)
            if self.multipliers:
                _update(lam, values, weights, mu)
            course.offer(
                weights, j + 1, trainer.taken, trainer=trainer, state={slot.name: value for slot, value in lam.items()},
                step=j, mu=mu, loss=loss, phase="L-C", distance=_distance(bench, weights),
            )  # fmt: skip
        course.tell_faults(trainer)
        apart = _distance(bench, weights)
        if apart > _FAR:
            bench.projection.notes.append(
                f"L-C ended with ||w - D(Theta)|| at {apart:.0%} of ||w||: mu is too small for L-steps of "
                f"{self.minibatches} minibatches at lr "
                f"{self.learn.first_rate:g}; see docs/recovery.md"
            )


def _put(lam: dict[Slot, Tensor], state: Mapping[str, Tensor]) -> None:
    """Multipliers of a checkpoint in their places; without a checkpoint they stay zero. Raises: CheckpointError for
    those of other sites.
    """
    if state and state.keys() != {slot.name for slot in lam}:
        raise CheckpointError(f"the state holds multipliers of {sorted(state)}, expected {sorted(s.name for s in lam)}")
    for slot, value in lam.items() if state else ():
        value.copy_(state[slot.name])


def _learn(
    bench: Bench,
    trainer: Trainer,
    weights: dict[Slot, Weight],
    lam: dict[Slot, Tensor],
    mu: float,
    count: int,
    restart: bool,
) -> float:
    """The L-step; returns the mean training loss, penalty not included."""
    with torch.no_grad():
        targets = {slot: slot.view.restore(weight.forward()) + lam[slot] / mu for slot, weight in weights.items()}

    def pull() -> None:
        with torch.no_grad():
            for slot, target in targets.items():
                parameter = bench.parameters[slot]
                if parameter.grad is None:  # a weight this batch did not use
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(parameter - target, alpha=mu)

    return trainer.run(count, penalize=pull, limit=1 / mu, restart=restart)


def _update(lam: dict[Slot, Tensor], values: dict[Slot, Tensor], weights: dict[Slot, Weight], mu: float) -> None:
    with torch.no_grad():
        for slot, weight in weights.items():
            lam[slot].sub_(values[slot] - slot.view.restore(weight.forward()), alpha=mu)


def _distance(bench: Bench, weights: Mapping[Slot, Weight]) -> float:
    """||w - D(Theta)|| / ||w||: how far the constraint is from being met."""
    apart = size = 0.0
    with torch.no_grad():
        for slot, value in bench.values().items():
            apart += float((value - slot.view.restore(weights[slot].forward())).square().sum(dtype=torch.float64))
            size += float(value.square().sum(dtype=torch.float64))
    return (apart / size) ** 0.5 if size else 0.0
