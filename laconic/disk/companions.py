"""What of a model's folder is not weights and goes with every form of the model: one rule for local folders and hub
repositories.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from laconic.disk.ours import OF_EVERY_OUTPUT, is_result
from laconic.errors import CheckpointError

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.h5",
    "*.hdf5",
    "*.keras",
    "*.msgpack",
    "*.npz",
    "*.npy",
    "*.pkl",
    "*.pickle",
    "*.joblib",
    "*.tflite",
    "*.pb",
    "*.ot",
    "*.mlmodel",
    "*.mlpackage/*",
    "*.pdparams",
    "*.pdmodel",
    "*.nemo",
    "*.distcp",
    "*.params",
    "*.engine",
    "*.llamafile",
    "*.pte",
    "*.exl2",
    "*.zip",
    "*.tar",
    "*.tar.*",
    "*.tgz",
    "*.data-?????-of-?????",
    "variables.index",
)
"""Names of files that hold weights, in whatever format (and of archives, which may): patterns as `fnmatch` reads them,
of whole paths.
"""

_INDEXES = ("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")
_ADAPTERS = ("adapter_config.json", "adapter_model.*")  # half an adapter makes transformers look for its weights
_CODE = ("*.py", "*.pyc", "*.so", "*.pyd", "*.dll", "*.dylib", "*.ipynb", "*.sh")
_FOREIGN = (
    "checkpoint-[0-9]*",
    "__pycache__",
)  # folders that are no part of the model: a trainer's earlier states, caches
_LARGE = 256 << 20  # bytes: tokenizers take tens of MB
_NAMED = 10  # files in a note

NOT_FETCHED = (
    *(pattern for pattern in WEIGHTS if pattern != "*.safetensors"),
    "*/*.safetensors",
    "consolidated*.safetensors",
    ".*",
)
"""Of a hub repository, what is not downloaded: weights but for the model's own, which are safetensors at its top."""


@dataclass(frozen=True)
class Companions:
    """The files to carry over, as paths below `source`, and what the user must hear of the others."""

    source: Path
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def copy_to(self, folder: Path) -> None:
        """Copy the files, links resolved, to the same places below another folder."""
        for name in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, target)


def companions(source: Path, *, trusted: bool, model: Collection[Path] = (), out: Path | None = None) -> Companions:
    """Everything of a model's folder that is not weights: tokenizer, processors, chat templates, sub-folders, licence;
    code only if `trusted`.

    Links are followed, as in the cache of the hub, where every file is one. Hidden files, earlier states of a training
    run and folders that hold a result of laconic's are passed over; weights that are not in `model` (the files the
    model was read from), adapters, code and files above 256 MB are left out with a note. `out` is not looked into.
    Raises: CheckpointError for a file that cannot be read.
    """
    found: list[str] = []
    left: dict[str, list[str]] = {}
    read = {file.resolve() for file in model}
    for file, name in _walk(source, source, {source.resolve(), *([out.resolve()] if out is not None else [])}):
        if any(fnmatch(PurePosixPath(name).name, pattern) for pattern in _ADAPTERS):
            left.setdefault("an adapter, which is not merged into the model", []).append(name)
        elif is_weights(name):
            if file.resolve() not in read and not any(fnmatch(name, pattern) for pattern in _INDEXES):
                left.setdefault("weights that are no part of the model", []).append(name)
        elif not trusted and any(fnmatch(name, pattern) for pattern in _CODE):
            left.setdefault("code, which --trust-remote-code carries over", []).append(name)
        elif name in OF_EVERY_OUTPUT:
            continue
        elif not file.exists():
            left.setdefault("links to nowhere", []).append(name)
        elif not os.access(file, os.R_OK):
            raise CheckpointError(
                f"{file}: cannot be read; it belongs to the model's folder and would be missing from its compressed "
                "form"
            )
        elif file.stat().st_size > _LARGE:
            left.setdefault(f"more than {_LARGE >> 20} MB each", []).append(name)
        else:
            found.append(name)
    return Companions(
        source,
        found,
        [f"not carried over from the model's folder, {why}: {_some(names)}" for why, names in left.items()],
    )


def is_weights(name: str) -> bool:
    """Whether the file at a path holds weights, or says where they are."""
    return any(fnmatch(name, pattern) for pattern in (*WEIGHTS, *_INDEXES))


def _walk(folder: Path, source: Path, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """Every file below a folder with its path from `source`, in order of their names; a folder is entered once, however
    it is linked.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); it belongs to the model's folder") from error
    for file in inside:
        if file.name.startswith(".") or any(fnmatch(file.name, pattern) for pattern in _FOREIGN):
            continue
        if not file.is_dir():
            if file.is_file() or file.is_symlink():  # no sockets, no pipes
                yield file, file.relative_to(source).as_posix()
            continue
        there = file.resolve()
        if there not in seen and not is_result(file):
            seen.add(there)
            yield from _walk(file, source, seen)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
