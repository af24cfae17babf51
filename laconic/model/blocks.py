"""A model as a chain of blocks, found by structure, so that one block at a time has to be in memory."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laconic.errors import CheckpointError
from laconic.model.batches import Batch, tensors_in, to_device
from laconic.model.calling import call
from laconic.model.gradients import asking_gradients
from laconic.model.roles import head_modules


class Residency(Protocol):
    """Whoever knows how to bring a model's tensors into memory, on a device, and let them go again."""

    model: nn.Module
    device: torch.device
    whole: bool
    """Whether all of the model is in memory anyway."""

    def hold(self, path: str, *, head: bool = True) -> Any:
        """A context in which the module at `path` is in memory ("" is everything outside the chain, with or without the
        output head).
        """


class InMemory:
    """The residency of a model that is in memory already."""

    whole = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, next(model.parameters()).device

    @contextmanager
    def hold(self, path: str, *, head: bool = True) -> Iterator[None]:
        yield


def find_chain(model: nn.Module) -> str | None:
    """The path of the ModuleList whose elements hold most of the model's matrix entries, or None when no list holds
    half of them.

    Embeddings and output heads do not count: they can be most of a small model. Lists inside a list
    (experts in a block) belong to their block. Whether the blocks do form a chain only a run shows (`open_chain`).
    """
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() >= 2}
    ends = _ends(model)
    body = sum(size for key, size in matrices.items() if key not in ends)
    best, path = 0, None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(matrices[id(p)] for p in module.parameters() if id(p) in matrices and id(p) not in ends)
            if size > best:  # an outer list comes first and is never smaller than a list inside it
                best, path = size, name
    return path if best * 2 >= body and best > 0 else None


def _ends(model: nn.Module) -> set[int]:
    """The identities of embedding tables and output heads outside lists: what is named so, and linear layers of a
    table's shape.
    """
    tables = {id(m.weight): tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Embedding)}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {m for blocks in lists for m in blocks.modules()}
    shapes = set(tables.values())
    heads = head_modules(model) | {
        m for m in model.modules() if isinstance(m, nn.Linear) and tuple(m.weight.shape) in shapes
    }
    return set(tables) | {id(p) for m in heads - inside for p in m.parameters()}


class ChainError(CheckpointError):
    """A list of blocks that is wired in another way than each feeding the next; whoever meets it runs the whole model
    instead.
    """


