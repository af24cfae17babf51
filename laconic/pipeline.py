"""The order of things: load, plan, survey, compress, pack, verify, evaluate, report. Nothing else knows it."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from laconic.conclude import conclude, known_of
from laconic.data.inputs import OWN, Given, check_request, complete_inputs, own_windows, read_inputs
from laconic.data.modality import is_language_model
from laconic.data.reading import Material
from laconic.disk.companions import Companions, companions
from laconic.disk.load import Checkpoint, CompressedCheckpoint, open_source, original_file_bytes
from laconic.disk.lock import locked
from laconic.disk.output import Run, check_out
from laconic.disk.store import manifest_of
from laconic.engine.coverage import coverage
from laconic.engine.estimate import Load
from laconic.engine.module import compress_module
from laconic.engine.passes import (
    Extras,
    Overlay,
    allocate,
    commit_rest,
    compress_parts,
    compression_stages,
    data_free_stages,
    refuse_rounding,
    refuse_structures,
    survey_stages,
    verify,
)
from laconic.engine.plan import Plan
from laconic.engine.preflight import preflight, room_for
from laconic.engine.report import Report
from laconic.engine.resolve import Fit, patterns, resolve
from laconic.engine.unmeasured import unmeasured_notes
from laconic.engine.walk import Shelf
from laconic.errors import CheckpointError, DataError, SchemeError
from laconic.host.ambient import undisturbed
from laconic.host.clock import Clock
from laconic.host.machine import machine, pick_device, pick_dtype, versions
from laconic.host.progress import Log, Progress, peak_memory, resident_memory
from laconic.host.record import plain
from laconic.host.told import Preflight, SiteRecord
from laconic.measure.quality import count_parameters, perplexity, predicts, similarity
from laconic.measure.samples import generation_samples, samples_fit
from laconic.model.batches import Batch
from laconic.model.blocks import find_chain, open_chain
from laconic.model.opened import open_blocks
from laconic.model.residence import Residence
from laconic.model.sites import INPUTS, find_slots, views_of
from laconic.scheme.text import Scheme, describe, parse

SURVEY_SAMPLES = 32  # windows of the backward pass: what it estimates per site are means over millions of entries


@dataclass(frozen=True)
class Options:
    """How a model directory is compressed; what to do to it is the scheme's.

    `data`: "self" (text sampled from the model), a file or directory of what the model reads, "hub:name", or an iterable of batches that it
    can be called with; `test`: data for the report's figures, by default the last tenth of `data`, which calibration never sees. `samples`
    windows of `length` tokens (or examples) calibrate; `test_tokens` are evaluated.
    `keep`: patterns of sites that stay as they are; `group`: "fit" or "strict", where a group does not divide a matrix (`engine.resolve`).
    """

    data: Any = "self"
    test: Any = None
    samples: int = 128
    length: int = 256
    test_tokens: int = 32768
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    true_sequential: bool = False
    resume: bool = False
    overwrite: bool = False
    skip_nonfinite: bool = False
    trust_remote_code: bool = False
    evaluate: bool = True
    keep: str | Sequence[str] = ()
    group: Fit = "fit"
    command: str = field(default="", compare=False)


def plan_directory(
    source: str | Path, scheme: Scheme, options: Options, progress: Progress
) -> tuple[Checkpoint, Plan, Preflight]:
    """Everything that can be known before the work: the checked checkpoint, the plan, and the preflight's numbers."""
    checkpoint = open_source(source, trust_remote_code=options.trust_remote_code)
    if isinstance(checkpoint, CompressedCheckpoint):
        raise CheckpointError(f"{source}: already compressed by laconic; start from the original weights")
    for note in checkpoint.notes:
        progress.say(note)
    notes: list[str] = []
    plan = resolve(
        scheme, find_slots(checkpoint.skeleton), whole_file=True, keep=options.keep, group=options.group, notes=notes
    )
    refuse_structures(plan)
    refuse_rounding(checkpoint.skeleton, plan)
    check_request(checkpoint.skeleton, options, plan.reads_data)
    progress.start("checking that all weights are finite", 1)
    bad = set(checkpoint.non_finite())
    named = sorted(bad)
    if bad and not options.skip_nonfinite:
        raise CheckpointError(
            f"{source}: NaN or infinity in {', '.join(named[:5])}; pass --skip-nonfinite to leave such tensors as they are"
        )
    spoilt = [slot for slot in plan.slots if bad.intersection(slot.parameters)]
    plan = plan.keeping(dict.fromkeys(spoilt, "not finite"))
    for slot in spoilt:
        progress.say(f"{slot.name}: left as it is, it holds NaN or infinity")
    expected = preflight(checkpoint, plan, _load_of(checkpoint, plan, options), find_chain(checkpoint.skeleton))
    return checkpoint, plan, replace(expected, notes=notes, coverage=coverage(checkpoint.skeleton, plan))


