"""Text that a model writes for its own training, kept in a file so that a killed run does not write it twice."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.data import Windows, sampled_batches
from laconic.progress import Progress, logger
from laconic.run import atomically, disk_errors
from laconic.tensors import checksum_of

OWN_TEXT = "own_text.safetensors"
_EVERY = 60.0  # seconds of writing that a kill may cost


def own_text(model: Any, counts: Sequence[int], length: int, seed: int, folder: Path | None, progress: Progress) -> list[Windows]:
    """Parts of `counts` windows of `length` tokens each, part i as `sample_windows` draws it from seed + i.

    With a folder, what is written is stored in its `own_text.safetensors` every minute and at the end; the same call goes on from there, to
    the same text. A file that another call wrote (another model, seed or size), or that is damaged, is replaced.
    Raises: OutputError when the disk is full. Cost: a forward pass of one token, with a cache, per 32 tokens.
    """
    progress.start("the model writes the text it learns from", sum(counts))
    about = {"windows": list(counts), "length": length, "seed": seed}
    if folder is not None:
        about["model"] = checksum_of(model.state_dict())
    parts, state = _read(folder, about)
    stored = time.monotonic()
    for i, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed + i)
        if i == len(parts):
            parts.append(torch.empty(0, length, dtype=torch.long))
        elif i == len(parts) - 1 and state is not None:
            generator.set_state(state)
        progress.advance(len(parts[i]))
        for ids in sampled_batches(model, count - len(parts[i]), length, generator):
            parts[i] = torch.cat([parts[i], ids])
            progress.advance(len(ids))
            complete = i == len(counts) - 1 and len(parts[i]) == count
            if folder is not None and (complete or time.monotonic() - stored > _EVERY):
                _write(folder, about, parts, generator.get_state())
                stored = time.monotonic()
    return [Windows(part, "self") for part in parts]


def _write(folder: Path, about: dict[str, Any], parts: Sequence[Tensor], state: Tensor) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {str(i): part.to(torch.int32) for i, part in enumerate(parts)}
        atomically(folder / OWN_TEXT, tensors | {"state": state}, {"about": json.dumps(about)})


def _read(folder: Path | None, about: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
    """The parts written so far, the last of them perhaps not to its end, and the generator's state there."""
    file = folder / OWN_TEXT if folder is not None else None
    if file is None or not file.is_file():
        return [], None
    try:
        with safe_open(file, framework="pt") as reader:
            if json.loads(reader.metadata()["about"]) != about:
                logger.info("%s: text of another run; it is replaced", file)
                return [], None
            return [reader.get_tensor(str(i)).long() for i in range(len(reader.keys()) - 1)], reader.get_tensor("state")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.info("%s: damaged (%s); it is replaced", file, error)
        return [], None
