"""Two networks side by side: a private copy to experiment on, its inputs, and how far two outputs are apart."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.model.batches import Batch
from laconic.model.calling import call
from laconic.weights.install import baked

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    ZeroDivisionError,
)
"""What a forward pass raises when shapes no longer fit, and what tracing raises on operations it does not know."""

SAMPLES = 4


def laboratory(model: nn.Module) -> nn.Module:
    """A copy of a model to compute with: dense, float32, on the CPU, in evaluation mode."""
    return baked(model).eval().float().cpu()


@torch.no_grad()
def stir(model: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter and every statistic of norms by a tenth of its size, so that nothing is hidden by a zero or
    a symmetry.
    """
    for parameter in model.parameters():
        size = parameter.square().mean().sqrt() if parameter.numel() else parameter.sum()
        parameter.add_(
            torch.randn(parameter.shape, generator=generator) * (0.1 * size if size > 0 else torch.tensor(0.1))
        )
        parameter.requires_grad_(True)
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            shift = torch.randn(module.running_mean.shape, generator=generator)
            module.running_mean.add_(0.1 * module.running_var.sqrt() * shift)
            module.running_var.mul_(0.5 + torch.rand(module.running_var.shape, generator=generator))


def few(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """The first samples of a batch, on the CPU, floats as float32; with a generator floats are moved by a tenth of
    their deviation.
    """
    tensors = [t for t in flat(batch) if t.dim() > 0]
    count = len(tensors[0]) if tensors else 0
    share = all(len(t) == count for t in tensors)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            part = (value[:SAMPLES] if share and value.dim() > 0 else value).detach().cpu()
            if not part.is_floating_point():
                return part
            part = part.float()
            if generator is None:
                return part
            return part + 0.1 * part.std(correction=0).clamp_min(0.1) * torch.randn(part.shape, generator=generator)
        if isinstance(value, dict):
            return {key: take(item) for key, item in value.items()}
        return type(value)(take(item) for item in value) if isinstance(value, list | tuple) else value

    return take(batch)


def flat(output: Any) -> Iterator[Tensor]:
    """The tensors of an output in order; objects that are no container are passed over."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from flat(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from flat(value)


@torch.no_grad()
def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Every tensor of the model's output."""
    return [tensor.float() for tensor in flat(call(model, batch))]


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """max |a - b| / max |a| over corresponding tensors of any shape, the largest; infinity where shapes differ or a
    value is not finite.
    """
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        difference, size = float((x - y).abs().max()), float(x.abs().max())
        if not math.isfinite(difference) or (size == 0 and difference > 0):
            return float("inf")
        if size > 0:
            worst = max(worst, difference / size)
    return worst


def sift(items: Sequence[int], test: Callable[[Sequence[int]], str | None]) -> tuple[list[int], dict[int, str]]:
    """The items that pass `test` together, and why each of the others does not: all at once, then by halves.

    `test` returns None, or what went wrong. Cost: 1 test when all pass, about 2 log2(n) for each item that does not.
    """
    if not items:
        return [], {}
    trouble = test(items)
    if trouble is None:
        return list(items), {}
    if len(items) == 1:
        return [], {items[0]: trouble}
    middle = len(items) // 2
    left, wrong = sift(items[:middle], test)
    right, also = sift(items[middle:], test)
    good, wrong = left + right, {**wrong, **also}
    if left and right and test(good) is not None:
        good = list(left)
        for item in right:
            trouble = test([*good, item])
            if trouble is None:
                good.append(item)
            else:
                wrong[item] = trouble
    return good, wrong


def first_line(error: BaseException) -> str:
    """The first line of an error, not too long."""
    return (str(error).splitlines() or [""])[0][:200]