@dataclass
class Calls:
    """What the model handed to its blocks for one batch: the first block's hidden state, and every block's other
    arguments.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Reached(Exception):  # noqa: N818 - not an error: the last block has been reached, nothing after it is wanted
    pass


@dataclass
class _BlockCall:
    """One call of a block: its number, the key its hidden state came under (None for the first positional argument),
    that state, and the rest.
    """

    number: int
    key: str | None
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    version: int  # of the hidden state: a tensor that is changed in place counts up


def _split(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _BlockCall:
    """The hidden state among a block's arguments: the first positional one, or the first float tensor among the named
    ones.
    """
    if args:
        key, hidden, rest = None, args[0], args[1:]
    else:
        floats = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]
        key = "hidden_states" if "hidden_states" in kwargs else next(iter(floats), None)
        hidden, rest = kwargs.get(key) if key is not None else None, args
    if not isinstance(hidden, Tensor):
        raise ChainError(
            f"a block was called without a hidden state; it got {[type(a).__name__ for a in args] + sorted(kwargs)}"
        )
    version = 0 if hidden.is_inference() else hidden._version
    return _BlockCall(
        number,
        key,
        hidden=hidden,
        args=rest,
        kwargs={name: value for name, value in kwargs.items() if name != key},
        version=version,
    )


def _fresh(value: Any) -> Any:
    """An argument of a block as the model gave it: what can be written to (a cache, a dict) is copied, so that every
    run finds the same.
    """
    if type(value) is dict:
        return {key: _fresh(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    if (
        value is None
        or isinstance(value, Tensor | nn.Module | str | int | float | complex | torch.dtype | torch.device)
        or callable(value)
    ):
        return value
    return copy.deepcopy(value)


def _sizes(value: Any) -> list[int]:
    """The lengths of all dicts and lists among a block's arguments: what a block adds to them, later blocks may
    read.
    """
    inner: list[Any] = []
    if type(value) is dict:
        inner = list(value.values())
    elif type(value) in (list, tuple):
        inner = list(value)
    own = [len(inner)] if type(value) in (dict, list) else []
    return own + [size for item in inner for size in _sizes(item)]


class BlockModel:
    """Runs a model block by block: `capture` the inputs, `run` each block on the hidden states, `tail` for the output.

    Equals the model's own forward when every block maps a hidden state to a hidden state; `capture` checks that the
    model passes each block's answer on to the next one, `check` that nothing else passes between them. Both raise
    ChainError otherwise.
    """

    def __init__(self, residency: Residency, path: str) -> None:
        self.model, self.device, self.path, self.residency = residency.model, residency.device, path, residency
        self.blocks: nn.ModuleList = residency.model.get_submodule(path)  # type: ignore[assignment]
        self._rest: tuple[Any, ...] | None = None
        self._key: str | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def block_path(self, i: int) -> str:
        return f"{self.path}.{i}"

    def _refused(self, why: str) -> ChainError:
        return ChainError(
            f"{self.path}: its {len(self.blocks)} blocks do not form a chain in which each feeds the next ({why})"
        )

    @contextmanager
    def _stands(self, notes: list[_BlockCall], answer: Callable[[Tensor], Any]) -> Iterator[None]:
        """Inside, a block notes how it is called and gives `answer(hidden)` instead of computing.

        Only its `forward` is another: a model may know its blocks by their type, read flags off them, or hang hooks on
        them when it is first called (as transformers does for models that read hidden states on the way).
        """

        def stand(number: int, *args: Any, **kwargs: Any) -> Any:
            notes.append(_split(number, args, kwargs))
            return answer(notes[-1].hidden)

        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for i, block in enumerate(self.blocks):
                vars(block)["forward"] = partial(stand, i)
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward

    def _watch(self, batch: Batch, until: int, answers: list[Tensor] | None = None) -> list[_BlockCall]:
        """How the first `until` blocks are called for a batch, each answering with a copy of its hidden state, which
        goes to `answers`.
        """
        notes: list[_BlockCall] = []
        given = answers if answers is not None else []

        def answer(hidden: Tensor) -> Any:
            if len(notes) == until:
                raise _Reached
            given.append(hidden.detach().clone())
            return self._formed(given[-1])

        with torch.no_grad(), self._stands(notes, answer), suppress(_Reached):
            call(self.model, to_device(batch, self.device))
        self._follow(notes, given, until)
        return notes

    def _follow(self, notes: list[_BlockCall], given: list[Tensor], expected: int) -> None:
        """Raises ChainError unless each of the noted calls got the answer before it, unchanged, and nothing else that a
        block gave.
        """
        order = [note.number for note in notes]
        if order != list(range(expected)):
            raise self._refused(f"they are called in the order {order[:8]}")
        beside = {id(tensor) for tensor in tensors_in(self._rest)}
        for before, note in zip(given, notes[1:], strict=False):
            if note.hidden is not before or note.version:
                raise self._refused("what one gives is not what the next is given")
            if any(id(tensor) in beside or tensor is before for tensor in tensors_in((note.args, note.kwargs))):
                raise self._refused("more than the hidden state passes from one to the next")

    def capture(self, batches: Iterable[Batch]) -> list[Calls]:
        """How the model calls its blocks for each batch. Only what lies before the chain is computed, and block 0 once
        for its form.
        """
        batches = list(batches)
        captured: list[Calls] = []
        if batches:
            self._form(batches[0])
        with self.residency.hold("", head=False):
            for batch in batches:
                notes = self._watch(batch, len(self.blocks))
                captured.append(Calls(notes[0].hidden.cpu(), [(note.args, note.kwargs) for note in notes]))
        return captured

    def look_up(self, batches: Iterable[Batch]) -> None:
        """Run what lies before the chain, once for each batch, for those who watch its look-ups."""
        with self.residency.hold("", head=False):
            for batch in batches:
                self._watch(batch, 1)

    @torch.no_grad()
    def _form(self, batch: Batch) -> None:
        """Note how block 0 takes its hidden state and what it returns beside it: None for a bare tensor, else the rest
        of its tuple.
        """
        self._rest = None
        with self.residency.hold("", head=False):
            note = self._watch(batch, 1)[0]
        self._key = note.key
        args, kwargs = _fresh(note.args), _fresh(note.kwargs)
        with self.residency.hold(self.block_path(0)):
            output = self._called(0, note.hidden, args, kwargs)
        if _sizes((args, kwargs)) != _sizes((note.args, note.kwargs)):
            raise self._refused("a block writes to what all are given")
        if isinstance(output, list | tuple) and output and isinstance(output[0], Tensor):
            self._rest = tuple(output[1:])
        elif not isinstance(output, Tensor):
            raise self._refused(f"a block returns a {type(output).__name__}")
        after = output if isinstance(output, Tensor) else output[0]
        if after.shape != note.hidden.shape:
            raise self._refused(f"a block turns {list(note.hidden.shape)} into {list(after.shape)}")

    def check(self, batch: Batch, *, compare: bool = False) -> None:
        """Raises ChainError unless the hidden state is all that carries what depends on weights from block to block and
        to the output.

        The model runs once with stand-ins for its blocks, whose answers ask for gradients, as every weight outside the
        chain does: an argument of a block that asks for one depends on an earlier block, on an encoder or on a table;
        an output that depends on another answer than the last reads hidden states on the way. Memory: what lies outside
        the chain, and block 0; to `compare` the output too, all of it.
        """
        try:
            self._check(batch)
            if compare:
                self._compare(batch)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            if isinstance(error, ChainError):
                raise
            raise self._refused(
                f"with stand-ins in their places the model raises {type(error).__name__}: {error}"
            ) from error

    def _check(self, batch: Batch) -> None:
        self._form(batch)
        notes: list[_BlockCall] = []
        given: list[Tensor] = []

        def answer(hidden: Tensor) -> Any:
            given.append(hidden.detach().clone().requires_grad_())
            return self._formed(given[-1])

        with (
            self.residency.hold(""),
            torch.enable_grad(),
            asking_gradients(self._outside()),
            self._stands(notes, answer),
        ):
            output = call(self.model, to_device(batch, self.device))
            self._follow(notes, given, len(self.blocks))
            if any(tensor.requires_grad for note in notes for tensor in tensors_in((note.args, note.kwargs))):
                raise self._refused("a block is given what other weights computed, beside the hidden state")
            results = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            reached = (
                torch.autograd.grad(results, given, [torch.ones_like(r) for r in results], allow_unused=True)
                if results
                else ()
            )
        if any(gradient is not None for gradient in reached[:-1]):
            raise self._refused("the output reads hidden states before the last")

    def _outside(self) -> list[nn.Parameter]:
        """The parameters outside the chain that are now in the model."""
        inside = {id(p) for p in self.blocks.parameters()}
        return [p for p in self.model.parameters() if id(p) not in inside]

    def _formed(self, hidden: Tensor) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)

    def _called(
        self,
        i: int,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        instead: Mapping[str, Tensor] | None = None,
    ) -> Any:
        if self._key is None:
            args = (hidden, *args)
        else:
            kwargs = {**kwargs, self._key: hidden}
        block = self.blocks[i]
        return functional_call(block, dict(instead), args, kwargs) if instead else block(*args, **kwargs)

    def run(self, i: int, hidden: Tensor, calls: Calls, instead: Mapping[str, Tensor] | None = None) -> Tensor:
        """Block i's answer to a hidden state [batch, ..., width], of the same shape, with the other arguments the model
        gave it.

        `instead`: tensors in the places of parameters, by their names in the block.
        """
        args, kwargs = calls.arguments[i]
        output = self._called(i, hidden.to(self.device), _fresh(args), _fresh(kwargs), instead)
        return output if isinstance(output, Tensor) else output[0]

    def _compare(self, batch: Batch) -> None:
        """Raises ChainError unless block by block the model's output is what its own forward gives; all of it has to be
        in memory.
        """
        calls = self.capture([batch])[0]
        with torch.no_grad():
            hidden = calls.hidden
            for i in range(len(self)):
                hidden = self.run(i, hidden, calls)
            own = [y for y in tensors_in(self.tail(hidden, batch)) if y.is_floating_point()]
            whole = [y for y in tensors_in(call(self.model, to_device(batch, self.device))) if y.is_floating_point()]
        if len(own) != len(whole) or any(not _close(y, z) for y, z in zip(own, whole, strict=True)):
            raise self._refused("block by block its output is another than its own")

    def front(self, batch: Batch) -> Tensor:
        """The first block's hidden state, with the graph of what lies before the chain; that must be held. Nothing
        behind it is computed.
        """
        notes: list[_BlockCall] = []

        def reached(_: Tensor) -> Any:
            raise _Reached

        with self._stands(notes, reached), suppress(_Reached):
            call(self.model, to_device(batch, self.device))
        return notes[0].hidden

    def tail(self, hidden: Tensor, batch: Batch) -> Any:
        """The model's output, given the last block's answer [batch, ..., width]; what lies outside the chain must be
        held."""
        final = hidden.to(self.device)
        with self._stands([], lambda _: self._formed(final)):
            return call(self.model, to_device(batch, self.device))


def _close(y: Tensor, z: Tensor) -> bool:
    """Whether two outputs differ by no more than the order of their sums may, as a share of their size."""
    if y.shape != z.shape:
        return False
    share = 1e-3 if y.dtype in (torch.float32, torch.float64) else 3e-2
    y, z = y.double().nan_to_num(), z.double().nan_to_num()
    return float((y - z).norm()) <= share * float(z.norm())


def open_chain(residency: Residency, path: str | None, batch: Batch | None) -> tuple[BlockModel | None, str]:
    """The model's chain of blocks, or None where it has no list of blocks, or (with the reason) a run on `batch` shows
    that they form no chain.

    Of a model in memory the output is compared as well: a forward pass of the model, and one of its blocks.
    """
    if path is None:
        return None, ""
    blocks = BlockModel(residency, path)
    if batch is not None:
        try:
            blocks.check(batch, compare=residency.whole)
        except ChainError as error:
            return None, str(error)
    return blocks, ""
