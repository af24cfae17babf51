"""The two loops over a model: `walk` forwards, each part seeing the compressed prefix; `survey` backwards, with gradients, nothing changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.disk.files import disk_errors, seal, write_tensors
from laconic.disk.tensors import is_finite
from laconic.engine.statistics import Statistics
from laconic.errors import DataError
from laconic.model.batches import Batch, mapped, tensors_in, to_device
from laconic.model.blocks import BlockModel, Calls
from laconic.model.calling import call
from laconic.model.sites import GRADIENTS, INPUTS, NONE, Slot, Stats

Needs = dict[Slot, Stats]
MANY = 1 << 24  # logits of a batch, above which the survey's loss is taken in parts
PART = 1 << 22  # logits in a part


@dataclass
class Stage:
    """Some sites whose statistics are ready; compress them in place before asking for the next stage.

    `part` names what is in memory. `complete` says that nothing more will be asked of the part: it can be written, for whatever comes
    next can be computed without it. A block's last stage has no slots, only this message.
    """

    part: str
    slots: list[Slot]
    statistics: Statistics | None
    complete: bool = True


class Shelf:
    """Hidden states by key, in memory or, with a folder, one file per key (written whole or not at all)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[str, list[Tensor]] = {}

    def put(self, key: str, tensors: list[Tensor]) -> None:
        if self.folder is None:
            self._kept[key] = tensors
            return
        temporary = self.folder / f"{key}.tmp"
        with disk_errors(self.folder):  # what a kill destroys is made again, so nothing waits for the disk here
            named = {str(i): t for i, t in enumerate(tensors)}
            write_tensors(temporary, named, seal(named))
            temporary.replace(self.folder / f"{key}.safetensors")

    def get(self, key: str) -> list[Tensor]:
        if self.folder is None:
            return self._kept[key]
        stored = load_file(self.folder / f"{key}.safetensors")
        return [stored[str(i)] for i in range(len(stored))]

    def __contains__(self, key: str) -> bool:
        return key in self._kept if self.folder is None else (self.folder / f"{key}.safetensors").is_file()

    def drop(self, key: str) -> None:
        self._kept.pop(key, None)
        if self.folder is not None:
            (self.folder / f"{key}.safetensors").unlink(missing_ok=True)


def parameters_of(model: nn.Module, slots: Sequence[Slot]) -> dict[Slot, nn.Parameter]:
    """The parameters now in the slots' places."""
    return {slot: getattr(model.get_submodule(slot.users[0][0]), slot.users[0][1]) for slot in slots}


def inside(slot: Slot, part: str) -> bool:
    """Whether a slot's first user lies below the module path `part`."""
    return slot.users[0][0] == part or slot.users[0][0].startswith(part + ".")


