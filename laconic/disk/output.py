"""An output directory while a model is compressed: written part by part, so that nothing finished is ever lost."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from laconic.disk.assemble import assemble
from laconic.disk.companions import Companions
from laconic.disk.files import atomically, disk_errors, read_seal, read_sealed_json, seal, write_json, write_sealed_json
from laconic.disk.lock import LOCK
from laconic.disk.ours import (
    CONFIG,
    DONE,
    REPORT_HTML,
    REPORT_JSON,
    WORK,
    copied_names,
    earlier_files,
    is_of_model,
    relative_paths,
    remove,
    unfinished_files,
)  # fmt: skip
from laconic.disk.store import MANIFEST, amend_manifest, write_manifest
from laconic.errors import CheckpointError, OutputError
from laconic.weights.spec import Spec

_RUN, _NOTES, _VERIFIED = "run.json", "notes.json", "verified.json"


class Run:
    """The output directory while a model is being compressed: finished parts, how to go on, and at the end the model.

    A part (a block, or what lies before or after the blocks) is one file, written under a temporary name and renamed,
    that holds its tensors and, in its header, their specs and what happened. `fingerprint` says which run this is; a
    directory is only continued by the run that began it, and only left to others if it is empty. Every file that a
    resumed run reads has a checksum; what is damaged is removed, named in `mended`, and made again.
    """

    def __init__(
        self, out: Path, fingerprint: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.out, self.work, self.fingerprint = out, out / WORK, json.loads(json.dumps(fingerprint))
        self.mark = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.mended: list[str] = []
        check_out(out, resume=resume, overwrite=overwrite)
        with disk_errors(out):
            if overwrite and out.exists():
                clear(out)
            self.closed = _is_closed(out)
            if self.closed:
                _same(_manifest_run(out), self.fingerprint, out)
                self._tidy()
                return
            self.work.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(out / DONE, ignore_errors=True)
            if (self.work / _RUN).exists():
                self._claim()
            else:
                write_sealed_json(self.work / _RUN, self.fingerprint)
            self._mend()

    def _claim(self) -> None:
        """Make sure that the unfinished run is this one. Raises: OutputError saying in what it differs."""
        try:
            before = read_sealed_json(self.work / _RUN)
        except CheckpointError as error:
            self.mended.append(f"{error}; only the parts that say that they are this run's are kept")
            for file in self.work.iterdir():
                if not file.name.startswith("part-"):
                    file.unlink()
            write_sealed_json(self.work / _RUN, self.fingerprint)
            return
        _same(before, self.fingerprint, self.out)

    def _mend(self) -> None:
        """Remove what a kill left half written and what is damaged. Cost: everything that is finished is read once."""
        for file in sorted(self.work.iterdir()):
            if file.suffix == ".tmp" or file.name.startswith("survey-"):  # a survey begins anew
                file.unlink()
        for name in (_NOTES, _VERIFIED):
            if (self.work / name).exists():
                self._unless_damaged(self.work / name, read_sealed_json)
        for file in sorted(self.work.glob("*.safetensors")):
            told = self._unless_damaged(file, read_seal)
            if told is not None and file.name.startswith("part-") and told.get("run") != self.mark:
                self.mended.append(f"{file}: is another run's; that part is made again")
                file.unlink()
        notes = self.notes()
        if missing := [name for name in notes.get("extras", []) if not (self.work / name).exists()]:
            self.mended.append(f"{self.work}: {missing[0]} is missing; the survey is made again")
            self._write_notes({key: value for key, value in notes.items() if key not in ("plan", "extras")})

    def _unless_damaged(self, file: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(file)
        except CheckpointError as error:
            self.mended.append(f"{error}; that part is made again")
            file.unlink()
            return None

    def notes(self) -> dict[str, Any]:
        """What was noted of the run so far (the plan after the survey), by key."""
        return read_sealed_json(self.work / _NOTES) if (self.work / _NOTES).is_file() else {}

    def note(self, **values: Any) -> None:
        """Keep values for a resumed run."""
        self._write_notes(self.notes() | values)

    def _write_notes(self, values: dict[str, Any]) -> None:
        with disk_errors(self.out):
            write_sealed_json(self.work / _NOTES, values)

    def parts(self) -> dict[str, dict[str, Any]]:
        """The record of every finished part, by name."""
        found = {}
        for file in self._part_files():
            record = _record(file)
            found[record["part"]] = record
        return found

    def weight_files(self) -> dict[str, tuple[Path, Spec]]:
        """Where every finished weight is, and its spec, by parameter name."""
        return {name: (file, spec) for file in self._part_files() for name, spec in _record(file)["specs"].items()}

    def _part_files(self) -> list[Path]:
        return sorted(self.work.glob("part-*.safetensors"))

    def file(self, part: str) -> Path:
        """The file that a finished part is in."""
        return self.work / f"part-{hashlib.sha256(part.encode()).hexdigest()[:12]}.safetensors"

    def commit(self, part: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a finished part. Raises: OutputError when the disk is full; earlier parts are kept and the run can be
        resumed.
        """
        with disk_errors(self.out):
            told = {"laconic": json.dumps(record | {"part": part}), "run": self.mark}
            atomically(self.file(part), tensors, seal(tensors, told))

    def finish(self, manifest: dict[str, Any], beside: Companions | None, config: dict[str, Any]) -> None:
        """Turn the parts into a model directory: shards, their index, config, the model's other files, and the manifest
        last.
        """
        copied = beside.files if beside is not None else []
        with disk_errors(self.out):
            self.note(copied=copied)
            assemble(self._part_files(), self.out)
            if beside is not None:
                beside.copy_to(self.out)
            write_json(self.out / CONFIG, config, indent=2)
            write_manifest(self.out, manifest | {"copied": copied, "run": self.fingerprint}, config=True)

    def describe(self, **fields: Any) -> None:
        """Add to the manifest of a finished model."""
        with disk_errors(self.out):
            amend_manifest(self.out, fields)

    def verified(self, report: dict[str, Any]) -> None:
        """The model is complete and was read back. What is known of it is kept until the report is written; the parts
        are not needed any more.
        """
        self.know(report)
        for file in self.work.glob("*.safetensors"):
            if file.name.startswith(("part-", "hidden-", "survey-", "extra-")):
                file.unlink()

    def know(self, report: dict[str, Any]) -> None:
        """Keep what is known of a complete model, for a resumed run that makes its report."""
        if not self.closed:
            with disk_errors(self.out):
                write_sealed_json(self.work / _VERIFIED, report)

    def known(self) -> dict[str, Any] | None:
        """What `verified` and `know` kept last; None while the model is not complete."""
        file = self.work / _VERIFIED
        return read_sealed_json(file) if file.is_file() else None

    def close(self) -> None:
        """The run is complete: only the model and its report stay. The folder is renamed first: half of one must never
        look like a run.
        """
        if not self.closed:
            shutil.rmtree(self.out / DONE, ignore_errors=True)
            self.work.rename(self.out / DONE)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a kill left of a run that is complete."""
        shutil.rmtree(self.out / DONE, ignore_errors=True)
        remove(self.out, unfinished_files(self.out, _ours(self.out), skip=(WORK, DONE)))


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises OutputError where a run may not write: another's files, or an earlier result and neither `resume` nor
    `overwrite`. Changes nothing.
    """
    if not out.is_dir():
        return
    if overwrite:
        _removable(out)
        return
    if (out / WORK / _RUN).exists():
        if not resume:
            raise OutputError(
                f"{out}: holds an unfinished run; pass --resume to go on with it or --overwrite to replace it"
            )
        return
    others = [file.name for file in out.iterdir() if file.name not in (WORK, DONE, LOCK)]
    if not others:
        return
    if not resume:
        what = (
            "another model; pass --overwrite to replace it"
            if (out / MANIFEST).exists()
            else "other files; choose another directory"
        )
        raise OutputError(f"{out}: holds {what}")
    if not (out / MANIFEST).exists():
        raise OutputError(
            f"{out}: nothing to resume, and the directory holds other files ({others[0]}); choose another directory"
        )
    _manifest_run(out)