def _load_of(checkpoint: Checkpoint, plan: Plan, options: Options) -> Load:
    """What is run through the model."""
    calibrated, language = plan.reads_data, is_language_model(checkpoint.skeleton)
    text = checkpoint.config.get_text_config()
    return Load(
        samples=options.samples if calibrated else 0, length=options.length, width=getattr(text, "hidden_size", 0),
        written=own_windows(options, calibrated) if language else 0,
        surveyed=min(options.samples, SURVEY_SAMPLES) if any(plan.surveyed.values()) else 0,
        vocabulary=getattr(text, "vocab_size", 0) if language else 0,
        test_tokens=options.test_tokens if options.evaluate else 0, generates=options.evaluate and language and samples_fit(checkpoint),
    )  # fmt: skip


def _is_run_whole(checkpoint: Checkpoint, given: Given, options: Options) -> bool:
    """Whether a run on the data shows that the model's list of blocks is no chain, so that all of it will be in memory."""
    material = given.calibration or given.test
    if find_chain(checkpoint.skeleton) is None or (material is None and given.vocabulary is None):
        return False
    start = list(given.vocabulary.start) if given.vocabulary is not None else []
    batch = (
        material.first(1).batches(1)[0]
        if material is not None
        else {"input_ids": torch.tensor([[*start, 0, 0]]), "use_cache": False}
    )
    return open_blocks(checkpoint, pick_dtype(options.dtype), pick_device(options.device), batch)[0] is None