def walk(
    model: BlockModel,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    *,
    true_sequential: bool = False,
    shelf: Shelf | None = None,
    done: Sequence[str] = (),
) -> Iterator[Stage]:
    """Stages in the order of the model's computation: what lies before the chain, block after block, what lies after.

    Every stage's statistics come from inputs that passed through everything compressed before it. `true_sequential` makes a stage of each
    set of sites within a block that share an input. Parts named in `done` are compressed already: nothing is yielded for them, and their
    successors' inputs come from the shelf, or are computed again. Without any need of statistics the model is not run at all.
    """
    shelf = shelf or Shelf()
    outside = [slot for slot in slots if not inside(slot, model.path)]
    early = [slot for slot in outside if slot.role == "embedding" and (len(slot.users) == 1 or not needs[slot])]
    run = any(needs[slot] & INPUTS for slot in slots)
    yield from _alone(model, batches, [slot for slot in early if slot.name not in done], needs)
    before = (
        _before(model, batches, [slot for slot in outside if slot not in early and needs[slot] & INPUTS]) if run else []
    )
    yield from _around(model, before, needs, lambda batch, _: model.front(batch), batches, [], done)
    calls = model.capture(batches) if run else []
    reach = _reach(model, slots, needs, before)
    at, hidden = 0, [c.hidden for c in calls]
    for i in range(len(model)):
        part = model.block_path(i)
        within = [slot for slot in slots if inside(slot, part)]
        if part in done or not within:
            continue
        if run and i <= reach:
            at, hidden = i, _until(model, i, at, hidden, calls, shelf)
        with model.residency.hold(part):
            yield from _block(model, i, part, hidden, calls, within, needs, true_sequential)
            if i < reach:
                at, hidden = i + 1, _forward(model, i, hidden, calls)
                shelf.put(f"hidden-{i + 1}", hidden)
            yield Stage(part, [], None)
            for k in range(i + 1):
                shelf.drop(f"hidden-{k}")
    late = [slot for slot in outside if slot not in early and slot not in before]
    yield from _alone(
        model, batches, [slot for slot in late if not needs[slot] & INPUTS and slot.name not in done], needs
    )
    behind = [slot for slot in late if needs[slot] & INPUTS]
    if any(part not in done for part, _ in units(model.model, behind)):
        hidden = _until(model, len(model), at, hidden, calls, shelf)
    yield from _around(model, behind, needs, lambda batch, h: model.tail(h, batch), batches, hidden, done)


def _before(model: BlockModel, batches: Sequence[Batch], slots: list[Slot]) -> list[Slot]:
    """Those of the slots whose products lie before the chain: patch embeddings, a vision tower. What a tie uses behind it too is not."""
    single = [slot for slot in slots if len(slot.users) == 1]
    if not single or not batches:
        return []
    with model.residency.hold("", head=False):
        probe = Statistics(parameters_of(model.model, single), dict.fromkeys(single, NONE))
        with torch.no_grad(), probe.watch():
            model.front(batches[0])
    return [slot for slot in single if slot in probe.order]


def _around(
    model: BlockModel, slots: list[Slot], needs: Needs, run: Callable[[Batch, Tensor], Any], batches: Sequence[Batch], hidden: list[Tensor],
    done: Sequence[str],
) -> Iterator[Stage]:  # fmt: skip
    """Stages of sites outside the chain that need statistics: one run of what lies outside per unit, as in `walk_whole`."""
    todo = [(part, group) for part, group in units(model.model, slots) if part not in done]
    if not todo:
        return
    with model.residency.hold(""):
        for part, group in todo:
            statistics = Statistics(parameters_of(model.model, group), needs)
            with torch.no_grad(), statistics.watch():
                for k, batch in enumerate(batches):
                    run(batch, hidden[k] if hidden else torch.empty(0))
            yield Stage(part, group, statistics)


def _reach(model: BlockModel, slots: Sequence[Slot], needs: Needs, before: Sequence[Slot]) -> int:
    """The last block (or, for what comes after the chain, their number) whose sites need statistics: nothing has to run beyond its input."""
    wanting = [slot for slot in slots if needs[slot] & INPUTS and slot not in before]
    last = [i for i in range(len(model)) if any(inside(slot, model.block_path(i)) for slot in wanting)]
    after = any(
        not inside(slot, model.path) and not (slot.role == "embedding" and len(slot.users) == 1) for slot in wanting
    )
    return len(model) if after else max(last, default=0)


def _alone(model: BlockModel, batches: Sequence[Batch], slots: list[Slot], needs: Needs) -> Iterator[Stage]:
    """Sites outside the chain whose inputs need not be summed, each alone in memory: embeddings and heads are the largest tensors there are.

    Where look-ups are to be counted, what lies before the chain is run for them.
    """
    for slot in slots:
        counted = bool(needs[slot] & Stats.USES)
        with model.residency.hold("", head=False) if counted else model.residency.hold(slot.users[0][0]):
            statistics = Statistics(parameters_of(model.model, [slot]), needs)
            if counted:
                with statistics.watch():
                    model.look_up(batches)
            yield Stage(slot.name, [slot], statistics)


