"""The losses whose gradients tell how much the output minds an error of a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from laconic.disk.tensors import is_finite
from laconic.errors import DataError
from laconic.model.batches import Batch, tensors_in, to_device
from laconic.model.judging import OutputLoss, loss_of

MANY = 1 << 24  # logits of a batch, above which the survey's loss is taken in parts
PART = 1 << 22  # logits in a part

Probe = Callable[[Any, Batch, torch.Generator], Tensor]
"""A scalar whose gradient probes how the output depends on the weights, from the model's output, the batch and a
private generator.
"""


def sampled_labels(output: Any, generator: torch.Generator) -> Tensor:
    """Cross-entropy against labels drawn from the model's own distribution: squared gradients average to the Fisher
    information.

    Logits are [..., classes], or [batch, classes, height, width] of a dense prediction.
    That is the Hessian of KL(original || compressed) at the original weights. Source: Amari 1998; Kunstner et al. 2019,
    section 2.
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
    """`sampled_labels` of many logits [tokens, classes], a few tokens at a time: beside them there is only their
    gradient, softmax - label.
    """

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
    """<output, v> with v of independent standard normals: squared gradients average to the Gauss-Newton matrix of half
    the squared error.

    Of an output of several tensors (hidden states and a pooled one), all that depend on the weights are probed.
    Raises: DataError where no tensor does.
    """
    seen = [y for y in tensors_in(output) if y.requires_grad]
    if not seen:
        raise DataError(
            f"the model's output ({type(output).__name__}) holds no tensor that depends on its weights, so no gradient "
            "can be taken; "
            "pass loss=, a function of the model's output and the batch"
        )
    return torch.stack([(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in seen]).sum()


def default_probe(output: Any, _: Batch, generator: torch.Generator) -> Tensor:
    """`sampled_labels` of an output that holds classes ([batch, classes], or `.logits`), else a random projection
    (of hidden states, say).
    """
    logits = getattr(output, "logits", output)
    if (
        isinstance(logits, Tensor)
        and logits.shape[-1:].numel() > 1
        and logits.requires_grad
        and (logits.dim() == 2 or hasattr(output, "logits"))
    ):
        return sampled_labels(output, generator)
    return random_projection(output, generator)


def probe_of(loss: OutputLoss | None) -> Probe:
    """The probe that a user's loss is, or, without one, the default."""
    if loss is None:
        return default_probe

    def probe(output: Any, batch: Batch, _: torch.Generator) -> Tensor:
        return loss_of(output, to_device(batch, next(iter(tensors_in(output))).device), loss)

    return probe


def probed(probe: Probe, output: Any, batch: Batch, generator: torch.Generator, number: int) -> Tensor:
    """The probe of one batch's output. Raises: DataError with the batch's number when it is not finite."""
    try:
        scalar = probe(output, batch, generator)
    except DataError as error:
        raise DataError(f"calibration batch {number}: {error}") from error
    if not bool(scalar.isfinite()):
        raise DataError(f"calibration batch {number}: the loss of the model's output is {float(scalar)}")
    return scalar
