"""A recovery into a directory: trained, stored, read back, measured in the form it is stored in."""

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from laconic.errors import OutputError, VerificationError
from laconic.machine import machine, versions
from laconic.memory import load_into, save
from laconic.progress import Progress
from laconic.recover.call import How, recover_task
from laconic.recover.checkpoint import STATE
from laconic.recover.task import Task
from laconic.recover.text import complete_directory
from laconic.run import disk_errors, write_json
from laconic.scheme import Scheme
from laconic.store import MANIFEST
from laconic.weights import installed

RESULT = "recovery.json"


def recover_directory(
    model: nn.Module, scheme: Scheme, how: How, task: Task, out: Path, *, source: str | None, resume: bool, overwrite: bool, seed: int,
    command: str, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Recover into `out`, and return what `recovery.json` holds: scores of the original, of direct compression and of the stored file.

    `source`: the directory of a language model, whose tokenizer and config are copied. Structures stay in place as zeros; `laconic search`
    removes them. Raises: OutputError for a folder that holds something else, VerificationError when the file does not decode to what was
    trained, and what `recover` raises.
    """
    _take(out, resume, overwrite)
    task = task.checked()
    reference = task.judge(model, task.validation)
    with disk_errors(out):
        compressed, found = recover_task(model, scheme, how, task, folder=out, resume=resume, seed=seed, progress=progress)
        size = save(compressed, out, scheme=found.scheme, recovery=repr(how), seed=seed, versions=versions())
    stored = load_into(copy.deepcopy(model).float(), out).eval()
    theirs = installed(stored)
    for name, weight in installed(compressed).items():
        if not weight.forward().equal(theirs[name].forward().to(weight.forward())):
            raise VerificationError(f"{out}: {name} does not decode to what was trained")
    test = {}
    if task.test is not None:
        test = {"reference_test_score": task.judge(model, task.test).score, "test_score": task.judge(stored, task.test).score}
    result = {
        **found.as_dict(), "recovery": repr(how), "reference_score": reference.score, "direct_score": found.direct, "stored_bytes": size,
        "original_bytes": sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values()),
        "seed": seed, "command": command, "versions": versions(), "machine": machine(), **test,
    }  # fmt: skip
    if source is not None:
        complete_directory(out, model, source)
    write_json(out / RESULT, result, indent=1)
    return result


def _take(out: Path, resume: bool, overwrite: bool) -> None:
    """Make sure the folder is empty, holds this command's unfinished run (`resume`), or a result that may be replaced (`overwrite`)."""
    if not out.exists() or not any(out.iterdir()):
        return
    if overwrite and ((out / MANIFEST).is_file() or (out / STATE).is_file()):
        shutil.rmtree(out)
    elif (out / MANIFEST).is_file():
        raise OutputError(f"{out}: holds a model; pass --overwrite to replace it")
    elif not (out / STATE).is_file():
        raise OutputError(f"{out}: holds other files; choose another directory")
    elif not resume:
        raise OutputError(f"{out}: holds an unfinished recovery; pass --resume to go on with it or --overwrite to replace it")