def _is_closed(out: Path) -> bool:
    """Whether a directory holds the complete result of a run."""
    return (out / MANIFEST).is_file() and not (out / WORK / _RUN).exists()


def _manifest_run(out: Path) -> dict[str, Any]:
    """The fingerprint of the complete run in a directory. Raises: OutputError where it says none."""
    try:
        run = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError, AttributeError):
        run = None
    if not isinstance(run, dict):
        raise OutputError(
            f"{out}: nothing to resume: it holds a model that does not say which run made it; pass --overwrite to "
            "replace it"
        )
    return run


def finite(value: Any) -> Any:
    """Plain values as JSON can hold them: NaN and infinities are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def clear(out: Path) -> None:
    """Remove what a run of ours left, by the names it noted. Raises: OutputError, removing nothing, where anything else
    is in the directory.

    The records of what is ours go last, so that a kill leaves a directory that can be cleared again.
    """
    remove(out, [file for file in _removable(out) if file != out / MANIFEST])
    if (out / WORK).exists():
        shutil.rmtree(out / DONE, ignore_errors=True)
        (out / WORK).rename(out / DONE)
    shutil.rmtree(out / DONE, ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)


def _removable(out: Path) -> list[Path]:
    """The files of an earlier run. Raises: OutputError where anything else is in the directory."""
    return earlier_files(out, "run of laconic", _ours(out), skip=(WORK, DONE))


def _ours(out: Path) -> Callable[[str], bool]:
    """Whether a path in a directory is that of a file which the run writes whose result, or whose beginning, is
    there.
    """
    copied = {*copied_names(out / MANIFEST), *_noted_copies(out)}
    begun = (out / WORK / _RUN).is_file() or (out / MANIFEST).is_file()
    return lambda name: name in copied or (begun and (is_of_model(name) or name in (REPORT_JSON, REPORT_HTML)))


def _noted_copies(out: Path) -> list[str]:
    """The paths of the files that an unfinished run copies; none from a record that cannot be read."""
    try:
        return relative_paths(read_sealed_json(out / WORK / _NOTES).get("copied"))
    except (CheckpointError, AttributeError):
        return []


def _same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        what = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
        held = "the complete result of a run" if _is_closed(out) else "an unfinished run"
        raise OutputError(
            f"{out}: holds {held} of another kind ({what}); use the same options, or pass --overwrite to replace it"
        )


def _record(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return json.loads(header["__metadata__"]["laconic"])
