"""What a run will do and cost, before it starts: method and size of every site, peak memory, time."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.errors import OutputError
from laconic.evaluate import COMPARED, LOGITS
from laconic.load import Checkpoint
from laconic.lock import LOCK
from laconic.methods.base import Keep, Method
from laconic.methods.fitting import fitted
from laconic.progress import resident_memory
from laconic.run import below
from laconic.sites import Slot, Stats
from laconic.units import human_bytes

_FLOAT = 4  # bytes of the computing precision
_LIBRARIES = 120_000_000  # bytes: what is imported later (plots, kernels), and the allocator's slack


@dataclass(frozen=True)
class Load:
    """What is run through the model: calibration windows, their length, how often the chain is run over them; tokens evaluated at the end.

    `width` is the hidden size, `vocabulary` the logits per token (0 for a model without), `generates` whether samples of text are made.
    """

    samples: int = 0
    length: int = 0
    passes: int = 0
    width: int = 0
    vocabulary: int = 0
    test_tokens: int = 0
    generates: bool = False


def preflight(source: Checkpoint, chosen: dict[Slot, Method], load: Load, chain: str | None) -> dict[str, Any]:
    """The plan as numbers: sites with method and expected bits, expected bytes of the weights, peak memory in bytes, seconds (a guess)."""
    chosen = {slot: fitted(method, slot.shape) for slot, method in chosen.items()}
    sites: list[dict[str, Any]] = []
    for slot, method in chosen.items():
        original = 8 * source.nbytes(slot.parameter) or 16 * slot.entries
        kept = isinstance(method, Keep)
        bits = original if kept else method.expected_bits(slot.shape)
        sites.append(
            {"name": slot.name, "aliases": list(slot.names[1:]), "shape": list(slot.shape), "method": repr(method), "role": slot.role,
             "bits_per_weight": bits / slot.entries, "bytes": bits / 8, "original_bytes": original / 8, "kept": kept,
             "reason": method.reason if isinstance(method, Keep) else ""}
        )  # fmt: skip
    total = sum(stored.bytes for stored in source.files.tensors.values())
    rest = total - sum(site["original_bytes"] for site in sites)
    return {
        "sites": sites,
        "bytes": round(sum(site["bytes"] for site in sites) + rest),
        "original_bytes": total,
        "peak_memory": resident_memory() + _work(source, chosen, load, chain),
        "seconds": _seconds(chosen, load),
    }


def room_for(out: Path, expected: int) -> list[str]:
    """What to say of the free space for a model of so many bytes. Raises: OutputError when the model alone takes more than there is."""
    there = sum(file.stat().st_size for file in below(out, skip=(LOCK,)) if file.is_file())
    free = shutil.disk_usage(out).free + there
    if free < expected:
        raise OutputError(f"{out}: {human_bytes(free)} are free on that disk, the model takes {human_bytes(expected)}; choose another place")
    if free < 2 * expected:
        need, have = human_bytes(2 * expected), human_bytes(free)
        return [f"{out}: finished parts and the model made of them take {need} for a while; {have} are free on that disk"]
    return []


def _work(source: Checkpoint, chosen: dict[Slot, Method], load: Load, chain: str | None) -> int:
    """Bytes beyond what the process takes already, of the stage that takes most: compression, evaluation, or writing samples of text."""
    return _LIBRARIES + max(_compression(source, chosen, load, chain), _evaluation(source, load, chain), _generation(source, load))


def _compression(source: Checkpoint, chosen: dict[Slot, Method], load: Load, chain: str | None) -> int:
    """The hidden states, and the largest part with its statistics and its solver's workspace."""
    parts: dict[str, list[Slot]] = {}
    for slot in chosen:
        parts.setdefault(_block_of(slot.users[0][0], chain) or slot.name, []).append(slot)
    largest = 0
    for slots in parts.values():
        wanted = {slot: chosen[slot].wants if not isinstance(chosen[slot], Keep) else Stats(0) for slot in slots}
        calibrated = any(wanted.values())
        weights = sum((_FLOAT if calibrated else source.nbytes(slot.parameter) / slot.entries) * slot.entries for slot in slots)
        columns = {slot.columns: slot.groups for slot in slots if wanted[slot] & Stats.HESSIAN}  # slots fed alike share their Hessian
        hessians = sum(_FLOAT * n * n * groups for n, groups in columns.items())
        solver = max((_workspace(slot, chosen[slot], wanted[slot]) for slot in slots), default=0)
        packed = sum(chosen[slot].expected_bits(slot.shape) / 8 for slot in slots if not isinstance(chosen[slot], Keep))
        largest = max(largest, round(weights + hessians + solver + packed))
    if not load.samples:
        return largest
    hidden = 2 * _FLOAT * load.samples * load.length * load.width
    return largest + hidden + 12 * _FLOAT * 4096 * load.width


def _block_of(name: str, chain: str | None) -> str:
    """The path of the block that a module or parameter lies in; empty outside the chain."""
    if chain is None or not name.startswith(chain + "."):
        return ""
    return ".".join(name.split(".")[: len(chain.split(".")) + 1])


def _evaluation(source: Checkpoint, load: Load, chain: str | None) -> int:
    """Both models: what lies outside the chain in float32, a block and its decoding, hidden states, and one batch of logits each."""
    if not load.test_tokens:
        return 0
    blocks: dict[str, int] = {}
    for name, parameter in source.skeleton.named_parameters():
        part = _block_of(name, chain)
        blocks[part] = blocks.get(part, 0) + parameter.numel()
    outside = blocks.pop("", 0)
    tokens = max(load.length, min(4096, LOGITS // max(load.vocabulary, 1)))
    logits = 3 * tokens * load.vocabulary + 6 * COMPARED  # some models widen theirs, which takes a copy
    states = 2 * load.test_tokens * load.width + 12 * tokens * load.width
    return _FLOAT * (2 * outside + 2 * max(blocks.values(), default=0) + logits + states)


def _generation(source: Checkpoint, load: Load) -> int:
    """The model as a whole, once in float32, with its largest tensor a second time while that is decoded."""
    sizes = [parameter.numel() for parameter in source.skeleton.parameters()]
    return _FLOAT * (sum(sizes) + max(sizes)) if load.generates else 0


def _workspace(slot: Slot, method: Method, wanted: Stats) -> int:
    """Bytes a method takes for one site beside its weight: codes, and for column solvers the factor and three copies of the weight."""
    if isinstance(method, Keep):
        return 0
    if wanted & Stats.HESSIAN:
        return _FLOAT * (slot.groups * slot.columns**2 + 4 * slot.entries)
    return 2 * slot.entries + (128 << 20)


def _seconds(chosen: dict[Slot, Method], load: Load) -> float:
    """A guess from a matrix product timed now: forward passes over the calibration windows, and one sweep per site that needs a Hessian."""
    flops = 0.0
    for slot, method in chosen.items():
        if isinstance(method, Keep):
            continue
        wanted = method.wants
        if wanted:
            flops += 2.0 * slot.entries * load.samples * load.length * load.passes
        if wanted & Stats.HESSIAN:
            tokens = load.samples * load.length
            flops += slot.groups * (2.0 * tokens * slot.columns**2 + slot.columns**3) + 6.0 * slot.entries * slot.columns
        else:
            flops += 400.0 * slot.entries
    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    a @ a
    speed = 2 * 1024**3 / max(time.perf_counter() - started, 1e-6)
    return 1.5 * flops / speed  # measured runs take about half as long again as their products alone
