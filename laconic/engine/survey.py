"""The survey: backwards over the unchanged model, with gradients, a block in memory at a time; nothing is
compressed.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from laconic.engine.losses import Probe, default_probe, probed
from laconic.engine.shelf import Shelf
from laconic.engine.statistics import Statistics
from laconic.engine.walk import Needs, Stage, forward, inside, parameters_of
from laconic.model.batches import Batch, mapped, tensors_in, to_device
from laconic.model.blocks import BlockModel
from laconic.model.calling import call
from laconic.model.gradients import asking_gradients, gradient_of, leaf_of
from laconic.model.sites import GRADIENTS, NONE, Slot


def survey(
    model: BlockModel,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    *,
    seed: int,
    shelf: Shelf,
    probe: Probe = default_probe,
) -> Iterator[Stage]:
    """Stages from the last block to the first, of the unchanged model, with every statistic that was asked for,
    gradients included.

    One forward pass that keeps each block's input on the shelf, then one backward pass a block at a time (which runs
    its forward again). Batches should hold one sequence each: Fisher squares are taken per batch.
    """
    generator = torch.Generator().manual_seed(seed)
    calls = model.capture(batches)
    hidden = [c.hidden for c in calls]
    for i in range(len(model)):
        shelf.put(f"survey-{i}", hidden)
        with model.residency.hold(model.block_path(i)):
            hidden = forward(model, i, hidden, calls)
    outside = [slot for slot in slots if not inside(slot, model.path)]
    tokens = sum(h.shape[:-1].numel() for h in hidden)
    gradients = []
    with model.residency.hold(""):
        around = _counting(model, outside, needs, tokens, len(batches))
        with around.watch(), asking_gradients(_tables(model.model)):
            for k, (h, batch) in enumerate(zip(hidden, batches, strict=True)):
                leaf = leaf_of(h, model.device)
                probed(probe, model.tail(leaf, _with_gradient(batch)), batch, generator, k).backward()
                gradients.append(gradient_of(leaf))
    for i in reversed(range(len(model))):
        part = model.block_path(i)
        inputs = shelf.get(f"survey-{i}")
        shelf.drop(f"survey-{i}")
        with model.residency.hold(part):
            within = [slot for slot in slots if inside(slot, part)]
            statistics = _counting(model, within, needs, tokens, len(batches))
            with statistics.watch():
                for k, (h, c) in enumerate(zip(inputs, calls, strict=True)):
                    leaf = leaf_of(h, model.device)
                    model.run(i, leaf, c).backward(gradients[k].to(model.device))
                    gradients[k] = gradient_of(leaf)
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
    with statistics.watch(), asking_gradients(_tables(model.model)):
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


def survey_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    needs: Needs,
    device: torch.device,
    *,
    seed: int,
    probe: Probe = default_probe,
) -> Stage:
    """`survey` for a model that is no chain of blocks: one forward and backward pass over the whole of it."""
    generator = torch.Generator().manual_seed(seed)
    statistics = Statistics(parameters_of(model, slots), dict(needs))
    with statistics.watch(), asking_gradients(_tables(model)):
        for k, batch in enumerate(batches):
            inputs = _with_gradient(to_device(batch, device))
            output = call(model, inputs)
            probed(probe, output, batch, generator, k).backward()
            main = getattr(output, "logits", None)
            main = main if isinstance(main, Tensor) else next(y for y in tensors_in(output) if y.requires_grad)
            statistics.tokens += main.shape[:-1].numel()
            statistics.sequences += main.shape[0] if main.dim() else 1
    return Stage("model", list(slots), statistics)


def _tables(model: nn.Module) -> list[nn.Parameter]:
    """The embeddings: where they ask for a gradient a graph exists, although the inputs are integers."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return [table for table in tables if isinstance(table, nn.Parameter)]


def _with_gradient(batch: Batch) -> Batch:
    """Float inputs require a gradient, so that a graph exists although no parameter is trained; everything else is as
    it was.
    """
    return mapped(batch, lambda tensor: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor)