def _until(model: BlockModel, i: int, at: int, hidden: list[Tensor], calls: list[Calls], shelf: Shelf) -> list[Tensor]:
    """The hidden states before block `i`: those before block `at`, or later ones on the shelf, run through the blocks between as they are now.

    A finished block is the compressed one, so an input that was lost is computed again to the same values.
    """
    for k in range(i, at, -1):
        if f"hidden-{k}" in shelf:
            at, hidden = k, shelf.get(f"hidden-{k}")
            break
    for k in range(at, i):
        with model.residency.hold(model.block_path(k)):
            hidden = _forward(model, k, hidden, calls)
    return hidden


@torch.no_grad()
def _forward(model: BlockModel, i: int, hidden: list[Tensor], calls: list[Calls]) -> list[Tensor]:
    return [model.run(i, h, c).cpu() for h, c in zip(hidden, calls, strict=True)]


def _block(
    model: BlockModel,
    i: int,
    part: str,
    hidden: list[Tensor],
    calls: list[Calls],
    slots: list[Slot],
    needs: Needs,
    true_sequential: bool,
) -> Iterator[Stage]:
    if not slots:
        return
    groups = [slots]
    if true_sequential and any(needs[slot] & INPUTS for slot in slots):
        groups = _by_input(model, i, hidden[:1], calls[:1], slots)
    for group in groups:
        statistics = Statistics(parameters_of(model.model, group), needs)
        if any(needs[slot] & INPUTS for slot in group):
            with statistics.watch():
                _forward(model, i, hidden, calls)
        yield Stage(part, group, statistics, complete=False)


def _by_input(
    model: BlockModel, i: int, hidden: list[Tensor], calls: list[Calls], slots: list[Slot]
) -> list[list[Slot]]:
    """The slots in the order they are first used, those fed by one tensor together; slots never used come last."""
    probe = Statistics(parameters_of(model.model, slots), dict.fromkeys(slots, Stats.SQUARES))
    with probe.watch():
        _forward(model, i, hidden, calls)
    groups: list[list[Slot]] = []
    for slot in probe.order:
        if groups and probe.grams.get(groups[-1][0]) is probe.grams.get(slot):
            groups[-1].append(slot)
        else:
            groups.append([slot])
    unused = [slot for slot in slots if slot not in probe.order]
    return groups + ([unused] if unused else [])


Loss = Callable[[Any, torch.Generator], Tensor]
"""A scalar whose gradient probes how the output depends on the weights, from the model's output and a private generator."""


def sampled_labels(output: Any, generator: torch.Generator) -> Tensor:
    """Cross-entropy against labels drawn from the model's own distribution: squared gradients average to the Fisher information.

    Logits are [..., classes], or [batch, classes, height, width] of a dense prediction.
    That is the Hessian of KL(original || compressed) at the original weights. Source: Amari 1998; Kunstner et al. 2019, section 2.
    """
    logits = getattr(output, "logits", output)
    if logits.dim() > 3:  # dense prediction: classes come second, then places
        logits = logits.movedim(1, -1)
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if flat.numel() > MANY:
        return _InParts.apply(flat, generator)
    with torch.no_grad():
        probabilities = flat.softmax(-1).cpu()
        if not is_finite(probabilities):
            raise DataError("the model's output holds NaN or infinity")
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(flat.device)
    return F.cross_entropy(flat, labels, reduction="sum")


