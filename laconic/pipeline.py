"""The order of things: load, plan, survey, compress, pack, verify, evaluate, report. Nothing else knows it."""

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import nn

from laconic.conclude import conclude, known_of, quality_of
from laconic.data.inputs import OWN, complete_inputs, read_inputs
from laconic.disk.companions import companions
from laconic.disk.lock import locked
from laconic.disk.output import Run, check_out
from laconic.engine.directory import stored_model
from laconic.engine.module import compress_module
from laconic.engine.options import Options
from laconic.engine.preflight import (
    fingerprint,
    is_run_whole,
    load_of,
    plan_directory,
    preflight,
    room_for,
    samples_fit,
)
from laconic.engine.report import Report
from laconic.errors import DataError, SchemeError
from laconic.host.ambient import undisturbed
from laconic.host.clock import Clock
from laconic.host.machine import pick_device, pick_dtype
from laconic.host.progress import Log, Progress, peak_memory, resident_memory
from laconic.measure.quality import predicts
from laconic.measure.samples import generation_samples
from laconic.model.batches import Batch
from laconic.scheme.text import Scheme, parse

__all__ = ["Options", "compress", "compress_directory", "plan_directory"]


@undisturbed(0)
def compress_directory(
    source: str | Path,
    scheme: Scheme,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a model directory (or hub id) into `out`, a block at a time, and report on what was stored.

    With `resume` on a complete run of the same kind: its report, evaluated again if the report is asked for something
    else.
    Raises: SchemeError, CheckpointError, DataError, OutputError and VerificationError, each before or without losing
    earlier results; ReportError when the model is complete and what follows (evaluation, samples, report) failed.
    """
    options, progress, out = options or Options(), progress or Log(), Path(out)
    pick_device(options.device), pick_dtype(options.dtype)
    with locked(out):
        check_out(out, resume=options.resume, overwrite=options.overwrite)
        return _into(source, scheme, out, options, progress)


def _into(source: str | Path, scheme: Scheme, out: Path, options: Options, progress: Progress) -> Report:
    """`compress_directory` into a directory that is ours."""
    started, device = time.time(), pick_device(options.device)
    checkpoint, plan, expected = plan_directory(source, scheme, options, progress)
    before = resident_memory()
    wanted = plan.reads_data
    given = read_inputs(checkpoint, options, wanted)
    files = {stored.file for stored in checkpoint.files.tensors.values()}
    beside = companions(checkpoint.path, trusted=options.trust_remote_code, model=files, out=out)
    if is_run_whole(checkpoint, given, options):
        whole = preflight(checkpoint, plan, load_of(checkpoint, plan, options), None)
        expected = replace(whole, notes=expected.notes, coverage=expected.coverage)
    peak = max(expected.peak_memory + max(resident_memory() - before, 0), peak_memory())
    expected = replace(expected, peak_memory=peak)
    notes = [*given.notes, *beside.notes, *room_for(out, expected.bytes)]
    run = Run(
        out,
        fingerprint(checkpoint, plan, options, given, wanted),
        resume=options.resume,
        overwrite=options.overwrite,
    )
    notes += run.mended
    asked = {"evaluate": options.evaluate, "test_tokens": options.test_tokens, "test": given.digest.get("test", OWN)}
    known = known_of(run)
    if known is not None and options.evaluate and known["report"].get("asked") != asked:
        known = {"report": {**known["report"], "metrics": {}, "asked": asked}, "samples": None}
    elif known is not None and run.closed:
        return Report(known["report"])
    if known is None:
        progress.plan(expected)
    for line in notes:
        progress.say(line)
    ahead = {
        name: cost.seconds
        for name, cost in expected.stages.items()
        if known is None or name in ("own text", "evaluation", "samples")
    }
    progress = clock = Clock(progress, ahead)
    windows, test = complete_inputs(checkpoint, options, given, run, progress, device, wanted and known is None)
    if known is None:
        values = stored_model(checkpoint, plan, scheme, Path(str(source)).name, windows, run, beside, options, progress)
        values |= {
            "source": str(source),
            "out": str(out),
            "command": options.command,
            "notes": [*checkpoint.notes, *expected.notes, *notes, *values["notes"]],
            "expected_bytes": expected.bytes,
            "peak_memory": {"expected": expected.peak_memory, "actual": peak_memory()},
            "expected_seconds": expected.seconds,
            "seconds": time.time() - started,
            "asked": asked,
        }
        clock.finish()
        known = {"report": values | {"stages": clock.told()}, "samples": None}
        run.verified(known)
    measure = (
        partial(quality_of, run.out, checkpoint, test, options, device, progress)
        if options.evaluate and test is not None
        else None
    )
    sample = None
    if (
        test is not None
        and predicts(checkpoint.skeleton, test)
        and given.tokenizer is not None
        and samples_fit(checkpoint)
    ):
        sample = partial(generation_samples, checkpoint, run.out, next(test.sequences())[None], device)
    return conclude(run, known, measure, sample, clock)


@overload
def compress(
    source: nn.Module, scheme: Scheme | str, data: Iterable[Batch] | None = None, **options: Any
) -> tuple[nn.Module, Report]: ...


@overload
def compress(
    source: str | Path, scheme: Scheme | str, data: str | Path | Iterable[Batch] | None = None, **options: Any
) -> Report: ...


def compress(
    source: nn.Module | str | Path,
    scheme: Scheme | str,
    data: Iterable[Batch] | str | Path | None = None,
    **options: Any,
) -> tuple[nn.Module, Report] | Report:
    """Compress a module in memory (`engine.module.compress_module`) or a model directory (`compress_directory`) by a
    scheme or its text.

    For a module: `data` is a loader, `validation` one with answers, on which loss and score are measured; returns the
    module, its matrices replaced by installed Weights, and a report. For a directory or hub id: `out` names the
    directory to write, `data` a text, a folder of images or sound, or batches the model can be called with (a
    DataLoader, a data set, a list); other keywords are those of `Options`; returns the report.
    """
    progress = options.pop("progress", None)
    chosen = parse(scheme) if isinstance(scheme, str) else scheme
    if isinstance(source, nn.Module):
        if isinstance(data, str | Path):
            raise DataError(
                f"a module in memory is calibrated with batches it can be called with, not with {str(data)!r}"
            )
        return compress_module(source, chosen, data, progress=progress, **options)
    if "out" not in options:
        raise SchemeError(f"{source}: say where the compressed model goes: compress(source, scheme, out=...)")
    out = options.pop("out")
    if data is not None:
        options["data"] = data
    return compress_directory(source, chosen, out, Options(**options), progress)
