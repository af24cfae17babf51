"""What recovery and search know of a problem: its data in three splits that share nothing, its loss and its score."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.errors import DataError
from laconic.host.foreign import Foreign, run_file
from laconic.host.randomness import private_randomness
from laconic.model.blocks import Batch, call, in_evaluation, to_device
from laconic.recover.batches import digests, size_of, unlabelled

OutputLoss = Callable[[Any, Batch], Tensor]
"""The mean loss of a batch, a scalar, from the model's output and the batch."""
OutputScore = Callable[[Any, Batch], Tensor]
"""A number per example of a batch, higher is better; the score of a model is their mean."""
_HASHED = 100_000  # examples per split that are compared with the other splits


@dataclass(frozen=True)
class Judgement:
    """Mean loss and mean score over `examples` examples."""

    loss: float
    score: float
    examples: int


@dataclass(frozen=True)
class Task:
    """Data, loss and score. Every split is an iterable of batches that can be gone through again and again.

    `train` is trained on, `validation` chooses (the best model, the next sparsity), `test` is measured at the end and never decides.
    `loss(output, batch)` is a mean; by default cross-entropy of (input, labels) batches, the model's own loss of dicts with `labels`, and
    that of the next token of dicts without. `score(output, batch)` gives a number per example; by default whether the largest output is
    the label, or, where there is not one label per example, minus the loss. `example` is an input without labels, by default the first of
    `validation`.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch]
    test: Iterable[Batch] | None = None
    loss: OutputLoss | None = None
    score: OutputScore | None = None
    example: Batch | None = None

    def loss_of(self, output: Any, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar. Raises: DataError where `loss` gives anything else."""
        loss = (self.loss or default_loss)(output, batch)
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(f"loss: expected the mean loss of a batch, a tensor with one number, got {shape}")
        return loss

    def scores_of(self, output: Any, batch: Batch, loss: Tensor) -> Tensor:
        """A score per example, or one for the batch."""
        if self.score is not None:
            return torch.as_tensor(self.score(output, batch))
        hits = default_score(output, batch)
        return hits if hits is not None else -loss

    def judge(self, model: nn.Module, data: Iterable[Batch], device: torch.device | None = None) -> Judgement:
        """Loss and score of a model in evaluation mode; its mode is put back. Raises: DataError when there is no batch."""
        device = device or next(model.parameters()).device
        losses = scores = 0.0
        items = examples = 0
        with (
            in_evaluation(model),
            torch.no_grad(),
            nn.utils.parametrize.cached(),
            private_randomness(0, 0, device, data),
        ):
            for given in data:
                batch = to_device(given, device)
                output = call(model, batch)
                size, loss = size_of(batch), self.loss_of(output, batch)
                values = self.scores_of(output, batch, loss)
                weight = size if values.numel() == 1 else values.numel()
                losses += float(loss) * size
                scores += float(values.double().mean()) * weight
                examples, items = examples + size, items + weight
        if not examples:
            raise DataError("expected batches to measure a model on, got none")
        return Judgement(losses / examples, scores / items, examples)

    def sample(self) -> Batch:
        """An input the model can be called with, without labels."""
        if self.example is not None:
            return self.example
        with private_randomness(0, 0, data=self.validation):
            first = next(iter(self.validation), None)
        if first is None:
            raise DataError("validation: expected batches, got none")
        return unlabelled(first)

    def checked(self) -> "Task":
        """The task, after making sure that its splits can be gone through twice and share no example (found by hash, of the inputs' bytes).

        Raises: DataError for a split that is not an iterable of batches, has none, or is exhausted after a pass, or an example in two splits.
        """
        splits = {"train": self.train, "validation": self.validation} | (
            {"test": self.test} if self.test is not None else {}
        )
        seen: dict[bytes, tuple[str, int]] = {}
        for name, data in reversed(splits.items()):
            if isinstance(data, Iterator):
                raise DataError(
                    f"{name}: expected data that can be gone through again (a list, a DataLoader), got the iterator {data!r}"
                )
            if not isinstance(data, Iterable):
                raise DataError(
                    f"{name}: expected an iterable of batches (a list, a DataLoader), got a {type(data).__name__}"
                )
            with private_randomness(0, 0, data=data):
                self._compare(name, data, seen)
                if next(iter(data), None) is None:
                    raise DataError(
                        f"{name}: expected data that can be gone through again; it was exhausted after one pass"
                    )
        return self

    @staticmethod
    def _compare(name: str, data: Iterable[Batch], seen: dict[bytes, tuple[str, int]]) -> None:
        i = -1
        for i, digest in zip(range(_HASHED), digests(data), strict=False):
            other, j = seen.setdefault(digest, (name, i))
            if other != name:
                raise DataError(f"example {i} of {name} is example {j} of {other}: the splits may not share samples")
        if i < 0:
            raise DataError(f"{name}: expected batches, got none")


def default_loss(output: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy: of labels where a batch has some, else of the next token (those an `attention_mask` leaves out do not count)."""
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
            "no loss for this batch: expected (input, labels), or pass loss=, a function of the model's output and the batch"
        )
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"no loss for outputs of {tuple(logits.shape)} and targets of {tuple(labels.shape)} {labels.dtype}: pass loss=, "
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


def load_task(file: Path) -> tuple[nn.Module, Task]:
    """The variables `model`, `train`, `validation` and, where given, `test`, `loss`, `score`, `example` of a Python file, which is run.

    Raises: DataError when the file is absent, where and how it fails, when a variable is missing or not of its kind, and when the model, the
    loss or the score fails on the first batch of the validation data.
    """
    names = run_file(file, DataError, "task")
    missing = [name for name in ("model", "train", "validation") if name not in names]
    if missing or not isinstance(names.get("model"), nn.Module):
        what = (
            f"no variable {missing[0]!r}"
            if missing
            else f"a model that is a {type(names['model']).__name__}, not an nn.Module"
        )
        raise DataError(
            f"{file}: a task file defines model, train and validation (and test, loss, score, example); found {what}"
        )
    model, task = names["model"], Task(names["train"], names["validation"])
    task = replace(task, **{key: names[key] for key in ("test", "loss", "score", "example") if key in names})
    for key, value in (("loss", task.loss), ("score", task.score)):
        if value is not None and not callable(value):
            raise DataError(
                f"{file}: {key} should be a function of the model's output and the batch, got a {type(value).__name__}"
            )
    for key, data in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        if data is not None and (isinstance(data, Iterator) or not isinstance(data, Iterable)):
            raise DataError(
                f"{file}: {key} should be batches that can be gone through again (a list, a DataLoader), got a {type(data).__name__}"
            )
    _try(model, task, file)
    return model, task


def _try(model: nn.Module, task: Task, file: Path) -> None:
    """Judges a model on one batch. Raises: DataError with what was raised, and by which line of the file."""
    with private_randomness(0, 0, data=task.validation), Foreign(DataError, file):
        first = next(iter(task.validation), None)
    if first is None:
        raise DataError(f"{file}: validation: expected batches, got none")
    with Foreign(DataError, f"{file}: the model, its loss or its score fails on the first batch of validation"):
        task.judge(model, [first])
