"""Text that a model writes for its own training, kept in a file so that a killed run does not write it twice."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.data.sampled import Vocabulary, sampled_batches
from laconic.data.text import Windows
from laconic.disk.files import atomically, disk_errors
from laconic.disk.tensors import checksum_of
from laconic.host.progress import Progress, logger

_BATCH = 32  # windows written together
_EVERY = 60.0  # seconds of writing that a kill may cost


def is_own_text(file: Path) -> bool:
    """Whether `own_text` wrote a file, perhaps not to its end."""
    return re.fullmatch(r"own_text-[0-9a-f]{12}\.safetensors(\.\d+\.tmp)?", file.name) is not None and not file.is_dir()


def own_text(
    model: Any,
    counts: Sequence[int],
    length: int,
    seed: int,
    folder: Path | None,
    progress: Progress,
    vocabulary: Vocabulary | None = None,
) -> list[Windows]:
    """Parts of `counts` windows of `length` tokens each, part i as `sample_windows` draws it from seed + i and the
    vocabulary.

    With a folder, what is written is stored there every minute and at the end, in a file named after the model, the
    seed and the size; the same call goes on from there, to the same text. Several workers may do the same. A damaged
    file is written anew, with a warning.
    Raises: OutputError when the disk is full. Cost: a forward pass of one token, with a cache, per 32 tokens.
    """
    progress.start("the model writes the text it learns from", sum(counts))
    file = _file(folder, model, [*counts, length, seed], vocabulary) if folder is not None else None
    parts, state = _read(file)
    stored = time.monotonic()
    for i, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed + i)
        if i == len(parts):
            parts.append(torch.empty(0, length, dtype=torch.long))
        elif i == len(parts) - 1 and state is not None:
            generator.set_state(state)
        progress.advance(len(parts[i]))
        for ids in sampled_batches(model, count - len(parts[i]), length, generator, _BATCH, vocabulary):
            parts[i] = torch.cat([parts[i], ids])
            progress.advance(len(ids))
            complete = i == len(counts) - 1 and len(parts[i]) == count
            if file is not None and (complete or time.monotonic() - stored > _EVERY):
                _write(file, parts, generator.get_state())
                stored = time.monotonic()
    return [Windows(part, "self", vocabulary.start if vocabulary is not None else ()) for part in parts]


def _file(folder: Path, model: Any, numbers: list[int], vocabulary: Vocabulary | None) -> Path:
    words = [] if vocabulary is None else [[*vocabulary.start], vocabulary.size, sorted(vocabulary.special)]
    about = json.dumps([checksum_of(model.state_dict()), *numbers, *words])
    return folder / f"own_text-{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"


def _write(file: Path, parts: Sequence[Tensor], state: Tensor) -> None:
    tensors = {str(i): part.to(torch.int32) for i, part in enumerate(parts)} | {"state": state}
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomically(file, tensors, {"crc": str(checksum_of(tensors))}, f".{os.getpid()}.tmp")


def _read(file: Path | None) -> tuple[list[Tensor], Tensor | None]:
    """The parts written so far, the last of them perhaps not to its end, and the generator's state there."""
    if file is None or not file.is_file():
        return [], None
    try:
        with safe_open(file, framework="pt") as reader:
            names, told = reader.keys(), reader.metadata()
            tensors = {name: reader.get_tensor(name) for name in names}
    except (SafetensorError, OSError):
        tensors, told = {}, None
    if told is None or told.get("crc") != str(checksum_of(tensors)):
        logger.warning("%s: damaged; the text is written anew", file)
        return [], None
    state = tensors.pop("state")
    return [tensors[str(i)].long() for i in range(len(tensors))], state
