"""Block reconstruction: one part of a model after the other is trained to answer as the original does, on inputs from
the compressed prefix.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.host.randomness import private_randomness
from laconic.methods.base import Method
from laconic.model.batches import Batch, unlabelled
from laconic.model.blocks import InMemory, find_chain, open_chain
from laconic.model.calling import in_evaluation
from laconic.model.sites import Slot
from laconic.recover.base import Recovery
from laconic.recover.batches import stream
from laconic.recover.checks import check_choice, check_counts, check_steps
from laconic.recover.compressed import Bench
from laconic.recover.reconstruct import Fitting, Trainee, reconstruct
from laconic.recover.relaxed import silent_of
from laconic.recover.steps import Steps
from laconic.recover.targets import Matched, Part, Per, Target, chain_parts, count_parts, whole_parts
from laconic.weights import Weight
from laconic.weights.relax import Relaxation, Tuned, float_states

if TYPE_CHECKING:
    from laconic.recover.course import Course, Start

Sites = Literal["side", "w", "none"]
Norms = Literal["norms", "none"]


def adam(lr: float) -> Steps:
    """Adam at a rate, relative to the size of what it moves, that falls to a tenth."""
    return Steps("adam", lr=lr, lr_end=lr / 10, clip=None)


@dataclass(frozen=True, repr=False)
class Reconstruction(Recovery):
    """What recoveries that go part by part share.

    Each block of the chain (`per="layer"`: each layer that holds a site; where the model is no chain, each element of
    its containers) is trained for `steps` minibatches, drawn from `samples` minibatches of training data, to answer as
    the original does: the mean squared error, weighted by Fisher information if asked. Its inputs are those the
    compressed prefix gives; `target="original"` is what the original answers to its own inputs (the asymmetric target,
    which makes up for what the prefix lost), "compressed" what it answers to these. A share `held` of the minibatches
    is not trained on: on them each of `checks` states is measured, as it would be stored, and the best is kept, or the
    start where none is better. `patience`: checks without a better state after which a part is left. The whole model is
    judged after every `every` parts, and at the end; after each part the state is stored, where there is a folder. The
    learning rate of `learn` is relative to the size of what is trained.
    Memory: a copy of the model, and four states per block and minibatch. Cost: steps x a forward and a backward pass of
    every part.
    """

    steps: int = 300
    samples: int = 32
    learn: Steps = field(default_factory=lambda: adam(1e-2))
    target: Target = "original"
    fisher: bool = False
    per: Per = "block"
    held: float = 0.125
    checks: int = 4
    patience: int | None = None
    every: int = 4
    norm_batches: int = 0

    def __post_init__(self) -> None:
        patience = 1 if self.patience is None else self.patience
        check_counts(self, 1, steps=self.steps, checks=self.checks, every=self.every, patience=patience)
        check_counts(self, 2, samples=self.samples)
        check_counts(self, 0, norm_batches=self.norm_batches)
        check_steps(self, self.learn)
        check_choice(self, "target", self.target, get_args(Target))
        check_choice(self, "per", self.per, get_args(Per))
        name = type(self).__name__
        if not (isinstance(self.held, int | float) and 0 < self.held < 1):
            raise SchemeError(f"{name}: held is a share of the minibatches, above 0 and below 1, got {self.held!r}")
        if self.learn.loss is not None or self.learn.distill or self.learn.accumulate != 1:
            raise SchemeError(f"{name}: a part has a loss of its own; loss, distill and accumulate do not belong here")

    @property
    def total(self) -> int:
        """Minibatches of one part."""
        return self.steps

    def total_on(self, model: nn.Module, slots: Sequence[Slot]) -> int:
        return self.steps * count_parts(model, slots, self.per)

    def check(self, model: nn.Module, slots: list[Slot]) -> None:
        super().check(model, slots)
        self.learn.check(list(model.parameters()))

    @abstractmethod
    def relaxation(self, method: Method | None, weight: Weight, W: Tensor) -> Relaxation | None:
        """What a site [out, in] is trained through; None leaves it as compression made it.

        `method` made the weight; it is None where the weight was read from a directory.
        """

    def along(self, state: Tensor) -> bool:
        """Whether a parameter that is no site is trained with the sites of its part."""
        return False

    def penalty(self, relaxations: Sequence[Relaxation]) -> Tensor | None:
        """A scalar added to a part's error, which is 1 at the start; None for nothing."""
        return None

    def run(self, course: "Course") -> None:
        """Direct compression, then part after part. Raises: SchemeError where nothing in any part can be trained."""
        original = copy.deepcopy(course.bench.model).eval().requires_grad_(False)
        _Walk(course, self, original, course.begin()).run()


