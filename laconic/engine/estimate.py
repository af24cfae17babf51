"""What every stage of a run will take, in bytes of memory and in seconds, from the model's sizes and three speeds of
this machine.
"""

import time
from dataclasses import dataclass

import torch

from laconic.disk.originals import Checkpoint
from laconic.engine.losses import MANY, PART
from laconic.engine.plan import Plan
from laconic.engine.walk import units
from laconic.host.told import Cost
from laconic.model.calling import COMPARED, LOGITS
from laconic.model.sites import NONE, Slot, Stats

_FLOAT = 4  # bytes of the computing precision
_TOGETHER = 4096  # tokens per forward pass
_WRITTEN = 32  # windows that a model writes together
_SAMPLES = 84  # tokens of the report's samples of text, prompt included


@dataclass(frozen=True)
class Load:
    """What is run through the model. `samples` windows of `length` tokens calibrate; `surveyed` of them go through it
    backwards too, before.

    `written`: windows that the model writes itself; `test_tokens` are evaluated, `generates`: samples of text are made
    for the report. `width` is the hidden size, `vocabulary` the logits per token (0 for a model without).
    """

    samples: int = 0
    length: int = 0
    surveyed: int = 0
    written: int = 0
    width: int = 0
    vocabulary: int = 0
    test_tokens: int = 0
    generates: bool = False


@dataclass(frozen=True)
class Speeds:
    """This machine's, measured now: `flops` of a float32 product per second, `bytes` copied per second, `exponentials`
    per second.
    """

    flops: float
    bytes: float
    exponentials: float


def measure_speeds() -> Speeds:
    """Cost: about a tenth of a second."""
    a = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    big = torch.empty(1 << 22)
    flops = 2 * 768**3 / _fastest(lambda: a @ a)
    return Speeds(
        flops,
        2 * _FLOAT * big.numel() / _fastest(lambda: big.copy_(big + 1)) * 2,
        a.numel() / _fastest(lambda: torch.softmax(a, -1)),
    )


