"""One part of a model in memory at a time: the tensors of a block come from a provider when it is held and go when it
is let go.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError
from laconic.weights.demands import Demands, set_demands


class Provider(Protocol):
    """Hands out a model's parameters and buffers by the names the module has for them."""

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Those of the names that are stored, decoded, as tensors that outlive the call."""

    def nbytes(self, name: str) -> int:
        """Bytes the parameter takes on disk."""

    def demands(self, name: str) -> Demands | None:
        """What the layer of a parameter is to do with its inputs and outputs, made anew; None for nothing."""


class Residence:
    """Brings parts of a skeleton into memory from a provider, in one dtype on one device, and drops them again.

    A layer rounds its inputs and adds an output bias, if its weight asks for it, as long as the weight is held.
    With dtype None tensors keep their stored type and stay on the disk's pages: right for methods that only read them.
    """

    whole = False

    def __init__(
        self, model: nn.Module, provider: Provider, chain: str | None, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.model, self.provider, self.chain, self.dtype, self.device = model, provider, chain, dtype, device
        self.users: dict[int, list[tuple[nn.Module, str, str]]] = {}
        # a module in two blocks has to be there for both
        for path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    self.users.setdefault(id(tensor), []).append((module, name, f"{path}.{name}" if path else name))
        self._meta = {names[0][2]: nn.Parameter(_as_meta(names), requires_grad=False) for names in self.users.values()}
        self._ties = list(self.users.values())
        self._held: dict[str, int] = {}
        self._brought: dict[str, list[int]] = {}
        self._uses = [0] * len(self._ties)
        for users in self._ties:
            self._put(users, self._meta[users[0][2]])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    def _inside(self, name: str, path: str) -> bool:
        if path:
            return name.startswith(path + ".")
        return self.chain is None or not name.startswith(self.chain + ".")

    def _put(self, users: list[tuple[nn.Module, str, str]], tensor: nn.Parameter) -> None:
        for module, name, _ in users:
            module._parameters[name] = tensor

    @contextmanager
    def hold(self, path: str, *, head: bool = True) -> Iterator[None]:
        """The parameters below `path` ("" for all outside the chain) are in memory inside this context; it nests.

        `head=False` leaves out the output head, unless it is tied: it can be the largest tensor, and nothing before the
        chain reads it.
        """
        if not self._held.get(path):
            self._brought[path] = self._load(path, () if head else self._untied_head())
        self._held[path] = self._held.get(path, 0) + 1
        try:
            yield
        finally:
            self._held[path] -= 1
            if not self._held[path]:
                self._drop(self._brought.pop(path))

    def _drop(self, brought: list[int]) -> None:
        """Let go of some ties, each when nothing else that is held uses it."""
        for i in brought:
            self._uses[i] -= 1
            if not self._uses[i]:
                users = self._ties[i]
                self._put(users, self._meta[users[0][2]])
                for module, _, _ in users:
                    set_demands(module, None)

    def _untied_head(self) -> set[str]:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return {users[0][2] for users in self._ties if len(users) == 1 and users[0][0] is head}

    def keep_all(self, skip: Collection[str] = ()) -> None:
        """Bring everything into memory for good, but for the parameters named in `skip`."""
        self._load("", skip)

    def _load(self, path: str, skip: Collection[str] = ()) -> list[int]:
        """Bring what lies below `path` into memory, a tensor at a time; returns which ties it is of."""
        brought: list[int] = []
        try:
            for i, users in enumerate(self._ties):
                names = [name for _, _, name in users]
                if any(self._inside(name, path) for name in names) and not any(name in skip for name in names):
                    if not self._uses[i]:
                        self._bring(users, names)
                    self._uses[i] += 1
                    brought.append(i)
        except BaseException:
            self._drop(brought)
            raise
        buffers: dict[int, tuple[Tensor, list[str]]] = {}
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            buffers.setdefault(id(buffer), (buffer, []))[1].append(name)
        inside = [
            (buffer, names) for buffer, names in buffers.values() if any(self._inside(name, path) for name in names)
        ]
        stored = self.provider.read([name for _, names in inside for name in names]) if inside else {}
        for buffer, names in inside:
            found = next((name for name in names if name in stored), None)
            if found is not None:
                buffer.data.copy_(stored[found])
        return brought

    def _bring(self, users: list[tuple[nn.Module, str, str]], names: list[str]) -> None:
        """One tensor from the provider: a decoded one and its copy in the computing type need not stand beside all
        others.
        """
        found = self.provider.read(names)
        name = next((name for name in names if name in found), None)
        if name is None:
            raise CheckpointError(f"{names[0]}: not stored")
        tensor, expected = found[name], tuple(self._meta[names[0]].shape)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{name}: stored with shape {tuple(tensor.shape)}, the config asks for {expected}")
        held = tensor.to(self.device) if self.dtype is None else tensor.to(self.device, self.dtype, copy=True)
        self._put(users, nn.Parameter(held, requires_grad=False))
        for module, _, _ in users:
            if (demands := self.provider.demands(name)) is not None:
                set_demands(module, demands.to(self.device))


def _as_meta(users: list[tuple[nn.Module, str, str]]) -> Tensor:
    tensor = users[0][0]._parameters[users[0][1]]
    assert tensor is not None
    return torch.empty(tensor.shape, device="meta")
