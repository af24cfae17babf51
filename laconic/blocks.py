"""A model as a chain of blocks, found by structure, so that one block at a time has to be in memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError

Batch = Any
"""What a model is called with: a tensor, a dict of keyword arguments, or a tuple whose first entry is the input (the rest are targets)."""


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one batch."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors anywhere inside dicts, lists and tuples, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def examples_in(batch: Batch) -> int:
    """The number of examples in a batch: the length of its first tensor."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
    return len(first)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's mode is put back."""
    training, modes = model.training, {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, training)  # a module that came inside (an installed weight) takes the model's


class Residency(Protocol):
    """Whoever knows how to bring a model's tensors into memory, on a device, and let them go again."""

    model: nn.Module
    device: torch.device

    def hold(self, path: str, *, head: bool = True) -> Any:
        """A context in which the module at `path` is in memory ("" is everything outside the chain, with or without the output head)."""


class InMemory:
    """The residency of a model that is in memory already."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, next(model.parameters()).device

    @contextmanager
    def hold(self, path: str, *, head: bool = True) -> Iterator[None]:
        yield


def find_chain(model: nn.Module) -> str | None:
    """The path of the ModuleList whose elements hold most of the model's matrix entries, or None when no list holds half of them.

    Lists inside a list (experts in a block) belong to their block.
    """
    total = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    outside = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    best, path = 0, None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            size = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
            if size > best:  # an outer list comes first and is never smaller than a list inside it
                best, path = size, name
    return path if best * 2 >= total - min(outside, total // 2) and best > 0 else None


@dataclass
class Calls:
    """What the model handed to its blocks for one batch: the first block's hidden state, and every block's other arguments."""

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Reached(Exception):  # noqa: N818 - not an error: the last block has been reached, nothing after it is wanted
    pass


class _Stand(nn.Module):
    """Stands in a block's place: notes how it is called, and gives `answer(hidden)` instead of computing."""

    def __init__(self, block: nn.Module, notes: list[tuple[tuple[Any, ...], dict[str, Any]]], answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: its tensors must stay where they are
        self.notes, self.answer = notes, answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = _split(args, kwargs)
        self.notes.append(((hidden, *args), kwargs))
        return self.answer(hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)  # models read flags such as attention_type off their blocks


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    if "hidden_states" not in kwargs:
        raise CheckpointError(f"a block was called without a hidden state; it got {sorted(kwargs)}")
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


class BlockModel:
    """Runs a model block by block: `capture` the inputs, `run` each block on the hidden states, `tail` for the output.

    Equals the model's own forward when every block maps a hidden state to a hidden state; `capture` checks that the model passes each
    block's answer on to the next one, and raises CheckpointError otherwise.
    """

    def __init__(self, residency: Residency, path: str) -> None:
        self.model, self.device, self.path, self.residency = residency.model, residency.device, path, residency
        self.blocks: nn.ModuleList = residency.model.get_submodule(path)  # type: ignore[assignment]
        self._rest: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def block_path(self, i: int) -> str:
        return f"{self.path}.{i}"

    @contextmanager
    def _stands(self, notes: list[tuple[tuple[Any, ...], dict[str, Any]]], answer: Callable[[Tensor], Any]) -> Iterator[None]:
        originals = list(self.blocks)
        try:
            for i, block in enumerate(originals):
                self.blocks[i] = _Stand(block, notes, answer)
            yield
        finally:
            for i, block in enumerate(originals):
                self.blocks[i] = block

    @torch.no_grad()
    def _watch(self, batch: Batch, until: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """How the first `until` blocks are called for a batch, each answering with a copy of its hidden state."""
        notes: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        given: list[Tensor] = []

        def answer(hidden: Tensor) -> Any:
            if len(notes) == until:
                raise _Reached
            given.append(hidden.clone())
            return self._formed(given[-1])

        with self._stands(notes, answer), suppress(_Reached):
            call(self.model, to_device(batch, self.device))
        if len(notes) != until or any(notes[i + 1][0][0] is not given[i] for i in range(until - 1)):
            raise CheckpointError(f"{self.path}: its {len(self.blocks)} blocks do not form a chain in which each feeds the next")
        return notes

    def capture(self, batches: Iterable[Batch]) -> list[Calls]:
        """How the model calls its blocks for each batch. Only what lies before the chain is computed, and block 0 once for its form."""
        batches = list(batches)
        captured: list[Calls] = []
        if batches:
            self._rest = self._form(batches[0])
        with self.residency.hold("", head=False):
            for batch in batches:
                notes = self._watch(batch, len(self.blocks))
                captured.append(Calls(notes[0][0][0].cpu(), [(args[1:], kwargs) for args, kwargs in notes]))
        return captured

    def look_up(self, batches: Iterable[Batch]) -> None:
        """Run what lies before the chain, once for each batch, for those who watch its look-ups."""
        with self.residency.hold("", head=False):
            for batch in batches:
                self._watch(batch, 1)

    @torch.no_grad()
    def _form(self, batch: Batch) -> tuple[Any, ...] | None:
        """What block 0 returns beside the hidden state: None for a bare tensor, else the rest of its tuple."""
        with self.residency.hold("", head=False):
            args, kwargs = self._watch(batch, 1)[0]
        with self.residency.hold(self.block_path(0)):
            output = self.blocks[0](*args, **kwargs)
        return None if isinstance(output, Tensor) else tuple(output[1:])

    def _formed(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)

    def run(self, i: int, hidden: Tensor, calls: Calls) -> Tensor:
        """Block i's answer to a hidden state, with the other arguments the model gave it."""
        args, kwargs = calls.arguments[i]
        output = self.blocks[i](hidden.to(self.device), *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def tail(self, hidden: Tensor, batch: Batch) -> Any:
        """The model's output, given the last block's answer; what lies outside the chain must be held."""
        final = hidden.to(self.device)
        with self._stands([], lambda _: self._formed(final)):
            return call(self.model, to_device(batch, self.device))
