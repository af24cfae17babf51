"""What each part of a model is trained to match: what the original answers there, given what the compressed prefix
hands on or the original's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laconic.engine.losses import default_probe
from laconic.engine.shelf import Shelf
from laconic.engine.walk import forward, inside, units
from laconic.errors import RecoveryError
from laconic.model.batches import Batch, mapped, tensors_in, to_device
from laconic.model.blocks import BlockModel, Calls, find_chain
from laconic.model.calling import call
from laconic.model.gradients import asking_gradients
from laconic.model.sites import Slot
from laconic.recover.fisher import gradients_behind, weighed

Target = Literal["original", "compressed"]
Per = Literal["block", "layer"]
Answer = Callable[[int], Any]
"""Runs the module under watch, or what holds it, on minibatch k."""


@dataclass
class Part:
    """A part of the compressed model that is trained for itself, the original's answers, and how much each of them
    counts.

    `targets` and `importance` [examples, ..., width] by minibatch; importance is the squared gradient of the original's
    loss in its answer, over its mean. `run(k, instead)` is the part's answer to the input it has in the compressed
    model in minibatch k, with tensors in the places of parameters by their names in the part.
    """

    path: str
    module: nn.Module
    targets: list[Tensor]
    importance: list[Tensor] | None
    run: Callable[[int, Mapping[str, Tensor]], Tensor]


def count_parts(model: nn.Module, slots: Sequence[Slot], per: Per) -> int:
    """How many parts a model has, as far as its structure says: what only a run shows (no chain, a layer called twice)
    can make them fewer.
    """
    if per == "layer":
        return len({slot.users[0][0] for slot in slots})
    chain = find_chain(model)
    return len(list(model.get_submodule(chain).children())) if chain is not None else len(units(model, slots))


@dataclass(frozen=True)
class Matched:
    """What parts are: `per` block of the chain or per layer; which `target` they have; and whether answers count by
    `fisher` information.
    """

    per: Per = "block"
    target: Target = "original"
    fisher: bool = False
    seed: int = 0


def chain_parts(
    original: BlockModel,
    compressed: BlockModel,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    how: Matched,
    *,
    shelf: Shelf | None = None,
    done: int = 0,
) -> Iterator[Part]:
    """The blocks of a chain from the first to the last, or their layers; each sees what was made of those before it.

    Nothing is yielded for the first `done` parts, which are run as they are. One block of either model is held at a
    time; what passes between blocks is kept in memory, and on the `shelf`, from which a resumed walk takes it. With
    Fisher information the original runs once more, backwards.
    """
    shelf = shelf or Shelf()
    theirs, ours = original.capture(batches), compressed.capture(batches)
    gradients = gradients_behind(original, theirs, batches, how.seed, shelf) if how.fisher else None
    true, states = [c.hidden for c in theirs], [c.hidden for c in ours]
    for i in range(len(original)):
        path = original.block_path(i)
        with original.residency.hold(path), compressed.residency.hold(path):
            answers = forward(original, i, true, theirs)
            behind = gradients(i) if gradients is not None else None
            if how.per == "layer":
                names = _names(original, i, true, theirs, slots)
                parts = _layers(original, compressed, i, names[done:], (true, states), (theirs, ours), behind, how)
                count = len(names)
            else:
                count = 1
                parts = iter([] if done else [_block(original, compressed, i, states, ours, answers, behind, how)])
            yield from parts
            done = max(0, done - count)
            true, states = answers, forward(compressed, i, states, ours)


def _block(
    original: BlockModel,
    compressed: BlockModel,
    i: int,
    states: list[Tensor],
    calls: list[Calls],
    answers: list[Tensor],
    gradients: list[Tensor] | None,
    how: Matched,
) -> Part:
    """Block i as a whole. Its `states` are the compressed prefix's."""

    def run(k: int, instead: Mapping[str, Tensor]) -> Tensor:
        return compressed.run(i, states[k], calls[k], instead)

    targets = answers if how.target == "original" else forward(original, i, states, calls)
    return Part(original.block_path(i), compressed.blocks[i], targets, weighed(gradients), run)


def _layers(
    original: BlockModel,
    compressed: BlockModel,
    i: int,
    names: Sequence[str],
    states: tuple[list[Tensor], list[Tensor]],
    calls: tuple[list[Calls], list[Calls]],
    gradients: list[Tensor] | None,
    how: Matched,
) -> Iterator[Part]:
    """Layers of block i, by their names in it. `states` and `calls`: the original's, and the compressed prefix's."""
    path = original.block_path(i)
    count = len(states[0])

    def theirs(k: int) -> Any:
        return original.run(i, states[0][k], calls[0][k])

    def ours(k: int) -> Any:
        return compressed.run(i, states[1][k], calls[1][k])

    def backward(k: int, output: Tensor) -> None:
        assert gradients is not None
        output.backward(gradients[k].to(output))

    for name in names:
        pair = original.blocks[i].get_submodule(name), compressed.blocks[i].get_submodule(name)
        found = _watched(*pair, theirs, ours, count, how, backward if gradients is not None else None)
        yield Part(f"{path}.{name}" if name else path, pair[1], *found)