def _fastest(work: object) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-7)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model by where they lie: all, outside the chain, of the largest block, and of matrices that every
    token meets.

    `mapped`: bytes, as the files have them, of what is brought in at once (outside the chain and the largest block);
    `mapped_whole` those of all. While a tensor is made float32 its pages count as this process's.
    """

    total: int
    outside: int
    block: int
    largest: int
    body: int
    head: int
    mapped: int
    mapped_whole: int


def sizes_of(source: Checkpoint, chain: str | None, load: Load) -> Sizes:
    """Counted on the skeleton; experts are counted as if every token met them all, which is too much."""
    blocks: dict[str, int] = {}
    tables = {id(m.weight) for m in source.skeleton.modules() if isinstance(m, torch.nn.Embedding)}
    mapped: dict[str, int] = {}
    body = 0
    for name, parameter in source.skeleton.named_parameters():
        part = block_of(name, chain)
        mapped[part] = mapped.get(part, 0) + source.nbytes(name)
        blocks[part] = blocks.get(part, 0) + parameter.numel()
        body += parameter.numel() if parameter.dim() > 1 and id(parameter) not in tables else 0
    outside, mapped_whole = blocks.pop("", 0), sum(mapped.values())
    brought_in = mapped.pop("", 0) + max(mapped.values(), default=0)
    head = load.vocabulary * load.width
    largest = max((p.numel() for p in source.skeleton.parameters()), default=0)
    total = sum(p.numel() for p in source.skeleton.parameters())
    separate = any(
        p.shape == (load.vocabulary, load.width) and id(p) not in tables for p in source.skeleton.parameters()
    )
    return Sizes(
        total=total, outside=outside, block=max(blocks.values(), default=0), largest=largest,
        body=body - (head if separate else 0), head=head, mapped=brought_in, mapped_whole=mapped_whole,
    )  # fmt: skip


def block_of(name: str, chain: str | None) -> str:
    """The path of the block that a module or parameter lies in; empty outside the chain."""
    if chain is None or not name.startswith(chain + "."):
        return ""
    return ".".join(name.split(".")[: len(chain.split(".")) + 1])


def costs(source: Checkpoint, plan: Plan, load: Load, chain: str | None, speeds: Speeds) -> dict[str, Cost]:
    """The cost of every stage, in their order: own text, survey, compression, verification, evaluation, samples of
    text.
    """
    sizes = sizes_of(source, chain, load)
    return {
        "own text": _own_text(sizes, load, speeds),
        "survey": _survey(sizes, plan, load, speeds),
        "compression": _compression(source, sizes, plan, load, chain, speeds),
        "verification": _verification(plan, speeds),
        "evaluation": _evaluation(sizes, load, speeds),
        "samples": _samples(sizes, load, speeds),
    }


def _own_text(sizes: Sizes, load: Load, speeds: Speeds) -> Cost:
    """The model as it is stored (at most float32), keys and values of the windows written together, and a few rows of
    logits.
    """
    if not load.written:
        return Cost()
    rounds = -(-load.written // _WRITTEN)
    together = min(load.written, _WRITTEN)
    memory = sizes.mapped_whole + _FLOAT * (sizes.total + sizes.largest + 8 * together * load.vocabulary)
    memory += _FLOAT * 4 * together * load.length * load.width * max(1, sizes.total // max(12 * load.width**2, 1) // 4)
    products = 2.0 * together * (sizes.body + sizes.head)
    step = (
        max(products / (0.5 * speeds.flops), _FLOAT * (sizes.body + sizes.head) / speeds.bytes)
        + 4 * together * load.vocabulary / speeds.exponentials
    )
    return Cost(memory, rounds * load.length * (step + 2e-3))


def _survey(sizes: Sizes, plan: Plan, load: Load, speeds: Speeds) -> Cost:
    """Forwards, then backwards with each block's forward again: three products with the weights and one with the
    gradients; and the logits, of one window at a time: they, their gradient, and a part of them that labels are drawn
    from (all of it where they are few).
    """
    if not load.surveyed:
        return Cost()
    tokens = load.surveyed * load.length
    logits = load.length * load.vocabulary
    copies = 2 * logits + 5 * PART if logits > MANY else 5 * logits
    hidden = 3 * tokens * load.width
    memory = _FLOAT * (sizes.outside + copies + hidden + 12 * load.length * load.width)
    squares = sum(slot.columns**2 * slot.groups for slot in _distinct(plan))
    # a model that is run whole: all statistics at once, the graph of a window, and the gradients of its tables
    if not sizes.block:
        memory += _FLOAT * (
            squares + 2 * load.length * sum(slot.rows + slot.columns for slot in plan.slots) + 2 * sizes.largest
        )
    block = _FLOAT * (
        3 * sizes.block
        + hidden
        + 40 * load.length * load.width
        + max((slot.columns**2 * slot.groups for slot in plan.slots), default=0)
    )
    flops = 8.0 * tokens * sizes.body + 4.0 * tokens * sizes.head + 2.0 * tokens * squares
    return Cost(
        sizes.mapped + max(memory, block), flops / speeds.flops + 10.0 * tokens * load.vocabulary / speeds.exponentials
    )


def _distinct(plan: Plan) -> list[Slot]:
    """Slots that need a Hessian, of those fed alike in a block one (they have their columns in common)."""
    found: dict[tuple[str, int], Slot] = {}
    for slot, wanted in plan.needs.items():
        if wanted & Stats.HESSIAN:
            found.setdefault((slot.users[0][0].rpartition(".")[0], slot.columns), slot)
    return list(found.values())


def _compression(
    source: Checkpoint, sizes: Sizes, plan: Plan, load: Load, chain: str | None, speeds: Speeds
) -> Cost:  # fmt: skip
    """The hidden states, and the largest part with its statistics and its solver's workspace; two forward passes and a
    sweep per site.
    """
    parts: dict[str, list[Slot]] = dict(units(source.skeleton, list(plan.slots))) if chain is None else {}
    for slot in plan.slots if chain is not None else ():
        parts.setdefault(block_of(slot.users[0][0], chain) or slot.name, []).append(slot)
    needs = plan.needs
    largest = 0
    for slots in parts.values():
        wanted = {slot: needs.get(slot, NONE) for slot in slots}
        calibrated = any(wanted.values())
        weights = sum(
            (_FLOAT if calibrated else source.nbytes(slot.parameter) / slot.entries) * slot.entries for slot in slots
        )
        # slots fed alike share their Hessian
        columns = {slot.columns: slot.groups for slot in slots if wanted[slot] & Stats.HESSIAN}
        hessians = sum(_FLOAT * n * n * groups for n, groups in columns.items())
        solver = max((_workspace(slot, wanted[slot]) for slot in slots if slot in plan.methods), default=0)
        packed = sum(plan.methods[slot].expected_bits(slot.shape) / 8 for slot in slots if slot in plan.methods)
        largest = max(largest, round(weights + hessians + solver + packed))
    calibrated = any(needs.values())
    tokens = load.samples * load.length
    seconds = 4.0 * tokens * sizes.body / speeds.flops if calibrated else 0.0
    for slot in _distinct(plan):
        seconds += slot.groups * (2.0 * tokens * slot.columns**2 + slot.columns**3) / speeds.flops
    for slot, wants in needs.items():
        sweep = 6.0 * slot.entries * slot.columns / speeds.flops if wants & Stats.HESSIAN else 0.0
        seconds += sweep + 80.0 * slot.entries / speeds.exponentials
    if not load.samples:
        return Cost(largest, seconds)
    hidden = 2 * _FLOAT * tokens * load.width
    return Cost(sizes.mapped + largest + hidden + _FLOAT * (12 * _TOGETHER * load.width + sizes.outside), seconds)


def _workspace(slot: Slot, wanted: Stats) -> int:
    """Bytes a method takes for one site beside its weight: codes, and for column solvers the factor and three copies of
    the weight.
    """
    if wanted & Stats.HESSIAN:
        return _FLOAT * (slot.groups * slot.columns**2 + 4 * slot.entries)
    return 2 * slot.entries + (128 << 20)


def _verification(plan: Plan, speeds: Speeds) -> Cost:
    """Every weight decoded once, alone."""
    entries = [slot.entries for slot in plan.methods]
    return Cost(_FLOAT * 3 * max(entries, default=0), 16.0 * sum(entries) / speeds.exponentials)


def _evaluation(sizes: Sizes, load: Load, speeds: Speeds) -> Cost:
    """Both models: what lies outside the chain in float32, a block and its decoding, hidden states, and one batch of
    logits each.
    """
    if not load.test_tokens:
        return Cost()
    tokens = max(load.length, min(_TOGETHER, LOGITS // max(load.vocabulary, 1)))
    logits = 3 * tokens * load.vocabulary + 6 * COMPARED  # some models widen theirs, which takes a copy
    states = 2 * load.test_tokens * load.width + 12 * tokens * load.width
    memory = sizes.mapped + _FLOAT * (2 * sizes.outside + 2 * sizes.largest + 2 * sizes.block + logits + states)
    flops = 4.0 * load.test_tokens * (sizes.body + sizes.head)
    decoding = 8.0 * sizes.total / speeds.exponentials
    return Cost(
        memory, flops / speeds.flops + 10.0 * load.test_tokens * load.vocabulary / speeds.exponentials + decoding
    )


def _samples(sizes: Sizes, load: Load, speeds: Speeds) -> Cost:
    """The model as a whole, once in float32, with its largest tensor a second time while that is decoded; a token at a
    time, twice.
    """
    if not load.generates:
        return Cost()
    step = (
        max(2.0 * (sizes.body + sizes.head) / (0.2 * speeds.flops), _FLOAT * (sizes.body + sizes.head) / speeds.bytes)
        + 5e-3
    )
    return Cost(
        sizes.mapped_whole + _FLOAT * (sizes.total + 2 * sizes.largest),
        2 * _SAMPLES * step + 8.0 * sizes.total / speeds.exponentials,
    )
