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

from laconic.disk.tensors import bytes_of
from laconic.engine.module import half_types
from laconic.host.ambient import undisturbed
from laconic.host.progress import Log, Progress
from laconic.host.randomness import private_randomness
from laconic.methods.free import methods_of
from laconic.model.blocks import Batch
from laconic.model.sites import find_slots
from laconic.recover import lc
from laconic.recover.batches import length_of, stream
from laconic.recover.checkpoint import Checkpoints, Listener, StopRecovery
from laconic.recover.compressed import Bench, Best
from laconic.recover.finetune import Direct, FineTune, run_direct, run_finetune
from laconic.recover.projection import Projection, project_onto, reads_data
from laconic.recover.recipes import dkm
from laconic.recover.task import OutputLoss, OutputScore, Task
from laconic.scheme.text import Scheme, parse

How = lc.LC | FineTune | Direct
_STATISTICS = 32  # minibatches of training data that statistics are gathered from


@dataclass
class Recovery:
    """What a recovery found: scores on validation data (and, where there is some, test data), before and after, and its learning curve.

    `direct` is direct compression's validation score. `state` holds the values from which another recovery can start: the uncompressed
    ones the last L-step left, or, after fine-tuning, those of the compressed model. `types`: what was 16 bits wide in the original; the
    tensors of them that are not compressed are exact in it, and `save(model, folder, types=...)` stores them so.
    """

    scheme: str
    score: float
    loss: float
    direct: float
    minibatches: int
    curve: list[dict[str, Any]]
    seconds: float
    stopped: bool = False
    test_score: float | None = None
    notes: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    projection: Projection | None = field(default=None, repr=False)
    types: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            key: getattr(self, key) for key in self.__dataclass_fields__ if key not in ("state", "projection", "types")
        }