class _InParts(torch.autograd.Function):
    """`sampled_labels` of many logits [tokens, classes], a few tokens at a time: beside them there is only their gradient, softmax - label."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, generator: torch.Generator) -> Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows, place in zip(*(t.split(max(1, PART // logits.shape[1])) for t in (logits, gradient)), strict=True):
            torch.softmax(rows, -1, out=place)
            if not is_finite(place):
                raise DataError("the model's output holds NaN or infinity")
            labels = torch.multinomial(place.cpu(), 1, generator=generator).to(logits.device)
            total -= place.gather(-1, labels).log().sum(dtype=torch.float64)
            place.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=place.dtype))
        ctx.gradient = gradient
        return total.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(outer[0]), None


def random_projection(output: Any, generator: torch.Generator) -> Tensor:
    """<output, v> with v of independent standard normals: squared gradients average to the Gauss-Newton matrix of half the squared error.

    Of an output of several tensors (hidden states and a pooled one), all that depend on the weights are probed.
    Raises: DataError where no tensor does.
    """
    seen = [y for y in tensors_in(output) if y.requires_grad]
    if not seen:
        raise DataError(
            f"the model's output ({type(output).__name__}) holds no tensor that depends on its weights, so no gradient can be taken; "
            "pass loss=, a function of the output and a torch.Generator"
        )
    return torch.stack([(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in seen]).sum()


def default_loss(output: Any, generator: torch.Generator) -> Tensor:
    """`sampled_labels` of an output that holds classes ([batch, classes], or `.logits`), else a random projection (of hidden states, say)."""
    logits = getattr(output, "logits", output)
    if (
        isinstance(logits, Tensor)
        and logits.shape[-1:].numel() > 1
        and logits.requires_grad
        and (logits.dim() == 2 or hasattr(output, "logits"))
    ):
        return sampled_labels(output, generator)
    return random_projection(output, generator)


def _probe(loss: Loss, output: Any, generator: torch.Generator, batch: int) -> Tensor:
    """The loss of one batch's output. Raises: DataError with the batch's number when it is not finite."""
    try:
        scalar = loss(output, generator)
    except DataError as error:
        raise DataError(f"calibration batch {batch}: {error}") from error
    if not bool(scalar.isfinite()):
        raise DataError(f"calibration batch {batch}: the loss of the model's output is {float(scalar)}")
    return scalar


def survey(
    model: BlockModel,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    *,
    seed: int,
    shelf: Shelf,
    loss: Loss = sampled_labels,
) -> Iterator[Stage]:
    """Stages from the last block to the first, of the unchanged model, with every statistic that was asked for, gradients included.

    One forward pass that keeps each block's input on the shelf, then one backward pass a block at a time (which runs its forward again).
    Batches should hold one sequence each: Fisher squares are taken per batch.
    """
    generator = torch.Generator().manual_seed(seed)
    calls = model.capture(batches)
    hidden = [c.hidden for c in calls]
    for i in range(len(model)):
        shelf.put(f"survey-{i}", hidden)
        with model.residency.hold(model.block_path(i)):
            hidden = _forward(model, i, hidden, calls)
    outside = [slot for slot in slots if not inside(slot, model.path)]
    tokens = sum(h.shape[:-1].numel() for h in hidden)
    gradients = []
    with model.residency.hold(""):
        around = _counting(model, outside, needs, tokens, len(batches))
        with around.watch(), _embeddings_with_gradient(model.model):
            for k, (h, batch) in enumerate(zip(hidden, batches, strict=True)):
                leaf = h.to(model.device).requires_grad_()
                _probe(loss, model.tail(leaf, _with_gradient(batch)), generator, k).backward()
                gradients.append(_gradient(leaf).cpu())
    for i in reversed(range(len(model))):
        part = model.block_path(i)
        inputs = shelf.get(f"survey-{i}")
        shelf.drop(f"survey-{i}")
        with model.residency.hold(part):
            within = [slot for slot in slots if inside(slot, part)]
            statistics = _counting(model, within, needs, tokens, len(batches))
            with statistics.watch():
                for k, (h, c) in enumerate(zip(inputs, calls, strict=True)):
                    leaf = h.to(model.device).requires_grad_()
                    model.run(i, leaf, c).backward(gradients[k].to(model.device))
                    gradients[k] = _gradient(leaf).cpu()
            yield Stage(part, within, statistics)
    if outside:
        with model.residency.hold(""):
            _gradients_before(model, batches, gradients, around)
            yield Stage("outside", outside, around)


def _gradients_before(model: BlockModel, batches: Sequence[Batch], gradients: list[Tensor], around: Statistics) -> None:
    """Add to the statistics outside the chain the gradients that reach its front through the first block's input."""
    wanted = {slot: need & GRADIENTS for slot, need in around.needs.items()}
    if not any(wanted.values()):
        return
    statistics = Statistics(around.watched, wanted)
    with statistics.watch(), _embeddings_with_gradient(model.model):
        for batch, gradient in zip(batches, gradients, strict=True):
            hidden = model.front(_with_gradient(batch))
            if hidden.requires_grad:
                hidden.backward(gradient.to(hidden))
    for found, total in ((statistics.fisher, around.fisher), (statistics.output, around.output)):
        for slot, value in found.items():
            total[slot] = total[slot] + value if slot in total else value


