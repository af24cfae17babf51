"""How much each answer of a part counts: squared gradients of the original's loss, block by block from the last to the
first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laconic.engine.losses import default_probe
from laconic.engine.shelf import Shelf
from laconic.engine.walk import forward
from laconic.model.batches import Batch
from laconic.model.blocks import BlockModel, Calls
from laconic.model.gradients import gradient_of, leaf_of


def weighed(gradients: list[Tensor] | None) -> list[Tensor] | None:
    """Squared gradients over their mean."""
    if gradients is None:
        return None
    squares = [gradient.float().square() for gradient in gradients]
    mean = sum(float(s.sum(dtype=torch.float64)) for s in squares) / sum(s.numel() for s in squares)
    return [square / mean for square in squares] if mean > 0 else None


def gradients_behind(
    model: BlockModel, calls: list[Calls], batches: Sequence[Batch], seed: int, shelf: Shelf
) -> Callable[[int], list[Tensor]]:
    """The gradients of the original's loss in the answer of each block, as a function of its number; they lie on the
    shelf until asked for.

    The loss is the survey's (labels drawn from the model's own distribution), so the squares are Fisher information.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = [c.hidden for c in calls]
    for i in range(len(model)):
        shelf.put(f"before-{i}", hidden)
        with model.residency.hold(model.block_path(i)):
            hidden = forward(model, i, hidden, calls)
    gradients = []
    with model.residency.hold(""), torch.enable_grad():
        for state, batch in zip(hidden, batches, strict=True):
            leaf = leaf_of(state, model.device)
            default_probe(model.tail(leaf, batch), batch, generator).backward()
            gradients.append(gradient_of(leaf))
    for i in reversed(range(len(model))):
        shelf.put(f"gradient-{i}", gradients)
        inputs = shelf.get(f"before-{i}")
        shelf.drop(f"before-{i}")
        if not i:
            break
        with model.residency.hold(model.block_path(i)), torch.enable_grad():
            leaves = [leaf_of(state, model.device) for state in inputs]
            for k, leaf in enumerate(leaves):
                model.run(i, leaf, calls[k]).backward(gradients[k].to(model.device))
            gradients = [gradient_of(leaf) for leaf in leaves]

    def behind(i: int) -> list[Tensor]:
        found = shelf.get(f"gradient-{i}")
        shelf.drop(f"gradient-{i}")
        return found

    return behind
