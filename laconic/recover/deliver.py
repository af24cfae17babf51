"""A recovery into a directory: trained, stored, read back, measured in the form it is stored in."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from laconic.disk.files import disk_errors, write_json
from laconic.disk.lock import LOCK, check_place, locked
from laconic.disk.ours import RECOVERY, copied_names, earlier_files, is_of_model, remove
from laconic.disk.output import finite
from laconic.disk.state import half_types, plain_bytes
from laconic.disk.store import MANIFEST, Compressed, stored_bytes
from laconic.disk.tensors import checksum_of
from laconic.disk.verify import Computed, verify
from laconic.engine.checks import Prefix, check_prefix
from laconic.engine.saved import load_into, save
from laconic.errors import OutputError
from laconic.host.foreign import read_object
from laconic.host.machine import machine, versions
from laconic.host.progress import Progress
from laconic.recover.base import Recovery
from laconic.recover.batches import length_of
from laconic.recover.call import check_recovery, recover_task
from laconic.recover.checkpoint import STATE
from laconic.recover.own_text import is_own_text
from laconic.recover.projection import compressed_slots
from laconic.recover.task import Task
from laconic.recover.text import companions_of, complete_directory
from laconic.scheme.text import Scheme, describe
from laconic.weights import installed


def recover_directory(
    model: nn.Module,
    scheme: Scheme,
    how: Recovery,
    task: Task,
    out: Path,
    *,
    source: str | None,
    resume: bool,
    overwrite: bool,
    seed: int,
    command: str,
    progress: Progress,
    trust_remote_code: bool = False,
    statistics: Prefix = "original",
) -> dict[str, Any]:
    """Recover into `out`, and return what `recovery.json` holds: scores of the original, of direct compression and of
    the stored file.

    `source`: the directory or hub id of a language model, whose tokenizer and config are copied. Structures stay in
    place as zeros; `laconic search` removes them. What is to be replaced is removed when everything else has been
    checked. With `resume` on a complete recovery of the same kind: what its `recovery.json` holds. `statistics`: as in
    `recover`.
    Raises: OutputError for a folder that holds something else, VerificationError when the file does not decode to what
    was trained, and what `recover` raises.
    """
    check_prefix(statistics)
    with locked(out):
        check_folder(out, resume, overwrite)
        about = _about(model, scheme, how, task, seed, statistics)
        if resume and not overwrite and (found := _earlier(out, about)) is not None:
            return found
        return _recovered(
            model,
            scheme,
            how,
            task,
            out,
            about,
            source=source,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            command=command,
            progress=progress,
            trust_remote_code=trust_remote_code,
            statistics=statistics,
        )


def _about(
    model: nn.Module, scheme: Scheme, how: Recovery, task: Task, seed: int, statistics: Prefix
) -> dict[str, Any]:
    """What has to be equal for a complete recovery to be the one that is asked for; the default needs no word."""
    about = {"statistics": statistics} if statistics != "original" else {}
    return about | {
        "model": checksum_of(model.state_dict()),
        "scheme": describe(scheme),
        "recovery": repr(how),
        "minibatches": length_of(task.train),
        "seed": seed,
        "laconic": versions()["laconic"],
    }


def _earlier(out: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the complete recovery in a folder found, if one is there. Raises: OutputError when it is another."""
    if not (out / MANIFEST).is_file() or (out / STATE).is_file():
        return None
    Compressed(out)  # damage is found here
    try:
        found = read_object(out / RECOVERY, OutputError)
    except OutputError as error:
        raise OutputError(f"{error}; pass --overwrite to replace the model beside it") from error
    before = found.get("run")
    if not isinstance(before, dict):
        raise OutputError(f"{out / RECOVERY}: does not say how the model was made; pass --overwrite to replace it")
    keys = {*about, *({"statistics"} & before.keys())}
    changed = sorted(key for key in keys if before.get(key) != about.get(key))
    if changed:
        what = "; ".join(f"{key}: {before.get(key)!r} then, {about.get(key)!r} now" for key in changed)
        raise OutputError(
            f"{out}: holds the complete result of another recovery ({what}); use the same options, or pass --overwrite "
            "to replace it"
        )
    return found


