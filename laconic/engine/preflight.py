"""What a run will do and cost, before it starts: method and size of every site, peak memory, time."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laconic.data.inputs import OWN, Given, check_request, own_windows
from laconic.data.modality import is_language_model
from laconic.disk.load import CompressedCheckpoint, open_source
from laconic.disk.lock import LOCK
from laconic.disk.originals import Checkpoint
from laconic.disk.ours import below
from laconic.engine.checks import check_prefix, refuse_rounding, refuse_structures
from laconic.engine.coverage import coverage
from laconic.engine.estimate import Load, costs, measure_speeds
from laconic.engine.options import Options
from laconic.engine.plan import Plan
from laconic.engine.resolve import resolve
from laconic.errors import CheckpointError, OutputError
from laconic.host.machine import pick_device, pick_dtype, versions
from laconic.host.progress import Progress, resident_memory
from laconic.host.told import PlannedSite, Preflight
from laconic.host.units import human_bytes
from laconic.model.blocks import find_chain
from laconic.model.opened import open_blocks
from laconic.model.sites import find_slots
from laconic.scheme.text import Scheme

SURVEY_SAMPLES = 32  # windows of the backward pass: what it estimates per site are means over millions of entries
_LIBRARIES = 120_000_000  # bytes: what is imported later (plots, kernels), and the allocator's slack


def preflight(source: Checkpoint, plan: Plan, load: Load, chain: str | None) -> Preflight:
    """What a plan does and costs, from the sizes of the model and this machine's speeds."""
    plan = plan.fitted()
    sites: list[PlannedSite] = []
    for slot, text in plan.texts().items():
        original = 8 * source.nbytes(slot.parameter) or 16 * slot.entries
        kept = slot in plan.kept
        bits = original if kept else plan.methods[slot].expected_bits(slot.shape)
        sites.append(
            PlannedSite(
                name=slot.name,
                aliases=list(slot.names[1:]),
                shape=list(slot.shape),
                method=text,
                role=slot.role,
                bits_per_weight=bits / slot.entries,
                bytes=bits / 8,
                original_bytes=original / 8,
                kept=kept,
                reason=plan.kept.get(slot, ""),
            )
        )
    total = sum(stored.bytes for stored in source.files.tensors.values())
    rest = total - sum(site.original_bytes for site in sites)
    stages = costs(source, plan, load, chain, measure_speeds())
    return Preflight(
        sites=sites,
        bytes=round(sum(site.bytes for site in sites) + rest),
        original_bytes=total,
        peak_memory=resident_memory() + _LIBRARIES + max(cost.bytes for cost in stages.values()),
        seconds=sum(cost.seconds for cost in stages.values()),
        stages=stages,
    )


def room_for(out: Path, expected: int) -> list[str]:
    """What to say of the free space for a model of so many bytes. Raises: OutputError when the model alone takes more
    than there is.
    """
    there = sum(file.stat().st_size for file in below(out, skip=(LOCK,)) if file.is_file())
    free = shutil.disk_usage(out).free + there
    if free < expected:
        raise OutputError(
            f"{out}: {human_bytes(free)} are free on that disk, the model takes {human_bytes(expected)}; choose "
            "another place"
        )
    if free < 2 * expected:
        need, have = human_bytes(2 * expected), human_bytes(free)
        return [
            f"{out}: finished parts and the model made of them take {need} for a while; {have} are free on that disk"
        ]
    return []


def plan_directory(
    source: str | Path, scheme: Scheme, options: Options, progress: Progress
) -> tuple[Checkpoint, Plan, Preflight]:
    """Everything that can be known before the work: the checked checkpoint, the plan, and the preflight's numbers."""
    check_prefix(options.statistics, options.true_sequential)
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
            f"{source}: NaN or infinity in {', '.join(named[:5])}; pass --skip-nonfinite to leave such tensors as they "
            "are"
        )
    spoilt = [slot for slot in plan.slots if bad.intersection(slot.parameters)]
    plan = plan.keeping(dict.fromkeys(spoilt, "not finite"))
    for slot in spoilt:
        progress.say(f"{slot.name}: left as it is, it holds NaN or infinity")
    expected = preflight(checkpoint, plan, load_of(checkpoint, plan, options), find_chain(checkpoint.skeleton))
    return checkpoint, plan, replace(expected, notes=notes, coverage=coverage(checkpoint.skeleton, plan))


def load_of(checkpoint: Checkpoint, plan: Plan, options: Options) -> Load:
    """What is run through the model."""
    calibrated, language = plan.reads_data, is_language_model(checkpoint.skeleton)
    text = checkpoint.config.get_text_config()
    return Load(
        samples=options.samples if calibrated else 0,
        length=options.length,
        width=getattr(text, "hidden_size", 0),
        written=own_windows(options, calibrated) if language else 0,
        surveyed=min(options.samples, SURVEY_SAMPLES) if any(plan.surveyed.values()) else 0,
        vocabulary=getattr(text, "vocab_size", 0) if language else 0,
        test_tokens=options.test_tokens if options.evaluate else 0,
        generates=options.evaluate and language and samples_fit(checkpoint),
    )


def is_run_whole(checkpoint: Checkpoint, given: Given, options: Options) -> bool:
    """Whether a run on the data shows that the model's list of blocks is no chain, so that all of it will be in
    memory.
    """
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


def fingerprint(checkpoint: Checkpoint, plan: Plan, options: Options, given: Given, calibrated: bool) -> dict[str, Any]:
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
        **({"statistics": options.statistics} if options.statistics != "compressed" else {}),
        "laconic": versions()["laconic"],
    }


def samples_fit(checkpoint: Checkpoint) -> bool:
    """Whether the model writes text, and takes no more than a quarter of the free memory as a whole in float32."""
    size = sum(p.numel() for p in checkpoint.skeleton.parameters()) * 4
    return hasattr(checkpoint.skeleton, "generate") and size * 4 <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
