"""One trial of a search: a scheme with its free values given, recovered, stored, and measured in the form it is stored in."""

import copy
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from laconic.blocks import Batch
from laconic.errors import RecoveryError, SearchError
from laconic.memory import compress_module, load_into, save
from laconic.methods.base import Keep, Method, Then
from laconic.methods.free import fix
from laconic.objectives import Candidate, Maximize, Minimize
from laconic.progress import Progress
from laconic.recover import LC, Direct, Recovery, StopRecovery, Task, recover_task
from laconic.recover.call import How
from laconic.recover.projection import Projection
from laconic.scheme import Scheme
from laconic.sites import Slot, Stats
from laconic.weights import bake, installed

Goal = Maximize | Minimize
_SLACK = 0.25  # more than the largest share of the gap that a finished run closed is allowed for


@dataclass(frozen=True)
class Neighbour:
    """A finished trial that another can start from: its values, and where its state is (None for the original model)."""

    number: int | None
    values: dict[str, Any]
    state: Path | None


@dataclass(frozen=True)
class Trials:
    """Carries out trials of one search: everything that does not change between them.

    `folder`/trials/NNN holds, for every finished trial, the model as it would be delivered and the state another trial can start from.
    """

    model: nn.Module
    scheme: Scheme
    how: How
    task: Task
    goals: tuple[Goal, ...]
    folder: Path
    reference: float
    floor: float
    coupling: Any = None
    statistics: Sequence[Batch] = ()
    thin: bool = True
    warm_share: float | None = 0.5
    early_stop: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    slots: Sequence[Slot] = ()

    def place(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / f"{number:03d}"

    def state(self, number: int) -> Path:
        """The file another trial can start from."""
        return self.place(number) / "state.safetensors"

    def run(
        self, number: int, values: Mapping[str, Any], neighbour: Neighbour | None, curves: Sequence[Sequence[dict[str, Any]]],
        deadline: float | None, progress: Progress,
    ) -> dict[str, Any]:  # fmt: skip
        """The record of a trial. `curves` are those of finished trials, which say what can still be gained; `deadline` ends it early."""
        began = time.time()
        how, start = self.how, None
        if neighbour is not None and neighbour.state is not None and isinstance(how, LC) and self.warm_share is not None:
            how, start = how.warmed(self.warm_share), load_file(neighbour.state)
        else:
            neighbour = None
        scheme = fix(self.scheme, values, self.slots)
        curve: list[dict[str, Any]] = []
        total = _minibatches(how)

        def listen(point: dict[str, Any]) -> None:
            curve.append(point)
            late = deadline is not None and time.time() > deadline
            if late or (self.early_stop and hopeless(curve, total, curves, self.reference, self.floor)):
                raise StopRecovery

        diverged = ""
        try:
            compressed, recovery = recover_task(
                self.model, scheme, how, self.task, start=start, coupling=self.coupling, statistics=self.statistics, listen=listen,
                seed=self.seed, progress=progress,
            )  # fmt: skip
        except RecoveryError as error:  # a trial may fail without ending the search: it counts as not keeping the floor
            diverged = f"{', '.join(f'{k} {v}' for k, v in values.items())}: {error}; the trial counts as direct compression below every floor"
            compressed, recovery = self.direct(scheme)
        direct = recovery.direct if start is None or diverged else self.direct(scheme)[1].score
        assert recovery.projection is not None
        stored = self.stored_form(compressed, recovery.projection)
        place = self.place(number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.store(stored, place / "model")
        score = recovery.score if stored is compressed else self.task.judge(stored, self.task.validation).score
        candidate = self.candidate(stored, place / "model")
        objectives = [goal(candidate) for goal in self.goals]
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in recovery.state.items()}, self.state(number))
        return {
            "score": -math.inf if diverged else score, "direct_score": direct, "objectives": objectives,
            "curve": recovery.curve, "stopped_early": recovery.stopped,
            "warm_from": neighbour.number if neighbour is not None else None, "minibatches": recovery.minibatches,
            "cold_minibatches": _minibatches(self.how), "seconds": time.time() - began, "notes": [*recovery.notes, *([diverged] if diverged else [])],
        }  # fmt: skip

    def direct(self, scheme: Scheme) -> tuple[nn.Module, Recovery]:
        """Direct compression under a fixed scheme, with batch norms treated as the recovery treats them."""
        return recover_task(
            self.model, scheme, Direct(self.how.norm_batches), self.task, coupling=self.coupling, statistics=self.statistics, seed=self.seed
        )  # fmt: skip

    def stored_form(self, compressed: nn.Module, projection: Projection) -> nn.Module:
        """What is delivered: the compressed module itself, or, where channels are cut and `thin` is set, the smaller network that is left,
        its remaining matrices encoded by what the scheme says after the cut."""
        if projection.coupling is None or not self.thin:
            return compressed
        from laconic.surgery import thin

        thinned = thin(compressed, self.task.sample(), projection.coupling)
        rest = {slot.name: after_cut(method) for slot, method in projection.chosen.items()}
        if all(isinstance(method, Keep) for method in rest.values()):
            return thinned

        def method_of(slot: Slot) -> Method:
            return rest.get(slot.name, Keep())

        return compress_module(thinned, method_of, self.statistics, seed=self.seed)[0]

    def store(self, stored: nn.Module, place: Path) -> None:
        """Save the delivered form, with the shapes of what is smaller than in the original."""
        from laconic.surgery import shapes

        changed = shapes(stored, self.model) if self.coupling is not None and self.thin else None
        save(stored, place, **({"shapes": changed} if changed else {}), **self.fields)

    def reload(self, number: int) -> nn.Module:
        """A trial's model, read from its file into a fresh copy of the original whose values are forgotten."""
        fresh = copy.deepcopy(self.model)
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.data.zero_()
        place = self.place(number) / "model"
        if not place.is_dir():
            raise SearchError(f"{place}: the model of trial {number} is not here; the search's folder and its storage belong together")
        return load_into(fresh.float(), place).eval()

    def candidate(self, stored: nn.Module, path: Path) -> Candidate:
        """What objectives measure."""
        network = copy_baked(stored)
        return Candidate(stored, network, self.task.sample(), self.model, dict(self.fields), path)