@dataclass(frozen=True, repr=False)
class Blockwise(Reconstruction):
    """Part by part, what compression left free is trained to match the original's answers.

    `trains`: "side" scales, float zero points, tables, low-rank factors and dense parts, codes and masks as they are;
    "w" the uncompressed values through what their method makes of them (straight through, or soft clusters); "none".
    `beside`: "norms" trains norms and biases of the part too.
    Source: Li et al. 2021 (BRECQ), section 3.2 (block reconstruction, Fisher weights); Nagel et al. 2020, eq. 25
    (asymmetric target).
    """

    patience: int | None = 2
    trains: Sites = "side"
    beside: Norms = "norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "trains", self.trains, get_args(Sites))
        check_choice(self, "beside", self.beside, get_args(Norms))
        if self.trains == "none" and self.beside == "none":
            raise SchemeError("Blockwise: with trains='none' and beside='none' there is nothing to train")

    def relaxation(self, method: Method | None, weight: Weight, W: Tensor) -> Relaxation | None:
        if self.trains == "w":
            if method is None:
                raise SchemeError(
                    f"{self!r}: of a stored weight only what is beside its codes can be trained; say trains='side'"
                )
            return method.relax(weight, W)
        return Tuned(weight) if self.trains == "side" and float_states(weight) else None

    def along(self, state: Tensor) -> bool:
        return self.beside == "norms" and state.dim() <= 1


class _Walk:
    """A module in memory, part by part. `original` holds the uncompressed w; the bench's module the compressed values,
    as far as they are.
    """

    def __init__(self, course: "Course", how: Reconstruction, original: nn.Module, start: "Start") -> None:
        self.course, self.how, self.original, self.weights = course, how, original, start.weights
        self.bench: Bench = course.bench
        self.device = next(original.parameters()).device
        self.done = start.done
        slots, kept = self.bench.projection.slots, start.state
        self.taken, self.waiting = (int(kept[name]) if kept else 0 for name in ("taken", "waiting"))
        self.trained = {slots[int(i)] for i in kept["trained"]} if kept else set()

    def run(self) -> None:
        batches = self._minibatches()
        with in_evaluation(self.bench.model), in_evaluation(self.original), self.bench.rounding(self.weights):
            self.bench.put(self.weights)
            self._silent = {id(parameter): mask for parameter, mask in silent_of(self.bench, self.weights)}
            for part in self._parts(batches):
                self._part(part)
                self.done, self.waiting = self.done + 1, self.waiting + 1
                self._told(part.path, judge=self.waiting >= self.how.every)
            if self.waiting:
                self._told("", judge=True)
        if not self.trained and not self.taken:
            raise SchemeError(f"{self.how!r}: found nothing in this model that it trains")
        self._tell_left()

    def _minibatches(self) -> list[Batch]:
        with private_randomness(self.course.seed, 0, self.device):
            drawn = zip(range(self.how.samples), stream(self.bench.task.train, self.course.seed), strict=False)
            return [unlabelled(batch) for _, batch in drawn]

    def _parts(self, batches: list[Batch]) -> Iterator[Part]:
        how = Matched(self.how.per, self.how.target, self.how.fisher, self.course.seed)
        chain = find_chain(self.original)
        original, why = open_chain(InMemory(self.original), chain, batches[0])
        compressed, _ = open_chain(InMemory(self.bench.model), chain, batches[0])
        slots = self.bench.projection.slots
        if original is not None and compressed is not None:
            return chain_parts(original, compressed, batches, slots, how, done=self.done)
        note = f"{why}; the whole model is run for every part"
        if why and note not in self.bench.projection.notes:
            self.bench.projection.notes.append(note)
        return whole_parts(self.original, self.bench.model, batches, slots, how, done=self.done)

    def _part(self, part: Part) -> None:
        """Train a part, and put into the module what was found."""
        trainee = self._trainee(part)
        if not (trainee.relaxations or trainee.beside):
            return
        fitting = reconstruct(part, trainee, self.how, self.course.seed, self.device)
        self.taken += fitting.taken
        self.trained |= set(trainee.relaxations)
        if fitting.found is None:
            self.bench.projection.notes.append(why_left(part.path, fitting))
            return
        self.weights |= fitting.found.weights
        with torch.no_grad():
            for slot, weight in fitting.found.weights.items():
                self.bench.parameters[slot].copy_(slot.view.restore(weight.forward()))
            for name, state in fitting.found.beside.items():
                part.module.get_parameter(name).copy_(state)

    def _trainee(self, part: Part) -> Trainee:
        bench, sites = self.bench, []
        for slot in within(part, bench.projection.slots):
            if slot not in self.trained:
                W = slot.view.matrix(self.original.get_parameter(slot.parameter))
                sites.append(Trained(slot, bench.projection.chosen[slot], self.weights[slot], W))
        compressed = {id(parameter) for parameter in bench.parameters.values()}
        beside = {name: p for name, p in part.module.named_parameters() if id(p) not in compressed}
        return trainee_of(self.how, part, sites, beside, bench.types, self._silent)

    def _state(self) -> Mapping[str, Tensor]:
        trained = [i for i, slot in enumerate(self.bench.projection.slots) if slot in self.trained]
        return {name: torch.tensor(value) for name, value in (("taken", self.taken), ("waiting", self.waiting))} | {
            "trained": torch.tensor(trained, dtype=torch.int64)
        }

    def _told(self, path: str, judge: bool) -> None:
        """Store where the walk is; judged and told before, if that is due."""
        course = self.course
        if not judge:
            course.checkpoints.write(self.bench, self.weights, course.best.found, self.done, state=self._state())
            return
        self.waiting = 0
        told: dict[str, Any] = {"phase": "reconstruction"} | ({"part": path} if path else {})
        course.offer(self.weights, self.done, self.taken, state=self._state(), **told)

    def _tell_left(self) -> None:
        left = [slot.name for slot in self.bench.projection.slots if slot not in self.trained]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            self.bench.projection.notes.append(
                f"{', '.join(left[:3])}{more}: as compression left it: outside of every part, or of no kind that "
                f"{type(self.how).__name__} trains"
            )


