"""A recovery into a directory: trained, stored, read back, measured in the form it is stored in."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from laconic.choice import resolve
from laconic.errors import OutputError, VerificationError
from laconic.files import disk_errors, write_json
from laconic.load import fetch
from laconic.machine import machine, versions
from laconic.memory import half_types, load_into, plain_bytes, save
from laconic.progress import Progress
from laconic.recover.call import How, recover_task
from laconic.recover.checkpoint import STATE
from laconic.recover.own_text import is_own_text
from laconic.recover.task import Task
from laconic.recover.text import complete_directory
from laconic.run import companions, earlier_files, finite
from laconic.scheme import Scheme
from laconic.sites import find_slots
from laconic.store import MANIFEST, read_manifest
from laconic.weights import installed

RESULT = "recovery.json"


def recover_directory(
    model: nn.Module, scheme: Scheme, how: How, task: Task, out: Path, *, source: str | None, resume: bool, overwrite: bool, seed: int,
    command: str, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Recover into `out`, and return what `recovery.json` holds: scores of the original, of direct compression and of the stored file.

    `source`: the directory or hub id of a language model, whose tokenizer and config are copied. Structures stay in place as zeros;
    `laconic search` removes them. What is to be replaced is removed when everything else has been checked.
    Raises: OutputError for a folder that holds something else, VerificationError when the file does not decode to what was trained, and what
    `recover` raises.
    """
    check_folder(out, resume, overwrite)
    original_bytes, types, model = plain_bytes(model), half_types(model), copy.deepcopy(model).float()
    resolve(scheme, find_slots(model))
    task = task.checked()
    reference = task.judge(model, task.validation)
    copied = [file.name for file in companions(fetch(source))] if source is not None else []
    with disk_errors(out):
        if overwrite and not (resume and (out / STATE).is_file()):  # of this very run, most likely; another's is refused
            _clear(out)
        unseen = replace(task, test=None)
        compressed, found = recover_task(model, scheme, how, unseen, folder=out, resume=resume, seed=seed, progress=progress, keep=True, types=types)
        size = save(compressed, out, types=types, scheme=found.scheme, recovery=repr(how), seed=seed, versions=versions(), copied=copied)
        size -= sum(file.stat().st_size for file in _temporary(out) if file.suffix == ".safetensors")  # still there, and no part of the model
    stored = load_into(copy.deepcopy(model), out).to(next(model.parameters()).device).eval()
    theirs = installed(stored)
    for name, weight in installed(compressed).items():
        if not weight.forward().equal(theirs[name].forward().to(weight.forward())):
            raise VerificationError(f"{out}: {name} does not decode to what was trained")
    test = {}
    if task.test is not None:
        test = {"reference_test_score": task.judge(model, task.test).score, "test_score": task.judge(stored, task.test).score}
    result = {
        **found.as_dict(), "recovery": repr(how), "reference_score": reference.score, "direct_score": found.direct, "stored_bytes": size,
        "original_bytes": original_bytes,
        "seed": seed, "command": command, "versions": versions(), "machine": machine(), **test,
    }  # fmt: skip
    result = finite(result)
    if source is not None:
        complete_directory(out, model, source)
    write_json(out / RESULT, result, indent=1)
    for file in _temporary(out):  # only now is nothing lost by a kill
        file.unlink()
    return result


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make sure the folder is empty (but for a text the model wrote), holds an unfinished run (`resume`), or what may be replaced (`overwrite`).

    Raises: OutputError.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: expected a directory, found a file")
    if not out.exists() or not any(out.iterdir()):
        return
    if overwrite:
        _leftovers(out)
    elif (out / MANIFEST).is_file() and not (out / STATE).is_file():
        raise OutputError(f"{out}: holds a model; pass --overwrite to replace it")
    elif (out / STATE).is_file():
        if not resume:
            raise OutputError(f"{out}: holds an unfinished recovery; pass --resume to go on with it or --overwrite to replace it")
    elif set(out.iterdir()) - set(_temporary(out)):
        raise OutputError(f"{out}: holds other files; choose another directory")


def _temporary(out: Path) -> list[Path]:
    """What is in the folder only while a recovery is not over."""
    return [file for file in out.iterdir() if file.name.removesuffix(".tmp") == STATE or is_own_text(file)]


def _leftovers(out: Path) -> list[Path]:
    """The files an earlier recovery wrote. Raises: OutputError where anything else is in the folder."""
    ours = {MANIFEST, RESULT, "config.json", "model.safetensors"}
    ours |= set(read_manifest(out).get("copied", [])) if (out / MANIFEST).is_file() else set()
    temporary = set(_temporary(out))
    return earlier_files(out, "recovery", lambda file: not file.is_dir() and (file.name.removesuffix(".tmp") in ours or file in temporary))


def _clear(out: Path) -> None:
    for file in _leftovers(out):
        if not is_own_text(file):  # which this run may have written a moment ago
            file.unlink()
