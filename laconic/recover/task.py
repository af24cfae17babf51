"""What recovery and search know of a problem: its data in three splits that share nothing, its loss and its score."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import DataError
from laconic.host.foreign import Foreign, run_file
from laconic.host.randomness import private_randomness
from laconic.model.batches import Batch, unlabelled
from laconic.model.judging import Judgement, OutputLoss, OutputScore, check_function, judge, loss_of
from laconic.recover.batches import digests

_HASHED = 100_000  # examples per split that are compared with the other splits


@dataclass(frozen=True)
class Task:
    """Data, loss and score. Every split is an iterable of batches that can be gone through again and again.

    `train` is trained on, `validation` chooses (the best model, the next sparsity), `test` is measured at the end and
    never decides. `loss(output, batch)` is a mean; by default cross-entropy of (input, labels) batches, the model's own
    loss of dicts with `labels`, and that of the next token of dicts without. `score(output, batch)` gives a number per
    example; by default whether the largest output is the label, or, where there is not one label per example, minus the
    loss. `example` is an input without labels, by default the first of `validation`.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch]
    test: Iterable[Batch] | None = None
    loss: OutputLoss | None = None
    score: OutputScore | None = None
    example: Batch | None = None

    def loss_of(self, output: Any, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar. Raises: DataError where `loss` gives anything else."""
        return loss_of(output, batch, self.loss)

    def judge(self, model: nn.Module, data: Iterable[Batch], device: torch.device | None = None) -> Judgement:
        """Loss and score of a model in evaluation mode; its mode is put back. Raises: DataError when there is no
        batch.
        """
        return judge(model, data, self.loss, self.score, device)

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
        """The task, after making sure that its splits can be gone through twice and share no example (found by hash, of
        the inputs' bytes).

        Raises: DataError for a loss or score that takes anything but output and batch, for a split that is not an
        iterable of batches, has none, or is exhausted after a pass, and for an example in two splits.
        """
        check_function("loss", self.loss)
        check_function("score", self.score)
        splits = {"train": self.train, "validation": self.validation} | (
            {"test": self.test} if self.test is not None else {}
        )
        seen: dict[bytes, tuple[str, int]] = {}
        for name, data in reversed(splits.items()):
            if isinstance(data, Iterator):
                raise DataError(
                    f"{name}: expected data that can be gone through again (a list, a DataLoader), got the iterator "
                    f"{data!r}"
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


def load_task(file: Path) -> tuple[nn.Module, Task]:
    """The variables `model`, `train`, `validation` and, where given, `test`, `loss`, `score`, `example` of a Python
    file, which is run.

    Raises: DataError when the file is absent, where and how it fails, when a variable is missing or not of its kind,
    and when the model, the loss or the score fails on the first batch of the validation data.
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
        try:
            check_function(key, value)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
    for key, data in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        if data is not None and (isinstance(data, Iterator) or not isinstance(data, Iterable)):
            raise DataError(
                f"{file}: {key} should be batches that can be gone through again (a list, a DataLoader), got a "
                f"{type(data).__name__}"
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
