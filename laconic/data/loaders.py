"""Batches as users bring them (loaders, data sets, lists, generators) in one form: what a model is called with, without
padding.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from laconic.data.modality import accepts, decoder_start, main_input
from laconic.disk.tensors import bytes_of
from laconic.errors import DataError
from laconic.host.randomness import private_randomness
from laconic.model.batches import Batch, examples_in, usable

EXPECTED = (
    "an iterable of batches (a list, a DataLoader, a data set), each a tensor, a dict of tensors or a tuple whose "
    "first entry is the input"
)
_DIMENSIONS = {
    "input_ids": 2,
    "pixel_values": 4,
    "input_features": 3,
    "input_values": 2,
}  # of a batch; an example has one less
_LENGTH = 256  # positions of an example that says nothing about them


def checked_data(data: Any) -> Iterable[Any]:
    """The data, if it is an iterable of something. Raises: DataError that says what came and, where it is one batch,
    what to do.
    """
    if isinstance(data, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(data, Tensor) else "an array"
        raise DataError(
            f"data: expected {EXPECTED}; got {kind} of shape {list(data.shape)}: for one batch pass [tensor]"
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"data: expected {EXPECTED}; got one {type(data).__name__} with {_keys(data)}: for one batch pass [batch]"
        )
    if isinstance(data, str | bytes | Path | nn.Module | type) or not (
        isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        raise DataError(f"data: expected {EXPECTED}; got a {type(data).__name__}")
    return data


def taken(data: Any, examples: int, seed: int, form: Callable[[Batch], Batch] = lambda batch: batch) -> list[Batch]:
    """Batches in one `form` until `examples` examples are reached; the global random state is left alone, a shuffling
    loader follows `seed`.

    Raises: DataError naming the first batch that is none.
    """
    batches: list[Batch] = []
    seen = 0
    with private_randomness(seed, 0, data=data):
        for i, item in enumerate(_items(checked_data(data))):
            batch = form(as_batch(item, f"batch {i}"))
            batches.append(batch)
            seen += examples_in(batch)
            if seen >= examples:
                break
    return batches


def _items(data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, Dataset) and not hasattr(data, "__iter__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    return iter(data)


def as_batch(item: Any, name: str) -> Batch:
    """A batch as a tensor, a dict or a tuple, lists of numbers made tensors. Raises: DataError."""
    if isinstance(item, Tensor) and item.dim():
        return item
    if isinstance(item, Mapping):
        found = {str(key): _value(value, f"{name}: {key}") for key, value in item.items()}
        found = {key: value for key, value in found.items() if value is not None}
        if not any(isinstance(value, Tensor) and value.dim() for value in found.values()):
            raise DataError(f"{name}: expected a dict of tensors, got {_keys(item)} without any")
        return found
    if isinstance(item, list | tuple) and len(item):
        if isinstance(item[0], Mapping):
            return as_batch(item[0], name)
        if isinstance(item[0], Tensor) and item[0].dim():
            return tuple(item)
    shape = f" of shape {list(item.shape)}; torch.from_numpy makes it a tensor" if isinstance(item, np.ndarray) else ""
    raise DataError(
        f"{name}: expected a tensor, a dict of tensors or a tuple whose first entry is the input, got a "
        f"{type(item).__name__}{shape}"
    )


def _keys(item: Mapping[Any, Any]) -> str:
    return ", ".join(repr(str(key)) for key in list(item)[:8]) or "nothing"


def _value(value: Any, name: str) -> Any:
    """Numbers as a tensor; text is left out, since no model is called with it; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, str) or (isinstance(value, list | tuple) and value and isinstance(value[0], str)):
        return None
    if isinstance(value, list) and value and not isinstance(value[0], Tensor | Mapping | tuple):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{name}: lists of unequal length make no tensor; pad them, with an attention_mask: {error}"
            ) from error
    return value


def without_padding(batch: Batch) -> list[Batch]:
    """The batch's examples without the positions that its masks leave out: a padded position is nothing that a model
    should be judged by.

    For every mask [examples, positions] of zeros and ones named `*attention_mask`, the tensors that have its shape are
    cut alike. Examples that are left equally long stay together. A batch without padding stays as it is.
    """
    if not isinstance(batch, dict):
        return [batch]
    masks = {
        key: value
        for key, value in batch.items()
        if key.endswith("attention_mask") and isinstance(value, Tensor) and value.dim() == 2
    }
    if all(bool((mask != 0).all()) for mask in masks.values()):
        return [batch]
    parts: list[Batch] = []
    for i in range(examples_in(batch)):
        part = {key: value[i : i + 1] if _has_examples(value, batch) else value for key, value in batch.items()}
        for key, mask in masks.items():
            side, seen = key.removesuffix("attention_mask"), mask[i] != 0
            if not bool(seen.any()):
                raise DataError(f"{key}: leaves out every position of an example")
            for name in [name for name, value in part.items() if _belongs(name, side, value, mask)]:
                part[name] = part[name][:, seen.to(part[name].device)]
        parts.append(part)
    return joined(parts, examples_in(batch))