@undisturbed(0)
def compress_directory(
    source: str | Path,
    scheme: Scheme,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a model directory (or hub id) into `out`, a block at a time, and report on what was stored.

    With `resume` on a complete run of the same kind: its report, evaluated again if the report is asked for something else.
    Raises: SchemeError, CheckpointError, DataError, OutputError and VerificationError, each before or without losing earlier results;
    ReportError when the model is complete and what follows (evaluation, samples, report) failed.
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
    if _is_run_whole(checkpoint, given, options):
        whole = preflight(checkpoint, plan, _load_of(checkpoint, plan, options), None)
        expected = replace(whole, notes=expected.notes, coverage=expected.coverage)
    peak = max(expected.peak_memory + max(resident_memory() - before, 0), peak_memory())
    expected = replace(expected, peak_memory=peak)
    notes = [*given.notes, *beside.notes, *room_for(out, expected.bytes)]
    run = Run(
        out,
        _fingerprint(checkpoint, plan, options, given, wanted),
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
        values = _stored_model(
            checkpoint, plan, scheme, Path(str(source)).name, windows, run, beside, options, progress
        )
        values |= {
            "source": str(source), "out": str(out), "command": options.command,
            "notes": [*checkpoint.notes, *expected.notes, *notes, *values["notes"]],
            "expected_bytes": expected.bytes, "peak_memory": {"expected": expected.peak_memory, "actual": peak_memory()},
            "expected_seconds": expected.seconds, "seconds": time.time() - started, "asked": asked,
        }  # fmt: skip
        clock.finish()
        known = {"report": values | {"stages": clock.told()}, "samples": None}
        run.verified(known)
    measure = (
        partial(_quality, run.out, checkpoint, test, options, device, progress)
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


def _stored_model(
    checkpoint: Checkpoint, plan: Plan, scheme: Scheme, source: str, windows: Material | None, run: Run, beside: Companions,
    options: Options, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Compress, store and verify; returns what the report says of the model, but for its quality."""
    device = pick_device(options.device)
    plan = _allocated(checkpoint, plan, windows, options, run, device, progress)
    _compress(checkpoint, plan, windows, options, run, device, progress)
    kept = commit_rest(run, checkpoint, plan)
    records = [
        replace(SiteRecord.from_json(site), original_bytes=checkpoint.on_disk(site["parameter"]))
        for part in run.parts().values()
        for site in part["sites"]
    ]
    order = {slot.name: i for i, slot in enumerate(plan.slots)}
    records.sort(key=lambda record: order[record.name])
    parameters = count_parameters(checkpoint.skeleton)
    manifest = manifest_of(
        list(run.parts().values()), scheme=describe(scheme), keep=patterns(options.keep), seed=options.seed, versions=versions(),
        source={"name": source, "parameters": parameters}, data=windows.describe() if windows is not None else None,
        plan=plan.fitted().to_json(), **views_of(checkpoint.skeleton, list(plan.methods)),
    )  # fmt: skip
    config = checkpoint.config.to_dict() | {
        "quantization_config": {"quant_method": "laconic", "schema": manifest["schema"]}
    }
    run.finish(manifest, beside, config)
    verify(run.out, checkpoint, records, kept, progress)
    told = [*filter(None, [run.notes().get("chain")]), *run.notes().get("allocation", [])]
    return {
        "scheme": describe(scheme), "keep": patterns(options.keep), "seed": options.seed, "data": manifest["data"],
        "sites": plain(records), "metrics": {}, "notes": told + unmeasured_notes(records, parameters, progress), "unused": checkpoint.unused,
        "original_bytes": original_file_bytes(checkpoint), "parameters": parameters, "kept": _kept(checkpoint, kept),
        "coverage": coverage(checkpoint.skeleton, plan), "versions": versions(), "machine": machine(),
    }  # fmt: skip


def _allocated(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Material | None,
    options: Options,
    run: Run,
    device: torch.device,
    progress: Progress,
) -> Plan:
    """Each site's own method, after the survey that methods spreading one number (or needing gradients) call for; kept in the run."""
    spread, needs = plan.allocations(), plan.surveyed
    if not spread and not any(needs.values()):
        return plan
    noted = run.notes().get("plan")
    if noted is not None:
        return Plan.from_json(noted, plan.slots)
    concerned = [slot for slot, method in plan.methods.items() if method in spread or needs[slot]]
    progress.start("surveying the original model", sum(slot.entries for slot in concerned))
    extras = Extras(run.work)
    if any(needs.values()) and windows is not None:
        batches = windows.first(SURVEY_SAMPLES).batches(1)
        blocks, residence, why = open_blocks(checkpoint, pick_dtype(options.dtype), device, batches[0])
        _say_no_chain(run, progress, why)
        stages = survey_stages(blocks, residence, batches, concerned, needs, options.seed, Shelf(run.work))
    else:
        residence = Residence(checkpoint.skeleton, checkpoint, None, None, device)
        stages = data_free_stages(residence, concerned)
    notes: list[str] = []
    resolved = allocate(stages, plan, spread, extras, checkpoint.skeleton, options.seed, progress, notes)
    kept = sorted(file.name for file in run.work.glob("extra-*"))
    run.note(plan=resolved.to_json(), allocation=notes, extras=kept)
    return resolved


def _say_no_chain(run: Run, progress: Progress, why: str) -> None:
    """Note in the run, once, that a model is run whole because its blocks form no chain."""
    if why and run.notes().get("chain") is None:
        run.note(chain=f"{why}; the whole model is run for every unit")
        progress.say(run.notes()["chain"])


def _compress(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: Material | None,
    options: Options,
    run: Run,
    device: torch.device,
    progress: Progress,
) -> None:
    needs = plan.needs
    slots = list(needs)
    calibrated = any(wanted & INPUTS for wanted in needs.values())
    dtype = pick_dtype(options.dtype) if calibrated else None
    overlay = Overlay(checkpoint, run, slots)
    chain = find_chain(checkpoint.skeleton)
    residence = Residence(checkpoint.skeleton, overlay, chain, dtype, device)
    first = windows.first(1).batches(1)[0] if windows is not None and calibrated else None
    blocks, why = open_chain(residence, chain, first)
    if blocks is None:
        residence.chain = None
        _say_no_chain(run, progress, why)
    batches = windows.batches(max(1, 4096 // windows.length)) if windows is not None and calibrated else []
    done = list(run.parts())
    progress.start("compressing", sum(slot.entries * slot.columns for slot in slots))
    finished = {name for record in run.parts().values() for name in record["specs"]}
    progress.advance(
        sum(slot.entries * slot.columns for slot in slots if slot.parameter in finished), "finished before"
    )
    stages = compression_stages(
        blocks, residence, batches, slots, needs, options.true_sequential, Shelf(run.work), done
    )
    compress_parts(stages, plan, checkpoint.skeleton, run, Extras(run.work), options.seed, calibrated, progress)


def _quality(
    out: Path, checkpoint: Checkpoint, test: Material, options: Options, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """The stored model against the original on the test windows."""
    progress.start("evaluating what was stored", 1)
    stored = CompressedCheckpoint(out, trust_remote_code=options.trust_remote_code)
    if not predicts(checkpoint.skeleton, test):
        return {"data": test.source, **similarity(stored, checkpoint, test, pick_dtype(options.dtype), device)}
    return perplexity(stored, test, reference=checkpoint, dtype=pick_dtype(options.dtype), device=device).as_dict()


def _kept(checkpoint: Checkpoint, names: list[str]) -> list[dict[str, Any]]:
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.skeleton.state_dict().items()}
    return [{"name": name, "bytes": checkpoint.nbytes(name), "shape": shapes[name]} for name in names]


def _fingerprint(
    checkpoint: Checkpoint, plan: Plan, options: Options, given: Given, calibrated: bool
) -> dict[str, Any]:
    """What must be equal for a run to be continued: what makes the model; a report can be asked for anew."""
    headers = hashlib.sha256(
        repr(sorted((n, t.dtype, t.shape, t.file.name) for n, t in checkpoint.files.tensors.items())).encode()
    )
    return {
        "model": f"{checkpoint.path.name}:{headers.hexdigest()[:16]}",
        "methods": hashlib.sha256(
            repr([(slot.name, text) for slot, text in plan.texts().items()]).encode()
        ).hexdigest()[:16],
        "data": (given.digest.get("calibration") or {OWN: given.digest.get("start")}) if calibrated else None,
        **{name: getattr(options, name) for name in ("samples", "length", "seed", "dtype", "true_sequential")},
        "laconic": versions()["laconic"],
    }


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
    """Compress a module in memory (`engine.module.compress_module`) or a model directory (`compress_directory`) by a scheme or its text.

    For a module: `data` is a loader, `score` a function of the module; returns the module, its matrices replaced by installed Weights, and a
    report. For a directory or hub id: `out` names the directory to write, `data` a text, a folder of images or sound, or batches the model can be
    called with (a DataLoader, a data set, a list); other keywords are those of `Options`; returns the report.
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
