"""How much each answer of a part counts: squared gradients of the original's loss, block by block from the last to the
first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laconic.engine.losses import default_probe
from laconic.engine.shelf import Shelf
from laconic.model.batches import Batch
from laconic.model.blocks import BlockModel, Calls


@torch.no_grad()
def answers_of(model: BlockModel, i: int, states: list[Tensor], calls: list[Calls]) -> list[Tensor]:
    """Block i's answers to hidden states [examples, ..., width], a minibatch each, on the CPU."""
    return [model.run(i, state, c).cpu() for state, c in zip(states, calls, strict=True)]


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
            hidden = answers_of(model, i, hidden, calls)
    gradients = []
    with model.residency.hold(""), torch.enable_grad():
        for state, batch in zip(hidden, batches, strict=True):
            leaf = _leaf(state, model.device)
            default_probe(model.tail(leaf, batch), batch, generator).backward()
            gradients.append(_gradient(leaf))
    for i in reversed(range(len(model))):
        shelf.put(f"gradient-{i}", gradients)
        inputs = shelf.get(f"before-{i}")
        shelf.drop(f"before-{i}")
        if not i:
            break
        with model.residency.hold(model.block_path(i)), torch.enable_grad():
            leaves = [_leaf(state, model.device) for state in inputs]
            for k, leaf in enumerate(leaves):
                model.run(i, leaf, calls[k]).backward(gradients[k].to(model.device))
            gradients = [_gradient(leaf) for leaf in leaves]

    def behind(i: int) -> list[Tensor]:
        found = shelf.get(f"gradient-{i}")
        shelf.drop(f"gradient-{i}")
        return found

    return behind


def _leaf(state: Tensor, device: torch.device) -> Tensor:
    return state.detach().to(device).requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad.cpu()


@contextmanager
def asking_gradients(module: nn.Module) -> Iterator[None]:
    """The module's float parameters ask for a gradient inside this context, so that its answer has one."""
    asked = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(False)
            parameter.grad = None
