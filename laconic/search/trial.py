"""One trial of a search: a scheme with its free values given, recovered, stored, and measured in the form it is stored
in."""

import copy
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from laconic.disk.files import atomically, disk_errors
from laconic.disk.store import read_manifest
from laconic.engine.saved import load_into, save
from laconic.errors import RecoveryError, SearchError
from laconic.host.progress import Progress
from laconic.measure.candidate import Candidate
from laconic.measure.goals import Goal
from laconic.model.batches import Batch
from laconic.model.sites import Slot
from laconic.recover import Direct, Recovered, Recovery, StopRecovery, Task, recover_task
from laconic.recover.checkpoint import STATE as UNFINISHED
from laconic.recover.curve import Point
from laconic.recover.projection import Projection
from laconic.scheme.filling import fix
from laconic.scheme.text import Scheme
from laconic.search.neighbours import Neighbour, hopeless, nearest
from laconic.search.records import TrialRecord
from laconic.search.remains import after_cut, encode_remains
from laconic.weights import baked

__all__ = ["Neighbour", "Trials", "after_cut", "hopeless", "nearest"]


@dataclass(frozen=True)
class Trials:
    """Carries out trials of one search: everything that does not change between them.

    `standards`: the objectives of the original. `folder`/trials/NNN holds, for every finished trial, the model as it
    would be delivered and the state another trial can start from.
    """

    model: nn.Module
    scheme: Scheme
    how: Recovery
    task: Task
    goals: tuple[Goal, ...]
    folder: Path
    reference: float
    floor: float
    standards: Sequence[float]
    coupling: Any = None
    statistics: Sequence[Batch] = ()
    thin: bool = True
    warm_share: float | None = 0.5
    early_stop: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    slots: Sequence[Slot] = ()
    types: Mapping[str, torch.dtype] = field(default_factory=dict)

    def place(self, number: int) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / f"{number:03d}"

    def state(self, number: int) -> Path:
        """The file another trial can start from."""
        return self.place(number) / "state.safetensors"

    @property
    def unseen(self) -> Task:
        """The task without its test data, which no trial may look at."""
        return replace(self.task, test=None)

    def run(
        self,
        number: int,
        values: Mapping[str, Any],
        neighbour: Neighbour | None,
        curves: Sequence[Sequence[Point]],
        deadline: float | None,
        progress: Progress,
        interrupted: Sequence[int] = (),
    ) -> TrialRecord:
        """The record of a trial; its score is that of the model read back from its file. `curves` are those of finished
        trials, which say what can still be gained. After the time `deadline` it ends with what it has, and the record
        calls it `late` if that does not keep the floor. It goes on from the last L-step of the latest of the
        `interrupted` trials that left one, if that was the same recovery; its own state stays until `settle`."""
        began = time.time()
        how, start = self.how, None
        warmed = how.warmed(self.warm_share) if self.warm_share is not None else None
        if neighbour is not None and neighbour.state is not None and warmed is not None:
            how, start = warmed, load_file(neighbour.state)
        else:
            neighbour = None
        scheme = fix(self.scheme, values, self.slots)
        curve: list[Point] = []
        total, late = how.total_on(self.model, self.slots), False

        def listen(point: Point) -> None:
            nonlocal late
            curve.append(point)
            late = deadline is not None and time.time() > deadline and point.minibatches < total
            if late or (self.early_stop and hopeless(curve, total, curves, self.reference, self.floor)):
                raise StopRecovery

        with disk_errors(self.folder):
            place = self._begin(number, interrupted)
        diverged, trained = "", time.time()
        try:
            compressed, recovery = recover_task(
                self.model,
                scheme,
                how,
                self.unseen,
                start=start,
                coupling=self.coupling,
                calibration=self.statistics,
                listen=listen,
                seed=self.seed,
                progress=progress,
                types=self.types,
                folder=place,
                resume=True,
                keep=True,
                strict=False,
                tell=number == 0,  # it is the same for all
            )
        except RecoveryError as error:  # a trial may fail without ending the search: it counts as not keeping the floor
            diverged = (
                f"{', '.join(f'{k} {v}' for k, v in values.items())}: {error}; the trial counts as direct compression "
                "below every floor"
            )
            compressed, recovery = self.direct(scheme)
        earlier = max(0.0, recovery.seconds - (time.time() - trained))  # of the trials that were interrupted
        direct = recovery.direct if start is None or diverged else self.direct(scheme)[1].score
        assert recovery.projection is not None
        stored = self.stored_form(compressed, recovery.projection)
        with disk_errors(self.folder):
            self.store(stored, place / "model", values)
            atomically(self.state(number), recovery.state)
        delivered = self.reload(number, values)
        candidate = self.candidate(delivered, place / "model")
        score = -math.inf if diverged else self.task.judge(delivered, self.task.validation).score
        curve = curve if diverged else recovery.curve
        return TrialRecord(
            score=score,
            direct_score=direct,
            objectives=[
                goal.beside(candidate, before) for goal, before in zip(self.goals, self.standards, strict=True)
            ],
            curve=curve,
            late=late and score < self.floor,
            stopped_early=recovery.stopped,
            warm_from=neighbour.number if neighbour is not None else None,
            minibatches=curve[-1].minibatches if curve else 0,
            cold_minibatches=self.how.total_on(self.model, self.slots),
            seconds=time.time() - began + earlier,
            notes=[*recovery.notes, *([diverged] if diverged else [])],
        )

    def _begin(self, number: int, interrupted: Sequence[int]) -> Path:
        """The folder of a trial, empty but for the state of the recovery that an interrupted trial left."""
        place = self.place(number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for earlier in interrupted:
            with suppress(FileNotFoundError):  # it left none, or its worker was only slow and has just finished
                (self.place(earlier) / UNFINISHED).replace(place / UNFINISHED)
                break
        return place

    def settle(self, *numbers: int) -> None:
        """Remove what a trial, in all of its attempts, could have been resumed from, once its result is stored or it
        has failed."""
        for number in numbers:
            (self.place(number) / UNFINISHED).unlink(missing_ok=True)

    def direct(self, scheme: Scheme) -> tuple[nn.Module, Recovered]:
        """Direct compression under a fixed scheme, with batch norms treated as the recovery treats them."""
        return recover_task(
            self.model,
            scheme,
            Direct(self.how.norm_batches),
            self.unseen,
            coupling=self.coupling,
            calibration=self.statistics,
            seed=self.seed,
            types=self.types,
        )

    def stored_form(self, compressed: nn.Module, projection: Projection) -> nn.Module:
        """What is delivered: the compressed module itself, or, where channels are cut and `thin` is set, the smaller
        network that is left, its remaining matrices encoded by what the scheme says after the cut.

        Raises: SchemeError when that cannot encode the sizes that are left, SurgeryError as `thin` does.
        """
        if projection.coupling is None or not self.thin:
            return compressed
        from laconic.surgery import thin

        thinned = thin(compressed, self.task.sample(), projection.coupling)
        return encode_remains(thinned, compressed, projection.chosen, self.statistics, self.seed)

    def store(self, stored: nn.Module, place: Path, values: Mapping[str, Any]) -> None:
        """Save the delivered form, with the shapes of what is smaller than in the original."""
        from laconic.surgery import shapes

        changed = shapes(stored, self.model) if self.coupling is not None and self.thin else None
        save(
            stored,
            place,
            types=self.types,
            **({"shapes": changed} if changed else {}),
            **self.fields,
            values=dict(values),
        )

    def reload(self, number: int, values: Mapping[str, Any]) -> nn.Module:
        """A trial's model, read from its file into a fresh copy of the original whose stored values are forgotten.

        Raises: SearchError when it is not there, or another search's.
        """
        place = self.place(number) / "model"
        if not place.is_dir():
            raise SearchError(
                f"{place}: the model of trial {number + 1} is not here; a search's folder and its storage belong "
                "together"
            )
        told = read_manifest(place)
        expected = {**self.fields, "values": dict(values)}
        if any(told.get(key, value) != value for key, value in expected.items()):
            raise SearchError(
                f"{place}: this is not trial {number + 1} of this search: expected {expected}, got "
                f"{told.get('values')} of another"
            )
        fresh = copy.deepcopy(self.model)
        # other buffers, such as tables of angles, come with the architecture
        for tensor in fresh.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor):
                tensor.data.zero_()
        return load_into(fresh.float(), place).to(next(self.model.parameters()).device).eval()

    def candidate(self, delivered: nn.Module, path: Path) -> Candidate:
        """What objectives measure."""
        return Candidate(
            delivered,
            baked(delivered).eval(),
            example=self.task.sample(),
            reference=self.model,
            fields=dict(self.fields),
            path=path,
        )
