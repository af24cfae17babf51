"""A recovery's state on disk after every model it offered, so that a killed run goes on from the last one."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.disk.files import atomically, disk_errors
from laconic.disk.tensors import checksum_of
from laconic.errors import CheckpointError, OutputError
from laconic.host.foreign import parse_object
from laconic.host.progress import logger
from laconic.host.record import plain
from laconic.model.judging import Judgement
from laconic.model.sites import Slot
from laconic.recover.compressed import Bench, Best, Snapshot
from laconic.recover.curve import Point
from laconic.recover.train import Trainer
from laconic.weights import Weight, unpack
from laconic.weights.base import pack
from laconic.weights.spec import nested, prefixed

STATE = "recovery.safetensors"
_TOLD = {"fingerprint", "crc", "done", "trainer", "best", "specs", "curve", "notes", "seconds"}

Listener = Callable[[Point], None]
"""Is told every point of the learning curve; raising StopRecovery from it ends the recovery with the best found so
far.
"""


class StopRecovery(Exception):  # noqa: N818 - a message to the loop, not an error
    """Raised by a listener: what was found is enough, or cannot become enough."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held for the recovery itself: compressed weights, what was `done`, its own state, and the
    trainer's, if it had one.
    """

    file: Path
    weights: dict[Slot, Weight]
    done: int
    state: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counts: dict[str, Any] | None


@dataclass
class Checkpoints:
    """Where, and for which run; without a folder nothing is written. `curve` is what was told of the run so far.

    `strict`: whether another run's state, or a damaged one, is an error; otherwise it is removed, with a warning, and
    the run begins anew.
    """

    folder: Path | None = None
    fingerprint: str = ""
    resuming: bool = False
    strict: bool = True
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.curve: list[Point] = []
        self._told: dict[str, Any] | None = None
        self._before = 0.0
        if self.folder is None and self.resuming:
            raise OutputError("resume: expected the folder that holds the recovery's state, got none")

    @property
    def seconds(self) -> float:
        """What the run has taken so far, before it was interrupted too."""
        return self._before + time.time() - self.began

    @property
    def _file(self) -> Path | None:
        """The state there is, if any."""
        file = self.folder / STATE if self.folder is not None else None
        return file if file is not None and file.is_file() else None

    def claim(self) -> dict[str, Any] | None:
        """What the state in the folder says; None if there is none.

        Raises: OutputError for another run's, or where none was expected; CheckpointError for a damaged one.
        """
        if self._told is None:
            try:
                self._told = self._read()
                if self._told is not None and not self.strict:
                    self._weights(self._told, self._tensors(self._told))
            except (CheckpointError, OutputError) as error:
                if self.strict:
                    raise
                logger.warning("%s; the run begins anew", error)
                self.done()
        return self._told

    def _read(self) -> dict[str, Any] | None:
        if self._file is None:
            return None
        if not self.resuming:
            raise OutputError(f"{self.folder}: holds an unfinished recovery; resume it or choose another folder")
        try:
            with safe_open(self._file, framework="pt") as reader:
                told = parse_object(reader.metadata()["state"].encode(), CheckpointError, str(self._file))
            fingerprint = told["fingerprint"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._file}: damaged: {error}") from error
        if fingerprint != self.fingerprint:
            raise OutputError(f"{self.folder}: holds the recovery {fingerprint}; this one is {self.fingerprint}")
        if missing := sorted(_TOLD - told.keys()):
            raise CheckpointError(f"{self._file}: damaged, or of another version: no {', '.join(missing)}")
        return told

    def _tensors(self, told: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of the state. Raises: CheckpointError when they are not those that were written."""
        assert self._file is not None
        try:
            with safe_open(self._file, framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file}: damaged: {error}") from error
        if checksum_of(tensors) != told["crc"]:
            raise CheckpointError(f"{self._file}: damaged: its tensors are not those that were written")
        return tensors

    def _weights(self, told: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, list[Weight]]:
        """The weights at the time, and those of the best model. Raises: CheckpointError for what this version does not
        know.
        """
        try:
            return {
                which: [unpack(spec, nested(tensors, f"{which}-{i}")) for i, spec in enumerate(told["specs"][which])]
                for which in ("now", "best")
            }
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self._file}: damaged, or of another version: {error}") from error

    def write(
        self, bench: Bench, weights: dict[Slot, Weight], best: Snapshot, done: int, *, trainer: Trainer | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """The state of a run that has come to `done`, whole or not at all. Raises: OutputError when the disk is
        full.
        """
        if self.folder is None:
            return
        parts = {
            "w": {slot.name: value for slot, value in bench.values().items()}, "rest": bench.rest(), "best": best.rest,
            "optimizer": {} if trainer is None else trainer.state(), "state": dict(state or {}),
        }  # fmt: skip
        specs: dict[str, list[dict[str, Any]]] = {}
        for which, these in (("now", weights), ("best", best.weights)):
            packed = [pack(these[slot]) for slot in bench.parameters]
            specs[which] = [spec for spec, _ in packed]
            parts |= {f"{which}-{i}": tensors for i, (_, tensors) in enumerate(packed)}
        flat = {
            name: t.detach().cpu() for part, tensors in parts.items() for name, t in prefixed(part, tensors).items()
        }
        told = {
            "fingerprint": self.fingerprint,
            "crc": checksum_of(flat),
            "done": done,
            "trainer": None if trainer is None else trainer.counts(),
            "best": [best.judgement.loss, best.judgement.score, best.judgement.examples, best.minibatches],
            "specs": specs,
            "curve": plain(self.curve),
            "notes": bench.projection.notes,
            "seconds": self.seconds,
        }
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            atomically(self.folder / STATE, flat, {"state": json.dumps(told)})

    def resume(self, bench: Bench, best: Best, listen: Listener) -> Saved | None:
        """Bring the module and the best model to where the last checkpoint left them, and tell the listener what it was
        told then.

        None without a checkpoint. Raises: as `claim` does.
        """
        told = self.claim()
        if told is None or self._file is None:
            return None
        tensors = self._tensors(told)
        try:
            with torch.no_grad():
                w = nested(tensors, "w")
                for slot, parameter in bench.parameters.items():
                    parameter.copy_(w[slot.name])
                bench.put_rest(nested(tensors, "rest"))
            notes = bench.projection.notes
            notes.extend(note for note in told["notes"] if note not in notes)
            found = {which: _placed(bench, weights) for which, weights in self._weights(told, tensors).items()}
            loss, score, examples, minibatches = told["best"]
            best.offer(Snapshot(found["best"], nested(tensors, "best"), Judgement(loss, score, examples), minibatches))
            curve = [Point.from_json(point) for point in told["curve"]]
            saved = Saved(
                file=self._file, weights=found["now"], done=int(told["done"]), state=nested(tensors, "state"),
                optimizer=nested(tensors, "optimizer"), counts=told["trainer"],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self._file}: damaged, or of another version: {error}") from error
        self.curve, self._before = curve, told["seconds"]
        for point in self.curve[:-1]:
            with suppress(StopRecovery):  # what more was trained is there
                listen(point)
        listen(self.curve[-1])
        return saved

    def done(self) -> None:
        """The state is not needed any more."""
        self._told = None
        if self._file is not None:
            self._file.unlink()


def _placed(bench: Bench, weights: list[Weight]) -> dict[Slot, Weight]:
    """Weights at their sites, on the device of these."""
    return {
        slot: weight.to(parameter.device)
        for (slot, parameter), weight in zip(bench.parameters.items(), weights, strict=True)
    }
