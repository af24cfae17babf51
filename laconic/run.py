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

from laconic.errors import OutputError
from laconic.files import atomically, copy_bytes, disk_errors, settle, write_header, write_json
from laconic.store import MANIFEST
from laconic.tensors import INDEX, read_header
from laconic.weights.base import Spec

_WORK = ".laconic"
_SHARD = 4 << 30  # bytes per file of weights
_DONE = ".laconic-done"  # the folder of a complete run, on its way out
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")  # config, tokenizer and, where trusted, code


class Run:
    """The output directory while a model is being compressed: finished parts, how to go on, and at the end the model.

    A part (a block, or what lies before or after the blocks) is one file, written under a temporary name and renamed, that holds its
    tensors and, in its header, their specs and what happened. `fingerprint` says which run this is; a directory is only continued by the
    run that began it, and only left to others if it is empty.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        self.out, self.work = out, out / _WORK
        started = self.work / "run.json"
        if overwrite and out.exists():
            _clear(out)
        if started.exists() or (out.exists() and any(file != self.work for file in out.iterdir())):
            if not resume:
                if started.exists():
                    raise OutputError(f"{out}: holds an unfinished run; pass --resume to go on with it or --overwrite to replace it")
                what = "another model; pass --overwrite to replace it" if (out / MANIFEST).exists() else "other files; choose another directory"
                raise OutputError(f"{out}: holds {what}")
            if started.exists():
                _same(json.loads(started.read_text())["fingerprint"], fingerprint, out)
            elif (out / MANIFEST).exists():
                raise OutputError(f"{out}: this run is complete, there is nothing to resume; pass --overwrite to replace it")
            else:
                raise OutputError(f"{out}: nothing to resume, and the directory holds other files; pass --overwrite to replace them")
        with disk_errors(out):
            self.work.mkdir(parents=True, exist_ok=True)
            if not started.exists():
                write_json(started, {"fingerprint": fingerprint})

    def notes(self) -> dict[str, Any]:
        """What was noted of the run so far (allocated methods, baselines), by key."""
        file = self.work / "notes.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def note(self, **values: Any) -> None:
        """Keep values for a resumed run."""
        with disk_errors(self.out):
            write_json(self.work / "notes.json", self.notes() | values)

    def parts(self) -> dict[str, dict[str, Any]]:
        """The record of every finished part, by name."""
        found = {}
        for file in sorted(self.work.glob("part-*.safetensors")):
            record = _metadata(file)
            found[record["part"]] = record
        return found

    def weight_files(self) -> dict[str, tuple[Path, Spec]]:
        """Where every finished weight is, and its spec, by parameter name."""
        found = {}
        for file in self.work.glob("part-*.safetensors"):
            for name, spec in _metadata(file)["specs"].items():
                found[name] = file, spec
        return found

    def commit(self, part: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a finished part. Raises: OutputError when the disk is full; earlier parts are kept and the run can be resumed."""
        name = hashlib.sha256(part.encode()).hexdigest()[:12]
        with disk_errors(self.out):
            atomically(self.work / f"part-{name}.safetensors", tensors, {"laconic": json.dumps(record | {"part": part})})

    def finish(self, manifest: dict[str, Any], source: Path | None, config: dict[str, Any]) -> None:
        """Turn the parts into a model directory: shards, their index, config, tokenizer, and the manifest last."""
        with disk_errors(self.out):
            _assemble(sorted(self.work.glob("part-*.safetensors")), self.out)
            found = companions(source) if source is not None else []
            copied = [file.name for file in found]
            self.note(copied=copied)
            for file in found:
                shutil.copyfile(file, self.out / file.name)
            write_json(self.out / "config.json", config, indent=2)
            write_json(self.out / MANIFEST, manifest | {"copied": copied})

    def close(self) -> None:
        """The run is complete: only the model and its report stay. The folder is renamed first: half of one must never look like a run."""
        done = self.out / _DONE
        shutil.rmtree(done, ignore_errors=True)
        self.work.rename(done)
        shutil.rmtree(done, ignore_errors=True)


def companions(source: Path) -> list[Path]:
    """The files of a model directory that its compressed copy takes as they are: tokenizer, generation settings, code."""
    ours = ("config.json", INDEX, MANIFEST, "report.json")
    return sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.name not in ours})


def earlier_files(out: Path, writer: str, ours: Callable[[Path], bool]) -> list[Path]:
    """What an earlier run of a `writer` left in a folder, by name. Raises: OutputError where anything is there that is not `ours`."""
    found = sorted(out.iterdir()) if out.is_dir() else []
    for file in found:
        if not ours(file):
            raise OutputError(f"{out}: holds files that no {writer} wrote ({file.name}); choose another directory")
    return found


def finite(value: Any) -> Any:
    """Plain values as JSON can hold them: NaN and infinities are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _clear(out: Path) -> None:
    """Remove what a run of ours left, by the names it noted. Raises: OutputError, removing nothing, where anything else is in the directory."""
    ours = {"report.json", "report.html", "config.json", MANIFEST, INDEX} if _is_ours(out) else set()
    for record in (out / _WORK / "notes.json", out / MANIFEST):
        ours |= set(_copied(record))

    def is_ours(file: Path) -> bool:
        if file.is_dir():
            return file.name in (_WORK, _DONE)
        name = file.name.removesuffix(".tmp")
        return name in ours or (_is_ours(out) and name.endswith(".safetensors") and (name == "model.safetensors" or name.startswith("model-")))

    files = sorted(out.iterdir())
    others = [file.name for file in files if not is_ours(file)]
    if others:
        raise OutputError(f"{out}: holds files that no run of laconic wrote ({others[0]}); choose another directory")
    for file in files:
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _is_ours(out: Path) -> bool:
    return (out / _WORK / "run.json").is_file() or (out / MANIFEST).is_file()


def _copied(record: Path) -> list[str]:
    """The names of the files a run copied beside its model; none from a record that cannot be read."""
    try:
        names = json.loads(record.read_text()).get("copied", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in names if isinstance(name, str) and name == Path(name).name]


def _same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        what = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
        raise OutputError(f"{out}: holds an unfinished run of another kind ({what}); use the same options, or --overwrite")


def _metadata(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return json.loads(header["__metadata__"]["laconic"])


def _assemble(parts: list[Path], out: Path) -> None:
    """Copy the parts' tensors into shards of at most 4 GiB (one tensor at least), in the order of their names, a few MB in memory."""
    shards: list[list[tuple[str, Path]]] = [[]]
    size = 0
    headers = {part: read_header(part) for part in parts}
    entries = sorted((name, part) for part, (tensors, _) in headers.items() for name in tensors)
    for name, part in entries:
        nbytes = headers[part][0][name].bytes
        if shards[-1] and size + nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, part))
        size += nbytes
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(names, shards, strict=True):
        _write_shard(out / file, shard)
    if count > 1:
        total = sum(t.bytes for tensors, _ in headers.values() for t in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _write_shard(file: Path, shard: list[tuple[str, Path]]) -> None:
    raw: dict[Path, tuple[dict[str, Any], int]] = {}
    for part in {part for _, part in shard}:
        with part.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            raw[part] = json.loads(stream.read(length)), 8 + length
    parts, offsets, entries = dict(shard), {}, []
    for name, part in shard:
        entry = raw[part][0][name]
        start, stop = entry["data_offsets"]
        offsets[name] = raw[part][1] + start
        entries.append((name, entry["dtype"], entry["shape"], stop - start))
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as target:
        for name, _, _, nbytes in write_header(target, entries):
            copy_bytes(parts[name], offsets[name], nbytes, target)
    settle(temporary, file)