def _names(model: BlockModel, i: int, states: list[Tensor], calls: list[Calls], slots: Sequence[Slot]) -> list[str]:
    """The layers of block i that hold sites, in module order, by their names in it."""
    path = model.block_path(i)
    found = {slot.users[0][0].removeprefix(path).lstrip("."): None for slot in slots if inside(slot, path)}
    return _called_once(model.blocks[i], list(found), lambda: model.run(i, states[0], calls[0]))


def whole_parts(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Batch],
    slots: Sequence[Slot],
    how: Matched,
    *,
    done: int = 0,
) -> Iterator[Part]:
    """The parts of a model that is no chain: the elements of its containers (or the layers) that are called once per
    pass, in module order.

    What is called more often, or not as a module, is trained with the smallest part around it that is; in the end that
    is the whole model. Both models run once per part. The first `done` parts are left out.
    """
    device = next(original.parameters()).device

    def runs(model: nn.Module) -> Answer:
        return lambda k: call(model, to_device(batches[k], device))

    def probe() -> Callable[[int, Any], None]:  # each part sees the same labels drawn, also in a run that is resumed
        generator = torch.Generator().manual_seed(how.seed)
        return lambda k, output: default_probe(output, batches[k], generator).backward()

    wanted = [path for path, _ in units(compressed, slots)]
    if how.per == "layer":
        wanted = list(dict.fromkeys(slot.users[0][0] for slot in slots))
    for path in _called_once(original, wanted, lambda: runs(original)(0))[done:]:
        pair = original.get_submodule(path), compressed.get_submodule(path)
        found = _watched(*pair, runs(original), runs(compressed), len(batches), how, probe() if how.fisher else None)
        yield Part(path, pair[1], *found)


def _watched(
    original: nn.Module,
    compressed: nn.Module,
    theirs: Answer,
    ours: Answer,
    count: int,
    how: Matched,
    backward: Callable[[int, Any], None] | None,
) -> tuple[list[Tensor], list[Tensor] | None, Callable[[int, Mapping[str, Tensor]], Tensor]]:
    """Targets, importance and `run` of a module that is called once whenever `theirs(k)` (or, in the compressed model,
    `ours(k)`) is.
    """
    _, answers, gradients = _seen(original, theirs, count, backward)
    given, _, _ = _seen(compressed, ours, count)
    device = next((p.device for p in compressed.parameters()), torch.device("cpu"))
    if how.target == "compressed":
        with torch.no_grad():
            answers = [_first(original(*a, **n)).cpu() for a, n in (to_device(pair, device) for pair in given)]

    def run(k: int, instead: Mapping[str, Tensor]) -> Tensor:
        args, named = to_device(given[k], device)
        return _first(functional_call(compressed, dict(instead), args, named))

    return answers, weighed(gradients), run


Given = tuple[tuple[Any, ...], dict[str, Any]]


def _seen(
    module: nn.Module, run: Answer, count: int, backward: Callable[[int, Any], None] | None = None
) -> tuple[list[Given], list[Tensor], list[Tensor] | None]:
    """What a module is given and answers in `count` minibatches, as copies on the CPU; with `backward`, also the
    gradients in its answers.
    """
    given: list[Given] = []
    answers: list[Tensor] = []
    gradients: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append(mapped((args, named), lambda tensor: tensor.detach().cpu().clone()))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        answer = _first(output)
        answers.append(answer.detach().cpu().clone())
        if backward is not None:
            answer.register_hook(lambda gradient: gradients.append(gradient.detach().cpu().clone()))

    # what rounds the module's inputs does so after this, and again when the module is run on what is noted here
    handles = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        for k in range(count):
            if backward is None:
                with torch.no_grad():
                    run(k)
            else:
                with torch.enable_grad(), asking_gradients(module.parameters()):
                    backward(k, run(k))
    finally:
        for handle in handles:
            handle.remove()
    return given, answers, gradients if backward is not None else None


def _called_once(root: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> list[str]:
    """The innermost modules around these paths that one run calls once and that answer with a tensor; in module order,
    none inside another.
    """
    calls: dict[str, int] = {}

    def counted(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + (1 if _tensors(output) else 2)

        return note

    handles = [module.register_forward_hook(counted(name)) for name, module in root.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, None] = {}
    for path in paths:
        name = path
        while name and calls.get(name) != 1:
            name = name.rpartition(".")[0]
        found[name] = None
    if "" in found:
        return [""]
    order = {name: n for n, (name, _) in enumerate(root.named_modules())}
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    return sorted(outermost, key=order.__getitem__)


def _tensors(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _first(output: Any) -> Tensor:
    """What is compared of a module's answer: its logits, or its first float tensor.
    Raises: RecoveryError where it has none.
    """
    logits = getattr(output, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else _tensors(output)
    if not found:
        raise RecoveryError(f"expected a module that answers with a tensor of floats, got a {type(output).__name__}")
    return found[0]
