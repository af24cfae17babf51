"""`recover`: compress a module under a scheme and train it so that it loses less."""

import copy
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.state import half_types
from laconic.disk.tensors import bytes_of
from laconic.engine.checks import Prefix
from laconic.errors import SchemeError
from laconic.host.ambient import undisturbed
from laconic.host.progress import Log, Progress
from laconic.host.randomness import private_randomness
from laconic.host.record import plain
from laconic.model.batches import Batch
from laconic.model.judging import OutputLoss, OutputScore
from laconic.model.sites import find_slots
from laconic.recover.base import Recovery
from laconic.recover.batches import length_of, stream
from laconic.recover.checkpoint import Checkpoints, Listener, StopRecovery
from laconic.recover.compressed import Bench, Snapshot
from laconic.recover.course import Course
from laconic.recover.curve import Point
from laconic.recover.lc import LC
from laconic.recover.parsing import parse_recovery
from laconic.recover.projection import Projection, compressed_slots, project_onto, reads_data
from laconic.recover.recipes import dkm
from laconic.recover.task import Task
from laconic.scheme.filling import methods_of
from laconic.scheme.text import Scheme, parse

_STATISTICS = 32  # minibatches of training data that statistics are gathered from


@dataclass
class Recovered:
    """What a recovery found: scores on validation data (and, where there is some, test data), before and after, and its
    learning curve.

    `direct` is direct compression's validation score. `state` holds the values from which another recovery can start:
    the uncompressed ones the run left, where those are a start (`Recovery.leaves_w`), else those of the compressed
    model. `types`: what was 16 bits wide in the original; the tensors of them that are not compressed are exact in it,
    and `save(model, folder, types=...)` stores them so.
    """

    scheme: str
    score: float
    loss: float
    direct: float
    minibatches: int
    curve: list[Point]
    seconds: float
    stopped: bool = False
    test_score: float | None = None
    notes: list[str] = field(default_factory=list)
    statistics: Prefix = "original"
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    projection: Projection | None = field(default=None, repr=False)
    types: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        told = [name for name in self.__dataclass_fields__ if name not in ("state", "projection", "types")]
        return {name: plain(getattr(self, name)) for name in told}


def recover(
    model: nn.Module,
    scheme: Scheme | str,
    how: Recovery | str | None = None,
    *,
    train: Iterable[Batch] | None = None,
    validation: Iterable[Batch] | None = None,
    test: Iterable[Batch] | None = None,
    loss: OutputLoss | None = None,
    score: OutputScore | None = None,
    example: Batch | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    statistics: Prefix = "original",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Recovered]:
    """Compress a copy of a module and recover its accuracy by training; the module given is not changed.

    `how`: `LC(...)`, `FineTune(...)`, `Direct()` or any other recovery, as a value or as text; by default what
    `usual_recovery` says. `train` is trained on, `validation` picks the best model, `test` is only measured at the end.
    With `folder`, the state is written there after every L-step or check; `resume=True` goes on from it. `statistics`:
    what the inputs that methods look at have passed through, "original" (the module as it is given) or "compressed"
    (whatever is compressed before a site, as `compress` has it by default). Either way they are gathered once, before
    training, and kept.
    Returns the compressed module (installed weights, evaluation mode) and what happened. Raises: SchemeError, DataError
    (splits that share samples), RecoveryError (training diverged), SurgeryError (structures of a network that cannot be
    traced).
    """
    how = parse_recovery(how) if isinstance(how, str) else how
    how = None if how is None else check_recovery(how)
    task = Task(
        train if train is not None else [], validation if validation is not None else [], test, loss, score, example
    ).checked()
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    how = how or usual_recovery(scheme, model)
    return recover_task(
        model, scheme, how, task, folder=folder, resume=resume, statistics=statistics, seed=seed, progress=progress
    )  # fmt: skip


def usual_recovery(scheme: Scheme, model: nn.Module) -> Recovery:
    """How a module is trained under a scheme if nobody says: by eDKM's fine-tuning where clusters are trained (`DKM`),
    else by L-C.
    """
    return dkm().how if any(method.soft for method in methods_of(scheme, find_slots(model))) else LC()