def _has_examples(value: Any, batch: dict[str, Any]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == examples_in(batch)


def _belongs(name: str, side: str, value: Any, mask: Tensor) -> bool:
    """Whether a tensor has the mask's positions: of its own side (the decoder's mask is no mask of the encoder's
    input).
    """
    shaped = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == mask.shape[1]
    decoder = name.startswith("decoder_") or name == "labels"
    return shaped and (decoder == side.startswith("decoder_") or (name == "labels" and not side))


def joined(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Neighbouring batches of equal shapes (but for the number of examples) put together, up to `size` examples."""
    groups: list[list[Batch]] = []
    signature: Any = None
    count = 0
    for batch in batches:
        here = _signature(batch)
        if groups and here is not None and here == signature and count + examples_in(batch) <= size:
            groups[-1].append(batch)
            count += examples_in(batch)
        else:
            groups.append([batch])
            signature, count = here, examples_in(batch)
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def _signature(batch: Batch) -> Any:
    """What has to be equal for two batches to be put together; None where they cannot be, since a tensor is not of
    examples alone.
    """
    if isinstance(batch, Tensor):
        return (batch.dtype, batch.shape[1:])
    if not isinstance(batch, dict) or not all(
        _has_examples(value, batch) or not isinstance(value, Tensor) for value in batch.values()
    ):
        return None
    return sorted(
        (key, (value.dtype, value.shape[1:]) if isinstance(value, Tensor) else repr(value))
        for key, value in batch.items()
    )


def _concatenated(batches: list[Batch]) -> Batch:
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    first = batches[0]
    return {
        key: torch.cat([batch[key] for batch in batches]) if isinstance(value, Tensor) else value
        for key, value in first.items()
    }


def divided(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of at most `size` examples; whole, where not every tensor of it is of examples."""
    count = examples_in(batch)
    if count <= size or _signature(batch) is None:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    cut = range(0, count, size)
    return [
        {key: value[i : i + size] if isinstance(value, Tensor) else value for key, value in batch.items()} for i in cut
    ]


def for_model(batch: Batch, model: nn.Module) -> Batch:
    """A batch as a model of transformers is called to be observed: no loss, no cache, an example alone as a batch of
    one.
    """
    name = main_input(model)
    if isinstance(batch, tuple):
        batch = batch[0]
    if isinstance(batch, Tensor):
        batch = {name: batch}
    main = batch.get(name)
    if isinstance(main, Tensor) and main.dim() == _DIMENSIONS.get(name, 0) - 1:
        batch = {key: value[None] if isinstance(value, Tensor) else value for key, value in batch.items()}
    batch = dict(batch)
    labels = batch.pop("labels", None)
    start = decoder_start(model)
    if isinstance(labels, Tensor) and start is not None and "decoder_input_ids" not in batch:
        batch |= _shifted(labels, start)
    return uncached(batch, model)


def _shifted(labels: Tensor, start: int) -> dict[str, Tensor]:
    """What a decoder reads that is to write `labels` [examples, positions]: its start token and all but the last; -100
    stands for padding.
    """
    before = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    padding = before == -100
    return {"decoder_input_ids": before.masked_fill(padding, start), "decoder_attention_mask": (~padding).long()}


def uncached(batch: Batch, model: nn.Module) -> Batch:
    """The batch for a model that keeps no cache: what is run twice, block by block, would see its own past."""
    if not accepts(model, "use_cache") or not (isinstance(batch, dict) or accepts(model, main_input(model))):
        return batch
    named = batch
    if not isinstance(batch, dict):
        named = {main_input(model): batch[0] if isinstance(batch, list | tuple) else batch}
    return {**named, "use_cache": named.get("use_cache", False)}


def ready(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """Batches as statistics of a model are gathered from them: no caches, no padding, tensors that gradients can pass
    through.
    """
    return [part for batch in batches for part in without_padding(uncached(usable(batch), model))]


@dataclass(frozen=True)
class Examples:
    """Batches that a model is called with, where they come from, and a hash that changes with any of their tensors."""

    calls: list[Batch]
    source: str
    start: tuple[int, ...] = ()

    @property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for call in self.calls:
            for key, value in sorted(call.items()) if isinstance(call, dict) else [("", call)]:
                if isinstance(value, Tensor):
                    digest.update(f"{key} {value.dtype} {list(value.shape)} ".encode())
                    digest.update(bytes_of(value.detach().cpu().contiguous()))
                else:
                    digest.update(f"{key} {value!r} ".encode())
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """How many examples there are."""
        return sum(examples_in(call) for call in self.calls)

    @property
    def length(self) -> int:
        """The positions of the longest example, as far as it says so."""
        told = [
            call["input_ids"].shape[1]
            for call in self.calls
            if isinstance(call, dict) and isinstance(call.get("input_ids"), Tensor)
        ]
        return max(told, default=_LENGTH)

    def batches(self, size: int) -> list[Batch]:
        """The model's arguments for at most `size` examples at a time (more where a batch cannot be divided)."""
        return joined([part for call in self.calls for part in divided(call, size)], size)

    def first(self, count: int) -> "Examples":
        """The first `count` examples."""
        return replace(self, calls=self.split(count)[0]) if count < self.count else self

    def split(self, count: int) -> tuple[list[Batch], list[Batch]]:
        """The calls of the first `count` examples, and those of the rest; a batch that cannot be divided goes with the
        first.
        """
        before: list[Batch] = []
        after: list[Batch] = []
        seen = 0
        for call in self.calls:
            for part in divided(call, 1):
                (before if seen < count else after).append(part)
                seen += examples_in(part)
        size = max((examples_in(call) for call in self.calls), default=1)
        return joined(before, size), joined(after, size)

    def sequences(self) -> Iterator[Tensor]:
        """The token ids of every example, in order."""
        for call in self.calls:
            if isinstance(call, dict) and isinstance(call.get("input_ids"), Tensor):
                yield from call["input_ids"]

    def describe(self) -> dict[str, Any]:
        """What a manifest says of them."""
        first = self.calls[0] if isinstance(self.calls[0], dict) else {"input": self.calls[0]}
        shapes = {key: list(value.shape[1:]) for key, value in first.items() if isinstance(value, Tensor)}
        return {
            "source": self.source,
            "sha256": self.hash,
            "examples": self.count,
            "inputs": shapes,
            "start": list(self.start),
        }