def _recovered(
    model: nn.Module,
    scheme: Scheme,
    how: Recovery,
    task: Task,
    out: Path,
    about: dict[str, Any],
    *,
    source: str | None,
    resume: bool,
    overwrite: bool,
    seed: int,
    command: str,
    progress: Progress,
    trust_remote_code: bool,
    statistics: Prefix,
) -> dict[str, Any]:
    """`recover_directory` into a folder that is ours."""
    original_bytes, types, model = plain_bytes(model), half_types(model), copy.deepcopy(model).float()
    check_recovery(how).check(model, compressed_slots(model, scheme))
    task = task.checked()
    reference = task.judge(model, task.validation)
    copied = companions_of(source, trust_remote_code).files if source is not None else []
    with disk_errors(out):
        # of this very run, most likely; another's is refused
        if overwrite and not (resume and (out / STATE).is_file()):
            _clear(out)
        unseen = replace(task, test=None)
        compressed, found = recover_task(
            model,
            scheme,
            how,
            unseen,
            folder=out,
            resume=resume,
            statistics=statistics,
            seed=seed,
            progress=progress,
            keep=True,
            types=types,
        )
        save(
            compressed,
            out,
            types=types,
            scheme=found.scheme,
            recovery=repr(how),
            seed=seed,
            versions=versions(),
            copied=copied,
        )
    written = Compressed(out)
    trained = {name: Computed.of(weight) for name, weight in installed(compressed).items() if name in written.weights}
    verify(written, trained, {})
    stored = load_into(copy.deepcopy(model), out).to(next(model.parameters()).device).eval()
    test = {}
    if task.test is not None:
        test = {
            "reference_test_score": task.judge(model, task.test).score,
            "test_score": task.judge(stored, task.test).score,
        }
    result = {
        **found.as_dict(),
        "recovery": repr(how),
        "reference_score": reference.score,
        "direct_score": found.direct,
        "original_bytes": original_bytes,
        "seed": seed,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "run": about,
        **test,
    }
    result = finite(result)
    with disk_errors(out):
        if source is not None:
            result["notes"] = [*result["notes"], *complete_directory(out, model, source, trust_remote_code)]
        result["stored_bytes"] = stored_bytes(out)
        write_json(out / RECOVERY, result, indent=1)
    for file in _temporary(out):  # only now is nothing lost by a kill
        file.unlink()
    return result


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make sure the folder is empty (but for a text the model wrote), holds an unfinished run (`resume`), or what may
    be replaced (`overwrite`).

    Raises: OutputError.
    """
    check_place(out)
    there = {file for file in out.iterdir() if file.name != LOCK} if out.exists() else set()
    if not there:
        return
    if overwrite:
        _leftovers(out)
    elif (out / MANIFEST).is_file() and not (out / STATE).is_file():
        if not (resume and (out / RECOVERY).is_file()):
            raise OutputError(f"{out}: holds a model; pass --overwrite to replace it")
    elif (out / STATE).is_file():
        if not resume:
            raise OutputError(
                f"{out}: holds an unfinished recovery; pass --resume to go on with it or --overwrite to replace it"
            )
    elif there - set(_temporary(out)):
        raise OutputError(f"{out}: holds other files; choose another directory")


def _temporary(out: Path) -> list[Path]:
    """What is in the folder only while a recovery is not over."""
    return [file for file in out.iterdir() if file.name.removesuffix(".tmp") == STATE or is_own_text(file)]


def _leftovers(out: Path) -> list[Path]:
    """The files an earlier recovery wrote, the manifest, which names them, last. Raises: OutputError where anything
    else is in the folder.
    """
    copied, temporary = copied_names(out / MANIFEST), set(_temporary(out))

    def ours(path: str) -> bool:
        return is_of_model(path) or path == RECOVERY or path in copied or out / path in temporary

    return sorted(earlier_files(out, "recovery", ours), key=lambda file: file == out / MANIFEST)


def _clear(out: Path) -> None:
    # which this run may have written a moment ago
    remove(out, [file for file in _leftovers(out) if not is_own_text(file)])
