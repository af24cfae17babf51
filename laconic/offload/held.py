"""What stands for a saved tensor: a reference, a stretch of bytes, or a table with an index list; and how each becomes
the tensor again.
"""

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# bytes; a rebuilt tensor starts where the original did, modulo this, so that vectorised kernels add in the same order
ALIGN = 64
CHUNK = 1 << 22  # elements converted at a time


@dataclass
class Saved:
    """What autograd saved inside `offload_saved`, and what is held for it. Bytes, exact; `alive_bytes` falls when a
    graph is freed.
    """

    saves: int = 0  # tensors saved
    hits: int = 0  # of these, found in a storage that was held already
    kept: int = 0  # of these, in a storage of `keep`
    maps: int = 0  # storages held as table and index list
    shards: int = 0  # storages of which this learner holds its share
    odd: int = 0  # tensors that are no plain strided tensors; held as they are
    saved_bytes: int = 0  # all tensors, each on its own: what offloading without any technique holds
    kept_bytes: int = 0  # of these, in storages of `keep`: not held, they are there anyway
    copied_bytes: int = 0  # copied into what is held, over the whole time
    alive_bytes: int = 0  # held now
    peak_bytes: int = 0  # the most that was held at one time

    def hold(self, owner: object, count: int) -> None:
        """Count bytes as held until `owner` dies."""
        self.alive_bytes += count
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(owner, self._release, count).atexit = False

    def _release(self, count: int) -> None:
        self.alive_bytes -= count


class Layout(NamedTuple):
    """How a tensor lies in its storage: bytes [start, stop), and what as_strided needs."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, t: Tensor) -> "Layout":
        stride = tuple(int(step) for step in t.stride())
        start = int(t.storage_offset()) * t.element_size()
        reach = sum((size - 1) * step for size, step in zip(t.size(), stride, strict=True)) + 1
        return cls(t.dtype, t.size(), stride, start, start + reach * t.element_size())

    @property
    def entries(self) -> int:
        """The entries of the stretch, those in gaps between the tensor's own too."""
        return (self.stop - self.start) // self.dtype.itemsize

    def on(self, flat: Tensor, at: int) -> Tensor:
        """The view, of its own shape, over bytes `flat` [n], which begin at byte `at` of the storage that the view is
        of."""
        offset = flat.storage_offset() + self.start - at
        empty = torch.empty(0, dtype=self.dtype, device=flat.device)
        return empty.set_(flat.untyped_storage(), offset // self.dtype.itemsize, self.size, self.stride)


@dataclass(eq=False)
class Alias:
    """A tensor that is held by reference; `owner` stands for its storage where that is counted."""

    tensor: Tensor
    version: int
    owner: object = None

    def restore(self) -> Tensor:
        """Raises: RuntimeError when the tensor was changed since it was saved."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


class Owner:
    """Stands for a storage that is held by reference."""


class Bytes:
    """The bytes `flat` on the CPU, `lead` bytes into a storage of their own; or this learner's share of them."""

    def __init__(
        self, flat: Tensor, lead: int, group: "dist.ProcessGroup | None", saved: Saved, *, pinned: bool
    ) -> None:
        self.length, self.group, self.device, self.lead = flat.numel(), group, flat.device, lead
        if group is not None:
            self.share = -(-self.length // dist.get_world_size(group))
            flat, self.lead = flat[self.share * dist.get_rank(group) :][: self.share], 0
        self.held = torch.empty(self.lead + flat.numel(), dtype=torch.uint8, pin_memory=pinned)
        self.held[self.lead :].copy_(flat, non_blocking=pinned)
        saved.hold(self, self.held.numel())
        saved.copied_bytes += flat.numel()

    def whole(self) -> Tensor:
        """All of the bytes, on the device they came from. Collective if they are shared."""
        if self.group is None:
            return self.held.to(self.device, non_blocking=self.held.is_pinned())[self.lead :]
        own = torch.zeros(self.share, dtype=torch.uint8, device=self.device)
        own[: self.held.numel()] = self.held.to(self.device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)[: self.length]


@dataclass(eq=False)
class Whole:
    """A stretch of a storage, byte for byte; or the entries of a tensor with gaps, in order."""

    content: Bytes
    gapped: Layout | None = None

    def restore(self, lead: int) -> Tensor:
        """The stretch, `lead` bytes behind an aligned address."""
        flat = self.content.whole()
        if self.gapped is not None:
            filled = _room(lead, self.gapped.stop - self.gapped.start, flat.device)
            self.gapped.on(filled, self.gapped.start).copy_(flat.view(self.gapped.dtype).view(self.gapped.size))
            return filled
        return flat if flat.storage_offset() % ALIGN == lead else _room(lead, flat.numel(), flat.device).copy_(flat)


@dataclass(eq=False)
class Map:
    """Rows [a, n, b] as a table [a, distinct, b] and the index list of the weight."""

    table: Bytes
    index: Bytes
    shape: tuple[int, int, int]
    dtype: torch.dtype  # an integer type as wide as an entry

    def restore(self, lead: int) -> Tensor:
        """The rows as bytes, `lead` bytes behind an aligned address."""
        a, n, b = self.shape
        index, table = self.index.whole().view(torch.uint16), self.table.whole().view(self.dtype).view(a, -1, b)
        flat = _room(lead, a * n * b * self.dtype.itemsize, table.device)
        rows = Layout(self.dtype, torch.Size(self.shape), (n * b, b, 1), 0, flat.numel()).on(flat, 0)
        for begin in range(0, n, CHUNK):
            rows[:, begin : begin + CHUNK] = table.index_select(1, index[begin : begin + CHUNK].to(torch.int32))
        return flat


def _room(lead: int, length: int, device: torch.device) -> Tensor:
    """Bytes [length], `lead` bytes behind an aligned address."""
    return torch.empty(lead + length, dtype=torch.uint8, device=device)[lead:]


class Piece:
    """A stretch of a storage that is held, at one version of it. While what was rebuilt of it is in use, it is rebuilt
    `once`.
    """

    def __init__(self, start: int, stop: int, content: Whole | Map, *, once: bool) -> None:
        self.start, self.stop, self.content, self.once = start, stop, content, once
        self.rebuilt: weakref.ref[Any] | None = None
        self.offset = 0

    def covers(self, view: Layout) -> bool:
        """Whether a tensor that lies so can be read off this piece."""
        if isinstance(self.content, Whole) and self.content.gapped is not None:
            return view == self.content.gapped
        return (
            self.start <= view.start and view.stop <= self.stop and (view.start - self.start) % view.dtype.itemsize == 0
        )

    def restore(self, view: Layout) -> Tensor:
        storage = self.rebuilt() if self.rebuilt is not None else None
        if storage is None:
            flat = self.content.restore(self.start % ALIGN)
            storage, self.offset = flat.untyped_storage(), int(flat.storage_offset())
            if self.once:
                self.rebuilt = weakref.ref(storage)
        else:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
                storage, self.offset, (self.stop - self.start,), (1,)
            )
        return view.on(flat, self.start)


class Held(NamedTuple):
    """A saved tensor whose values are in a piece."""

    piece: Piece
    view: Layout

    def restore(self) -> Tensor:
        return self.piece.restore(self.view)
