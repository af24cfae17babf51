"""Gradients that are asked for a moment, of a model that is not being trained."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def asking_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The float parameters among these ask for a gradient inside this context; flags and gradients are afterwards as
    they were.
    """
    asked = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    kept = [p.grad for p in asked]
    for parameter in asked:
        parameter.grad = None
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, gradient in zip(asked, kept, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = gradient


def leaf_of(state: Tensor, device: torch.device) -> Tensor:
    """The values of a hidden state [batch, ..., width] as the beginning of a graph, on a device."""
    return state.detach().to(device).requires_grad_()


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient that reached a leaf, of its shape, on the CPU."""
    assert leaf.grad is not None
    return leaf.grad.cpu()