def copy_baked(model: nn.Module) -> nn.Module:
    """A plain copy of a module: installed weights decoded."""
    network = copy.deepcopy(model)
    if installed(network):
        bake(network)
    return network.eval()


def after_cut(method: Method) -> Method:
    """What of a method is left to do once the channels it cuts are gone; `Keep()` if nothing is."""
    if isinstance(method, Then):
        first = after_cut(method.first)
        return method.second if isinstance(first, Keep) else Then(first, method.second)
    return Keep() if method.wants & Stats.CHANNELS else method


def hopeless(
    curve: Sequence[dict[str, Any]], total: int, finished: Sequence[Sequence[dict[str, Any]]], reference: float, floor: float
) -> bool:  # fmt: skip
    """Whether a run cannot reach the floor any more: not even if, from here on, it closed of its gap to the reference score the largest
    share that a finished run closed, and a bit more.

    Runs are compared at equal shares of their minibatches. Only runs that were behind the floor there say anything; two are needed, and
    half of this run has to be done. An estimate: a trial can be given up wrongly, which costs sparsity and never accuracy.
    """
    done = curve[-1]["minibatches"] / max(total, 1)
    if not 0.5 <= done < 1:
        return False
    closed = []
    for other in finished:
        here = _best_score([p for p in other if p["minibatches"] <= done * other[-1]["minibatches"]])
        if here < floor:
            closed.append((_best_score(other) - here) / (reference - here))
    if len(closed) < 2:
        return False
    here = _best_score(curve)
    return here + min(1.0, (1 + _SLACK) * max(closed)) * (reference - here) < floor


def _best_score(curve: Sequence[dict[str, Any]]) -> float:
    return max(point["score"] for point in curve)


def _minibatches(how: How) -> int:
    return how.total if isinstance(how, LC) else how.minibatches


def nearest(values: Mapping[str, Any], finished: Sequence[Neighbour]) -> Neighbour | None:
    """The finished trial whose values are nearest, by relative distance summed over numbers; of equal ones the first.

    Values that differ and are no numbers make a trial no neighbour. The original model counts as a trial with every number at zero.
    """
    best: tuple[float, Neighbour] | None = None
    for other in finished:
        apart = 0.0
        for name, value in values.items():
            there = other.values.get(name, 0.0 if other.number is None else None)
            if isinstance(value, int | float) and isinstance(there, int | float):
                apart += abs(float(value) - float(there)) / max(abs(float(value)), 1e-9)
            elif value != there:
                apart = float("inf")
        if apart < float("inf") and (best is None or apart < best[0]):
            best = apart, other
    return best[1] if best is not None else None