class Trained(NamedTuple):
    """A site of a part, for `trainee_of`: its method, its weight as compression made it, and its uncompressed values W
    [out, in].
    """

    slot: Slot
    method: Method | None
    weight: Weight
    W: Tensor


def within(part: Part, slots: Sequence[Slot]) -> list[Slot]:
    """The sites all of whose users lie in a part."""
    prefix = f"{part.path}." if part.path else ""
    return [slot for slot in slots if all(name.startswith(prefix) for name in slot.parameters)]


def trainee_of(
    how: Reconstruction,
    part: Part,
    sites: Sequence[Trained],
    beside: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype],
    masks: Mapping[int, Tensor],
) -> Trainee:
    """What a recovery trains in a part: of its sites those it has a relaxation for, and of the tensors `beside` them
    those it wants.

    `types`: of stored tensors, by their names in the model; `masks`: by the identity of tensors beside the sites.
    """
    prefix = f"{part.path}." if part.path else ""
    relaxations: dict[Slot, Relaxation] = {}
    w: dict[Slot, nn.Parameter] = {}
    for site in sites:
        matrix = site.W.detach().clone()
        found = how.relaxation(site.method, site.weight.to(matrix.device), matrix)
        if found is not None:
            relaxations[site.slot], w[site.slot] = found.to(matrix.device), nn.Parameter(matrix)
    along = {name: state for name, state in beside.items() if state.is_floating_point() and how.along(state)}
    return Trainee(
        relaxations,
        w,
        names={slot: [name.removeprefix(prefix) for name in slot.parameters] for slot in relaxations},
        beside={name: nn.Parameter(state.detach().clone()) for name, state in along.items()},
        types={name: dtype for name in along if (dtype := types.get(prefix + name)) is not None},
        masks={name: masks[id(state)] for name, state in along.items() if id(state) in masks},
    )


def why_left(path: str, fitting: Fitting) -> str:
    """Why a part is as compression left it."""
    where = path or "the model"
    if fitting.fault:
        return f"{where}: as compression left it: not finite at {fitting.fault}; lower lr"
    if not fitting.taken:
        return f"{where}: as compression left it: it answers exactly as the original does"
    return (
        f"{where}: as compression left it: no check in {fitting.taken} minibatches of training came below the start's "
        f"error on held-out ones ({fitting.before:.4g} of that on the others)"
    )
