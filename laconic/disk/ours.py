"""The files that laconic writes: one list of their names, for whoever writes, carries over or removes them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from laconic.disk.lock import LOCK
from laconic.disk.store import MANIFEST
from laconic.disk.tensors import INDEX
from laconic.errors import OutputError

CONFIG = "config.json"
TENSORS = "model.safetensors"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"
RECOVERY = "recovery.json"
SEARCH_JSON, SEARCH_HTML = "search.json", "search.html"
WORK = ".laconic"
"""The folder in which a run keeps what is finished."""
DONE = ".laconic-done"
"""The same of a complete run, on its way out."""
OF_EVERY_OUTPUT = (CONFIG, MANIFEST, REPORT_JSON, REPORT_HTML, RECOVERY)
"""What an output has of its own and never takes from the model it was made of."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}[.]safetensors")


def is_shard(name: str) -> bool:
    """Whether a file of that name holds one of several parts of a model's tensors."""
    return _SHARD.fullmatch(name) is not None


def is_of_model(name: str) -> bool:
    """Whether a file of that name, at the top of a folder that laconic wrote a model to, is part of that model."""
    return name in (MANIFEST, CONFIG, TENSORS, INDEX) or is_shard(name)


def is_result(folder: Path) -> bool:
    """Whether a folder holds a compressed model, complete or on its way."""
    return (folder / MANIFEST).exists() or (folder / WORK).exists()


def remove_shards(folder: Path) -> None:
    """Remove the shards and the index of an earlier model of ours, over which a single `model.safetensors` was just
    written.
    """
    for file in [folder / INDEX, *folder.glob("*.safetensors")]:
        if file.name == INDEX or is_shard(file.name):
            file.unlink(missing_ok=True)


def copied_names(record: Path) -> list[str]:
    """The paths of the files a run copied beside its model, as its record says; none from a record that cannot be
    read.
    """
    try:
        return relative_paths(json.loads(record.read_text(encoding="utf-8")).get("copied"))
    except (OSError, ValueError, AttributeError):
        return []


def relative_paths(names: Any) -> list[str]:
    """Those that are paths below a folder, and nothing that leads out of it."""
    names = names if isinstance(names, list) else []
    return [
        name
        for name in names
        if isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    ]


def earlier_files(out: Path, writer: str, ours: Callable[[str], bool], skip: tuple[str, ...] = ()) -> list[Path]:
    """Every file below a folder that an earlier run of a `writer` left there, those on their way (".tmp") among them.

    `ours` is asked for the path below the folder, of an empty folder with a "/" at its end. Raises: OutputError, naming
    the first, where anything is there that is not ours.
    """
    found = []
    for file in below(out, skip=(LOCK, *skip)) if out.is_dir() else ():
        name = file.relative_to(out).as_posix() + ("/" if file.is_dir() else "")
        if not (ours(name) or ours(name.removesuffix(".tmp"))):
            raise OutputError(f"{out}: holds files that no {writer} wrote ({name}); choose another directory")
        found.append(file)
    return found


def unfinished_files(out: Path, ours: Callable[[str], bool], skip: tuple[str, ...] = ()) -> list[Path]:
    """The files below a folder that a kill left on their way to becoming ours; whatever else is there is passed
    over.
    """
    names = {file.relative_to(out).as_posix(): file for file in below(out, skip=(LOCK, *skip)) if file.is_file()}
    return [
        file
        for name, file in names.items()
        if name.endswith(".tmp") and not ours(name) and ours(name.removesuffix(".tmp"))
    ]


def below(folder: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, links and empty folders among them; no link is followed."""
    for file in sorted(folder.iterdir()):
        if file.name in skip:
            continue
        if file.is_dir() and not file.is_symlink() and any(file.iterdir()):
            yield from below(file)
        else:
            yield file


def remove(out: Path, files: Iterable[Path]) -> None:
    """Remove files and empty folders below a folder, and the folders below it that they leave empty."""
    for file in files:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == out or any(folder.iterdir()):
                break
            folder.rmdir()
