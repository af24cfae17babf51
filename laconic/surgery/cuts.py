"""One pass in which the autograd graph is cut behind every layer and every norm: what is between two cuts can be
measured by itself.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from laconic.model.products import PRODUCTS
from laconic.model.sites import Slot, find_slots
from laconic.surgery.ports import Conv, Norm
from laconic.surgery.verify import apart, flat

TOLERANCE = 1e-5  # relative, in float32: rounding was seen to stay below 1e-6, wrong channels are off by far more
_EXPONENTS = (-4.0, 8.0)  # of two: activations bend near 1 (GELU), clip at 6 (ReLU6) or at some dozens (caps by tanh)


@dataclass(frozen=True, eq=False)
class Feeder:
    """What can be scaled channel by channel: the parameters `names` of the module at `path`. `channels`: how many.

    `slot`: the site whose rows they are, in every one of its groups; None for a norm, which multiplies by `offset` +
    its first parameter.
    """

    path: str
    names: tuple[str, ...]
    channels: int
    slot: Slot | None = None
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Leaf:
    """What a source gave in one call, replaced by random values: where the autograd graph is cut. Channels lie along
    `axis`.
    """

    source: Feeder | None
    value: Tensor
    axis: int
    group: int | None = None


@dataclass(frozen=True, eq=False)
class GraphEnd:
    """Where a part of the graph ends: what a site multiplied, a norm's input, or the model's output. `slot`: a site
    that can be followed.
    """

    name: str
    tensor: Tensor
    slot: Slot | None = None
    axis: int = -1
    group: int | None = None


def source_of(network: nn.Module, slot: Slot) -> Feeder | None:
    """The rows of a site, with the bias that its product adds; None for embeddings and ties."""
    path, name = slot.users[0]
    module = network.get_submodule(path)
    if slot.role == "embedding" or len(slot.users) > 1:
        return None
    biased = isinstance(module, nn.Linear | Conv | Conv1D) and module.bias is not None
    rows = slot.rows // slot.groups if slot.view.lead == 2 else slot.rows
    return Feeder(path, (name, "bias") if biased else (name,), rows, slot)


class Cuts(TorchFunctionMode):
    """Watches one pass and cuts the graph behind every product with a site and every norm.

    Behind a cut the model goes on with random values, small and large, positive and negative in every channel: no
    activation hides a channel, and none looks linear that bends or clips somewhere. `leaves` are the cuts, `ends` what
    lies before them, `readers` the modules that read what a source gave and are no sites.
    """

    def __init__(self, network: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.network, self.generator, self.quiet = network, generator, False
        self.sites: dict[int, tuple[Slot, Tensor, Feeder | None]] = {}
        for slot in find_slots(network):
            path, name = slot.users[0]
            parameter = network.get_submodule(path).get_parameter(name)
            self.sites[parameter.untyped_storage().data_ptr()] = slot, parameter, source_of(network, slot)
        self.norms: dict[str, Feeder | None] = {}
        self.stack: list[str] = [""]
        self.leaves: dict[int, Leaf] = {}
        self.ends: list[GraphEnd] = []
        self.readers: dict[Feeder, list[str]] = {}
        self._given: dict[int, tuple[Feeder, Tensor]] = {}  # by storage; kept alive, so that no other tensor gets it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.quiet:
            return output
        read = PRODUCTS.get(func)
        if read is not None and output.numel():
            x, w, extra = read(*args, **kwargs)
            found = self.sites.get(w.untyped_storage().data_ptr()) if isinstance(w, Tensor) else None
            if found is not None and extra != "lookup":
                return self._product(*found, x, w, -1 if extra is None else 1 - w.dim(), output)
        self._note_readers((args, kwargs), output)
        return output

    def _product(
        self, slot: Slot, parameter: Tensor, source: Feeder | None, x: Tensor, w: Tensor, axis: int, output: Tensor
    ) -> Tensor:
        """Note the end before a product and cut behind it; sites that only a slice was used of, and grouped
        convolutions, are not followed.
        """
        packed, whole = slot.view.lead == 2, w.numel() == parameter.numel()
        group = None if whole else int((w.storage_offset() - parameter.storage_offset()) // parameter.stride(0))
        kernel = w[0, 0].numel() if axis != -1 else 1
        followed = (
            (whole or packed)
            and (slot.groups == 1 or packed)
            and slot.role != "embedding"
            and x.shape[axis] * kernel == slot.columns
        )
        self.ends.append(GraphEnd(slot.name, x, slot if followed else None, axis, group))
        scaled = source is not None and (whole or packed) and output.shape[axis] == source.channels
        return self._cut(source if scaled else None, output, axis, group)

    def _cut(self, source: Feeder | None, output: Tensor, axis: int, group: int | None = None) -> Tensor:
        values = torch.exp2(torch.empty(output.shape).uniform_(*_EXPONENTS, generator=self.generator))
        places = sum(torch.arange(n).reshape(-1, *(1,) * (output.dim() - 1 - i)) for i, n in enumerate(output.shape))
        leaf = Leaf(source, (values * (1 - 2 * (places % 2))).to(output.dtype).requires_grad_(), axis, group)
        self.leaves[id(leaf.value)] = leaf
        made = leaf.value.clone()  # what follows may change it in place
        if source is not None:
            self._given[made.untyped_storage().data_ptr()] = source, made
        return made

    def _note_readers(self, given: Any, output: Any) -> None:
        """Note the present module as a reader of the sources whose tensors an operation took, unless it made a view of
        them.
        """
        views = {tensor.untyped_storage().data_ptr() for tensor in flat(output)}
        for tensor in flat(given) if views else ():
            place = tensor.untyped_storage().data_ptr()
            if place in self._given and place not in views:
                known = self.readers.setdefault(self._given[place][0], [])
                if self.stack[-1] not in known:
                    known.append(self.stack[-1])

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """Cut behind a module that is a norm."""
        if self.quiet:
            return None
        self.stack.pop()
        self.quiet = True
        try:
            if path not in self.norms:
                self.norms[path] = norm_of(
                    path, module, args=args, kwargs=kwargs, output=output, generator=self.generator
                )
            source = self.norms[path]
            if source is None:
                return None
            self.ends += [GraphEnd(path, tensor) for tensor in flat((args, kwargs))]
            return self._cut(source, output, _axis(module, output))
        finally:
            self.quiet = False

    def _enter(self, path: str) -> None:
        if not self.quiet:
            self.stack.append(path)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The mode and the hooks, for one forward pass."""
        with ExitStack() as undo:
            for path, module in self.network.named_modules():
                enter = module.register_forward_pre_hook(lambda _, __, p=path: self._enter(p))
                leave = module.register_forward_hook(
                    lambda m, a, k, o, p=path: self._leave(p, m, a, k, o), with_kwargs=True
                )
                undo.callback(enter.remove)
                undo.callback(leave.remove)
            undo.enter_context(self)
            yield

    def behind(self, tensor: Tensor) -> list[Leaf]:
        """The leaves a tensor of any shape was made of."""
        found: dict[int, Leaf] = {}
        seen: set[Any] = set()
        todo = [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            # autograd's own leaves; the nodes have no common class to test for
            leaf = self.leaves.get(id(getattr(node, "variable", None)))
            if leaf is not None:
                found[id(leaf)] = leaf
            todo += [before for before, _ in node.next_functions]
        return list(found.values())


def norm_of(
    path: str, module: nn.Module, args: Any, kwargs: Any, output: Any, generator: torch.Generator
) -> Feeder | None:
    """The module as a source, if it has nothing but one or two vectors, and scaling these scales what it gives, channel
    by channel.
    """
    vectors = dict(module.named_parameters(recurse=False))
    sizes = {tuple(vector.shape) for vector in vectors.values()}
    if (
        any(module.children())
        or not 1 <= len(vectors) <= 2
        or len(sizes) != 1
        or len(next(iter(sizes))) != 1
        or not isinstance(output, Tensor)
    ):
        return None
    ((channels,),) = sizes
    axis = _axis(module, output)
    if channels < 2 or output.dim() < -axis or output.shape[axis] != channels:
        return None
    names = sorted(vectors, key=lambda name: name != "weight")
    t = factors(channels, generator)
    expected = (output.detach().movedim(axis, -1) * t).movedim(-1, axis)
    for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        changed = {name: vector * t for name, vector in vectors.items()}
        changed[names[0]] = (vectors[names[0]] + offset) * t - offset
        if apart([expected], [functional_call(module, changed, args, kwargs).detach()]) <= TOLERANCE:
            return Feeder(path, tuple(names), channels, offset=offset)
    return None


def _axis(module: nn.Module, output: Any) -> int:
    return 1 - output.dim() if isinstance(module, Norm | nn.GroupNorm) and isinstance(output, Tensor) else -1


def factors(channels: int, generator: torch.Generator) -> Tensor:
    """Random factors [channels], 2^-4 to 2^4 and never 1: any float is multiplied by them exactly, so that what is
    right changes nothing.
    """
    exponents = torch.tensor([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0])
    return torch.exp2(exponents[torch.randint(len(exponents), (channels,), generator=generator)])
