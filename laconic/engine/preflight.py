"""What a run will do and cost, before it starts: method and size of every site, peak memory, time."""

import shutil
from pathlib import Path

from laconic.disk.load import Checkpoint
from laconic.disk.lock import LOCK
from laconic.disk.output import below
from laconic.engine.estimate import Load, costs, measure_speeds
from laconic.engine.plan import Plan
from laconic.errors import OutputError
from laconic.host.progress import resident_memory
from laconic.host.told import PlannedSite, Preflight
from laconic.host.units import human_bytes

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
                name=slot.name, aliases=list(slot.names[1:]), shape=list(slot.shape), method=text, role=slot.role,
                bits_per_weight=bits / slot.entries, bytes=bits / 8, original_bytes=original / 8, kept=kept, reason=plan.kept.get(slot, ""),
            )
        )  # fmt: skip
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
    """What to say of the free space for a model of so many bytes. Raises: OutputError when the model alone takes more than there is."""
    there = sum(file.stat().st_size for file in below(out, skip=(LOCK,)) if file.is_file())
    free = shutil.disk_usage(out).free + there
    if free < expected:
        raise OutputError(
            f"{out}: {human_bytes(free)} are free on that disk, the model takes {human_bytes(expected)}; choose another place"
        )
    if free < 2 * expected:
        need, have = human_bytes(2 * expected), human_bytes(free)
        return [
            f"{out}: finished parts and the model made of them take {need} for a while; {have} are free on that disk"
        ]
    return []
