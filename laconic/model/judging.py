"""What a model's answers are worth: a loss and a score, which mean the same in every call that takes one.

loss(output, batch)   the mean loss of a batch, a tensor with one number
score(output, batch)  a number per example of the batch, higher is better, or their mean
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import DataError
from laconic.host.foreign import Foreign
from laconic.host.randomness import private_randomness
from laconic.model.batches import Batch, size_of, to_device
from laconic.model.calling import call, in_evaluation

OutputLoss = Callable[[Any, Batch], Tensor]
"""The mean loss of a batch, a scalar, from the model's output and the batch."""
OutputScore = Callable[[Any, Batch], Tensor]
"""A number per example of a batch, higher is better; the score of a model is their mean."""


@dataclass(frozen=True)
class Judgement:
    """Mean loss and mean score over `examples` examples."""

    loss: float
    score: float
    examples: int


def check_function(name: str, function: object) -> None:
    """Raises DataError unless a loss or a score, where there is one, is a function of the model's output and the
    batch."""
    if function is None:
        return
    expected = f"{name}: expected a function {name}(output, batch) of the model's output and the batch"
    if not callable(function):
        raise DataError(f"{expected}, got a {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions do not say what they take
        return
    try:
        second = list(signature.bind(None, None).arguments)[-1]
    except TypeError:
        raise DataError(f"{expected}; this one takes {signature}") from None
    if second in ("generator", "rng"):
        raise DataError(
            f"{expected}; this one takes {signature}: random numbers are its own to make, from a seed of its own"
        )


def loss_of(output: Any, batch: Batch, loss: OutputLoss | None = None) -> Tensor:
    """The loss of a batch, a scalar. Raises: DataError where `loss` gives anything else."""
    found = (loss or default_loss)(output, batch)
    if not (isinstance(found, Tensor) and found.numel() == 1):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"loss: expected the mean loss of a batch, a tensor with one number, got {shape}")
    return found


def scores_of(output: Any, batch: Batch, loss: Tensor, score: OutputScore | None = None) -> Tensor:
    """A score per example, or one for the batch; by default whether the class is right, or minus the loss."""
    if score is not None:
        return torch.as_tensor(score(output, batch))
    hits = default_score(output, batch)
    return hits if hits is not None else -loss


def judge(
    model: nn.Module, data: Iterable[Batch], loss: OutputLoss | None = None, score: OutputScore | None = None,
    device: torch.device | None = None,
) -> Judgement:  # fmt: skip
    """Mean loss and score of a model in evaluation mode over all examples; its mode is put back. Raises: DataError when
    there is no batch."""
    device = device or next(model.parameters()).device
    losses = scores = 0.0
    items = examples = 0
    with in_evaluation(model), torch.no_grad(), nn.utils.parametrize.cached(), private_randomness(0, 0, device, data):
        for given in data:
            batch = to_device(given, device)
            output = call(model, batch)
            size, found = size_of(batch), loss_of(output, batch, loss)
            values = scores_of(output, batch, found, score)
            weight = size if values.numel() == 1 else values.numel()
            losses += float(found) * size
            scores += float(values.double().mean()) * weight
            examples, items = examples + size, items + weight
    if not examples:
        raise DataError("expected batches to measure a model on, got none")
    return Judgement(losses / examples, scores / items, examples)


def try_loss(output: Any, batch: Batch, loss: OutputLoss, name: str) -> None:
    """Raises DataError, naming the batch, where a loss cannot be taken of a model's output on it, whatever it
    raises."""
    with Foreign(DataError, f"loss: fails on {name}"):
        loss_of(output, batch, loss)


def default_loss(output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy: of labels where a batch has some, else of the next token (those an `attention_mask` leaves
    out do not count)."""
    logits = getattr(output, "logits", output)
    if isinstance(batch, dict):
        if "labels" in batch and isinstance(getattr(output, "loss", None), Tensor):
            return output.loss
        tokens = batch.get("input_ids")
        if "labels" in batch or not (
            isinstance(tokens, Tensor) and isinstance(logits, Tensor) and logits.shape[:-1] == tokens.shape
        ):
            raise DataError(
                f"no loss for a batch with {sorted(batch)}: pass loss=, a function of the model's output and the batch"
            )
        mask = batch.get("attention_mask")
        targets = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if not (isinstance(labels, Tensor) and isinstance(logits, Tensor)):
        raise DataError(
            "no loss for this batch: expected (input, labels), or pass loss=, a function of the model's output and "
            "the batch"
        )
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"no loss for outputs of {tuple(logits.shape)} and targets of {tuple(labels.shape)} {labels.dtype}: "
            "pass loss=, "
            "a function of the model's output and the batch"
        )
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def default_score(output: Any, batch: Batch) -> Tensor | None:
    """1 where the largest output is the label, else 0; None where there is not one class per example."""
    logits = getattr(output, "logits", output)
    labels = (
        batch.get("labels")
        if isinstance(batch, dict)
        else batch[1]
        if isinstance(batch, list | tuple) and len(batch) == 2
        else None
    )
    if not (isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()):
        return None
    if not (isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape):
        return None
    return (logits.argmax(-1) == labels).float()