def recover(
    model: nn.Module, scheme: Scheme | str, how: How | None = None, *, train: Iterable[Batch] | None = None,
    validation: Iterable[Batch] | None = None, test: Iterable[Batch] | None = None, loss: OutputLoss | None = None,
    score: OutputScore | None = None, example: Batch | None = None, folder: str | Path | None = None, resume: bool = False,
    seed: int = 0, progress: Progress | None = None,
) -> tuple[nn.Module, Recovery]:  # fmt: skip
    """Compress a copy of a module and recover its accuracy by training; the module given is not changed.

    `how`: `LC(...)`, `FineTune(...)` or `Direct()`; by default what `usual_recovery` says. `train` is trained on, `validation` picks the best
    model, `test` is only measured at the end. With `folder`, the state is written there after every L-step or check; `resume=True` goes on from it.
    Returns the compressed module (installed weights, evaluation mode) and what happened. Raises: SchemeError, DataError (splits that
    share samples), RecoveryError (training diverged), SurgeryError (structures of a network that cannot be traced).
    """
    task = Task(
        train if train is not None else [], validation if validation is not None else [], test, loss, score, example
    ).checked()
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    return recover_task(
        model,
        scheme,
        how or usual_recovery(scheme, model),
        task,
        folder=folder,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def usual_recovery(scheme: Scheme, model: nn.Module) -> How:
    """How a module is trained under a scheme if nobody says: by eDKM's fine-tuning where clusters are trained (`DKM`), else by L-C."""
    return dkm().how if any(method.soft for method in methods_of(scheme, find_slots(model))) else lc.LC()


@undisturbed()
def recover_task(
    model: nn.Module, scheme: Scheme | str, how: How, task: Task, *, start: dict[str, Tensor] | None = None, coupling: Any = None,
    statistics: Sequence[Batch] | None = None, folder: str | Path | None = None, resume: bool = False, listen: Listener | None = None,
    seed: int = 0, progress: Progress | None = None, keep: bool = False, strict: bool = True, types: Mapping[str, torch.dtype] | None = None,
) -> tuple[nn.Module, Recovery]:  # fmt: skip
    """`recover` for a checked Task. `start` is the state of another recovery; `listen` hears every point of the curve and may stop it.

    `types` are those of the original's 16-bit tensors, if the module given is a copy in float32.
    With `keep` the finished state stays in the folder, for a caller who removes it once the model is stored; without `strict` a state that
    is not this run's is removed, and no error.
    """
    began, progress = time.time(), progress or Log()
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    how = how.over(task.train)
    original = model
    model, flags = _working_copy(model)
    if start is not None:
        model.load_state_dict(start)
    if statistics is None:
        statistics = first_batches(task, seed) if reads_data(model, scheme) else []
    projection = project_onto(model, scheme, example=task.sample(), data=statistics, seed=seed, coupling=coupling)
    teacher = copy.deepcopy(original).float().eval().requires_grad_(False) if _distills(how) else None
    types = half_types(original) if types is None else types
    bench = Bench(model, projection, task, how.norm_batches, seed, teacher, types)
    mark = _mark(bench) if folder is not None else ""
    length = length_of(task.train)
    passes = (
        f", {length} minibatches a pass" if length is not None else ""
    )  # what was asked of the data, as far as it shows
    fingerprint = f"{projection.scheme} by {how!r}, seed {seed}{passes}{mark}"
    checkpoints = Checkpoints(Path(folder) if folder is not None else None, fingerprint, resume, strict, began)
    checkpoints.claim()
    progress.start("recovering", max(how.total, 1))
    best, stopped, taken = Best(), False, 0

    def heard(found: dict[str, Any]) -> None:
        nonlocal taken
        if not any(found is point for point in checkpoints.curve):  # which a checkpoint's are
            checkpoints.curve.append(found)
        progress.advance(found["minibatches"] - taken, f"validation score {found['score']:.4f}")
        taken = found["minibatches"]
        if listen is not None:
            listen(found)

    try:
        _carry_out(bench, how, best, heard, checkpoints, seed)
    except StopRecovery:
        stopped = True
    snapshot, curve = best.finite(), checkpoints.curve
    state = (
        {} if _tunes(how) else _state(model)
    )  # the w behind a straight-through estimate drifts within what rounds to the same: no model by itself
    bench.show(snapshot)
    state = state or _state(model)
    bench.install(snapshot)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    test_score = task.judge(model, task.test).score if task.test is not None else None
    if not keep:
        checkpoints.done()
    return model, Recovery(
        projection.scheme, snapshot.judgement.score, snapshot.judgement.loss, curve[0]["score"], curve[-1]["minibatches"], curve,
        checkpoints.seconds, stopped, test_score, projection.notes, state, projection, types,
    )  # fmt: skip


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's present state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _tunes(how: How) -> bool:
    """Whether a recovery ends in fine-tuning."""
    return isinstance(how, FineTune) or (isinstance(how, lc.LC) and how.then is not None)


def _distills(how: How) -> bool:
    parts = [how, how.then] if isinstance(how, lc.LC) else [how]
    return any(part.learn.distill > 0 for part in parts if isinstance(part, lc.LC | FineTune))


def first_batches(task: Task, seed: int) -> list[Batch]:
    """The minibatches of training data that statistics are gathered from."""
    with private_randomness(seed, 0):
        return [batch for _, batch in zip(range(_STATISTICS), stream(task.train, seed), strict=False)]


def _working_copy(model: nn.Module) -> tuple[nn.Module, dict[str, bool]]:
    """A float32 copy of a module of which everything is trained, and whether the original's parameters require a gradient."""
    model = copy.deepcopy(model).float()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model, flags


def _mark(bench: Bench) -> str:
    """What tells a run from another of the same scheme's text: a hash of the methods site by site and of the values it starts from."""
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


def _carry_out(bench: Bench, how: How, best: Best, listen: Listener, checkpoints: Checkpoints, seed: int) -> None:
    if isinstance(how, lc.LC):
        lc.run(bench, how, best, listen, checkpoints, seed)
    elif isinstance(how, FineTune):
        run_finetune(bench, how, best, listen, checkpoints, seed)
    else:
        run_direct(bench, best, listen)