def _counting(model: BlockModel, slots: list[Slot], needs: Needs, tokens: int, sequences: int) -> Statistics:
    statistics = Statistics(parameters_of(model.model, slots), {slot: needs.get(slot, NONE) for slot in slots})
    statistics.tokens, statistics.sequences = tokens, sequences
    return statistics


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def walk_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    device: torch.device,
    *,
    done: Sequence[str] = (),
) -> Iterator[Stage]:
    """`walk` for a model that is no chain of blocks: the whole model runs once per unit, a unit being an element of its containers."""
    for part, group in units(model, slots):
        if part in done:
            continue
        statistics = Statistics(parameters_of(model, group), needs)
        if any(needs[slot] & INPUTS for slot in group):
            with torch.no_grad(), statistics.watch():
                for batch in batches:
                    call(model, to_device(batch, device))
        yield Stage(part, group, statistics)


def survey_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    device: torch.device,
    *,
    seed: int,
    loss: Loss,
) -> Stage:
    """`survey` for a model that is no chain of blocks: one forward and backward pass over the whole of it."""
    generator = torch.Generator().manual_seed(seed)
    statistics = Statistics(parameters_of(model, slots), dict(needs))
    with statistics.watch(), _embeddings_with_gradient(model):
        for k, batch in enumerate(batches):
            inputs = _with_gradient(to_device(batch, device))
            output = call(model, inputs)
            _probe(loss, output, generator, k).backward()
            main = getattr(output, "logits", None)
            main = main if isinstance(main, Tensor) else next(y for y in tensors_in(output) if y.requires_grad)
            statistics.tokens += main.shape[:-1].numel()
            statistics.sequences += main.shape[0] if main.dim() else 1
    return Stage("model", list(slots), statistics)


@contextmanager
def _embeddings_with_gradient(model: nn.Module) -> Iterator[None]:
    """Embeddings require a gradient inside this context, so that a graph exists although the inputs are integers; it is not kept."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    frozen = [w for w in tables if isinstance(w, nn.Parameter) and not w.requires_grad]
    for w in frozen:
        w.requires_grad_()
    try:
        yield
    finally:
        for w in frozen:
            w.requires_grad_(False)
            w.grad = None


def _with_gradient(batch: Batch) -> Batch:
    """Float inputs require a gradient, so that a graph exists although no parameter is trained; everything else is as it was."""
    return mapped(batch, lambda tensor: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor)


def units(model: nn.Module, slots: Sequence[Slot]) -> list[tuple[str, list[Slot]]]:
    """Slots in module order, grouped by the innermost element of a Sequential or ModuleList that holds them."""
    containers = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        path = slot.users[0][0]
        inner = max((c for c in containers if path.startswith(c + ".") or c == ""), key=len, default=None)
        if inner is None:
            part = path
        else:
            part = ".".join(path.split(".")[: (len(inner.split(".")) if inner else 0) + 1])
        found.setdefault(part, []).append(slot)
    return list(found.items())