@undisturbed()
def recover_task(
    model: nn.Module,
    scheme: Scheme | str,
    how: Recovery,
    task: Task,
    *,
    start: dict[str, Tensor] | None = None,
    coupling: Any = None,
    calibration: Sequence[Batch] | None = None,
    statistics: Prefix = "original",
    folder: str | Path | None = None,
    resume: bool = False,
    listen: Listener | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    keep: bool = False,
    strict: bool = True,
    types: Mapping[str, torch.dtype] | None = None,
    tell: bool = True,
) -> tuple[nn.Module, Recovered]:
    """`recover` for a checked Task. `start` is the state of another recovery; `listen` hears every point of the curve
    and may stop it.

    `calibration`: batches that statistics are gathered from, by default the first minibatches of training data.
    `types` are those of the original's 16-bit tensors, if the module given is a copy in float32.
    With `keep` the finished state stays in the folder, for a caller who removes it once the model is stored; without
    `strict` a state that is not this run's is removed, and no error. `tell`: whether the user is told what memory
    training takes.
    """
    began, progress = time.time(), progress or Log()
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    how = check_recovery(how).over(task.train)
    original, (model, flags) = model, _working_copy(model)
    how.check(model, compressed_slots(model, scheme))
    if start is not None:
        model.load_state_dict(start)
    if calibration is None:
        calibration = first_batches(task, seed) if reads_data(model, scheme) else []
    projection = project_onto(
        model,
        scheme,
        example=task.sample(),
        data=calibration,
        loss=task.loss,
        seed=seed,
        coupling=coupling,
        statistics=statistics,
    )
    types = half_types(original) if types is None else types
    bench = Bench(model, projection, task, how.norm_batches, seed, _teacher(original, how), types)
    place = Path(folder) if folder is not None else None
    checkpoints = Checkpoints(place, _fingerprint(bench, how) if place is not None else "", resume, strict, began)
    checkpoints.claim()
    progress.start("recovering", max(how.total_on(model, projection.slots), 1))
    say = progress.say if tell else lambda message: None
    course = Course(bench, _Heard(checkpoints, progress, listen), checkpoints, seed, say)
    stopped = _stopped(how, course)
    snapshot, curve = course.outcome(how), checkpoints.curve
    state = _delivered(bench, snapshot, how, flags)
    test_score = task.judge(model, task.test).score if task.test is not None else None
    if not keep:
        checkpoints.done()
    return model, Recovered(
        scheme=projection.scheme,
        score=snapshot.judgement.score,
        loss=snapshot.judgement.loss,
        direct=curve[0].score,
        minibatches=curve[-1].minibatches,
        curve=curve,
        seconds=checkpoints.seconds,
        stopped=stopped,
        test_score=test_score,
        notes=projection.notes,
        statistics=projection.statistics,
        state=state,
        projection=projection,
        types=types,
    )


@dataclass
class _Heard:
    """Hears every point of the learning curve: keeps it, shows how far the run is, and passes it on."""

    checkpoints: Checkpoints
    progress: Progress
    listen: Listener | None
    taken: int = 0

    def __call__(self, found: Point) -> None:
        curve = self.checkpoints.curve
        if not any(found is point for point in curve):  # which a checkpoint's are
            curve.append(found)
        self.progress.advance(found.minibatches - self.taken, f"validation score {found.score:.4f}")
        self.taken = found.minibatches
        if self.listen is not None:
            self.listen(found)


def _stopped(how: Recovery, course: Course) -> bool:
    """Carry a recovery out; whether a listener ended it."""
    try:
        how.run(course)
    except StopRecovery:
        return True
    return False


def _teacher(original: nn.Module, how: Recovery) -> nn.Module | None:
    """The original in float32, where a loss compares with it."""
    if not any(steps.minimises.compares for steps in how.learns):
        return None
    return copy.deepcopy(original).float().eval().requires_grad_(False)


def _fingerprint(bench: Bench, how: Recovery) -> str:
    """What tells a run from another: scheme, recovery, seed, what was asked of the data as far as it shows, and where
    it starts.
    """
    length = length_of(bench.task.train)
    passes = f", {length} minibatches a pass" if length is not None else ""
    known = bench.projection.statistics
    seen = f", {known} statistics" if known != "original" else ""
    return f"{bench.projection.scheme} by {how!r}, seed {bench.seed}{passes}{seen}{_mark(bench)}"


def _delivered(bench: Bench, snapshot: Snapshot, how: Recovery, flags: Mapping[str, bool]) -> dict[str, Tensor]:
    """Make the module the compressed one of a snapshot, with its original's flags; returns the state another recovery
    can start from.
    """
    left = _state(bench.model) if how.leaves_w else None
    bench.show(snapshot)
    state = _state(bench.model) if left is None else left
    bench.install(snapshot)
    bench.model.zero_grad(set_to_none=True)
    for name, parameter in bench.model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    return state


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's present state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def check_recovery(how: object) -> Recovery:
    """The recovery, if it is one. Raises: SchemeError for anything else."""
    if not isinstance(how, Recovery):
        raise SchemeError(f"recovery: expected LC(...), FineTune(...), Direct() or another recovery, got {how!r}")
    return how


def first_batches(task: Task, seed: int) -> list[Batch]:
    """The minibatches of training data that statistics are gathered from."""
    with private_randomness(seed, 0):
        return [batch for _, batch in zip(range(_STATISTICS), stream(task.train, seed), strict=False)]


def _working_copy(model: nn.Module) -> tuple[nn.Module, dict[str, bool]]:
    """A float32 copy of a module of which everything is trained, and whether the original's parameters require a
    gradient.
    """
    model = copy.deepcopy(model).float()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model, flags


def _mark(bench: Bench) -> str:
    """What tells a run from another of the same scheme's text: a hash of the methods site by site and of the values it
    starts from.
    """
    digest = hashlib.sha256(
        repr([(slot.name, bench.projection.chosen[slot]) for slot in bench.projection.slots]).encode()
    )
    for name, tensor in sorted(
        [*bench.rest().items(), *((slot.name, value) for slot, value in bench.values().items())],
        key=lambda item: item[0],
    ):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return f", start {digest.hexdigest()[:12]}"
