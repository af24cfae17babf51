"""Tensors that autograd saves for backward, held in as few bytes as they take: on the CPU, each storage once, row maps as tables, shared out.

Three techniques, each switchable (Source: eDKM, Cho et al. 2023, section 2): marshaling (M), uniquification (U), sharding (S).
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laconic.errors import SchemeError

_ALIGN = 64  # bytes; a rebuilt tensor starts where the original did, modulo this, so that vectorised kernels add in the same order
_CHUNK = 1 << 22  # elements converted at a time
_PAIRS = 4096  # pairs of equal weights that a tensor must agree on before all its rows are compared
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Saved:
    """What autograd saved inside `offload_saved`, and what is held for it. Bytes, exact; an `alive` figure falls when a graph is freed."""

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


@contextmanager
def offload_saved(
    *,
    marshal: bool = True,
    weights: Sequence[Tensor] = (),
    unique: bool = False,
    shard: "dist.ProcessGroup | None" = None,
    keep: nn.Module | Iterable[Tensor] = (),
    copy: bool | None = None,
    pinned: bool = False,
) -> Iterator[Saved]:
    """Inside, what autograd saves for backward is held on the CPU in fewer bytes; gradients stay bit-equal. For any training loop.

        with offload_saved(keep=model) as saved:
            loss = model(batch).sum()
        loss.backward()                      # may be inside or outside
        print(saved.peak_bytes)

    **What is held.** A tensor of another device is copied to the CPU. A tensor of the CPU is held by reference, as autograd does, and
    counts with its whole storage. `copy=True` copies it too, so that the CPU stands for a second device; without `marshal` every tensor
    is copied (eDKM's baseline). Tensors in storages of `keep` (a module: its parameters and buffers), views among them, are never copied
    and not counted as held. Sparse, conjugated and subclassed tensors are held as they are.

    **marshal (M).** A tensor in a storage that is there already is held as (reference, dtype, offset, size, stride). The paper walks the
    forward graph from the new tensor over at most 4 view-like operations to find one that was copied. Two tensors that such a walk
    connects share their storage; here the storage itself is looked up, together with its version and the stretch of it that was copied.
    That finds all that a walk of any length finds, tensors without a graph too, at the cost of one look-up; so there is no hop limit. A
    storage that was written to in between is copied again. Storages are told apart by identity while they live, never by address alone.

    **unique (U).** A tensor of which, for one of the 16-bit `weights` [n], n rows are equal wherever the weights are (an attention map
    [n, |C|], a distance [n, 1], a transposed map [|C|, n]) is held as a table [distinct weights, ...] and the weight's index list, uint16
    [n], which all its tables share. Every row is compared when it is packed; a tensor with one row that differs is held dense.

    **shard (S).** Of such row maps every learner of the process group holds 1/learners of the table and of the index list (of the dense
    map without `unique`) and gathers the rest when backward asks for it. Learners agree on a checksum first: what is not the same on all
    of them is not sharded. All must run the same program on the same weights (the paper's synchronous training); backward is collective.

    `weights` are the rows' weights for U and S. While the context lasts, 4 bytes per entry of the last weight packed are in use besides.

    In-place changes: what is held by reference is checked when it is unpacked and raises RuntimeError if it was changed, as autograd
    does. A copy cannot be spoilt: the gradient is that of the values at the time they were saved, where autograd would refuse. Writing
    through `.data` between two saves of a storage is not seen.

    Contexts nest; the innermost one applies. Raises: SchemeError. Cost: M a look-up per tensor; U two passes over it. Source: eDKM,
    section 2.1, table 1, figure 2 (M); section 2.2, figure 3 (U, S).
    """
    for weight in weights:
        if weight.element_size() != 2 or weight.is_sparse:
            raise SchemeError(f"weights: expected dense tensors of 16 bits, got {weight.dtype} {tuple(weight.shape)}")
    if (unique or shard is not None) and not weights:
        raise SchemeError("unique and shard need weights=[...], the 16-bit weights whose attention maps are packed")
    if weights and not (unique or shard is not None):
        raise SchemeError("weights are given, but neither unique=True nor shard=group says what to do with them")
    if pinned and not torch.cuda.is_available():
        raise SchemeError("pinned=True needs a CUDA device, and there is none here")
    stay = [*keep.parameters(), *keep.buffers()] if isinstance(keep, nn.Module) else list(keep)
    saved = Saved()
    kept = {id(t.untyped_storage()): t.untyped_storage() for t in stay}
    packer = _Packer(saved, marshal, [_Weight(w.detach()) for w in weights], unique, shard, kept, copy, pinned)
    try:
        with torch.autograd.graph.saved_tensors_hooks(packer.pack, packer.unpack):
            yield saved
    finally:
        packer.close()


class _View(NamedTuple):
    """How a tensor lies in its storage: bytes [start, stop), and what as_strided needs."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    start: int
    stop: int

    @property
    def entries(self) -> int:
        return (self.stop - self.start) // self.dtype.itemsize

    def on(self, flat: Tensor, at: int) -> Tensor:
        """The view over bytes `flat`, which begin at byte `at` of the storage that the view is of."""
        offset = flat.storage_offset() + self.start - at
        empty = torch.empty(0, dtype=self.dtype, device=flat.device)
        return empty.set_(flat.untyped_storage(), offset // self.dtype.itemsize, self.size, self.stride)


def _view(t: Tensor) -> _View:
    stride = tuple(int(step) for step in t.stride())
    start = int(t.storage_offset()) * t.element_size()
    reach = sum((size - 1) * step for size, step in zip(t.size(), stride, strict=True)) + 1
    return _View(t.dtype, t.size(), stride, start, start + reach * t.element_size())


@dataclass(eq=False)
class _Alias:
    """A tensor that is held by reference; `owner` stands for its storage where that is counted."""

    tensor: Tensor
    version: int
    owner: object = None

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.tensor.dtype} {list(self.tensor.shape)} is at version {self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


class _Bytes:
    """Bytes on the CPU, or this learner's share of them. Shape [length], uint8."""

    def __init__(self, flat: Tensor, lead: int, packer: "_Packer", group: "dist.ProcessGroup | None") -> None:
        self.length, self.group, self.device, self.lead = flat.numel(), group, flat.device, lead
        if group is not None:
            self.share = -(-self.length // dist.get_world_size(group))
            flat, self.lead = flat[self.share * dist.get_rank(group) :][: self.share], 0
        self.held = torch.empty(self.lead + flat.numel(), dtype=torch.uint8, pin_memory=packer.pinned)
        self.held[self.lead :].copy_(flat, non_blocking=packer.pinned)
        packer.saved.hold(self, self.held.numel())
        packer.saved.copied_bytes += flat.numel()

    def whole(self) -> Tensor:
        """All of the bytes, on the device they came from."""
        if self.group is None:
            return self.held.to(self.device, non_blocking=self.held.is_pinned())[self.lead :]
        own = torch.zeros(self.share, dtype=torch.uint8, device=self.device)
        own[: self.held.numel()] = self.held.to(self.device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)[: self.length]


@dataclass(eq=False)
class _Dense:
    """A stretch of a storage, byte for byte; or the entries of a tensor with gaps, in order."""

    content: _Bytes
    gapped: _View | None = None

    def restore(self, lead: int) -> Tensor:
        flat = self.content.whole()
        if self.gapped is not None:
            filled = torch.empty(lead + self.gapped.stop - self.gapped.start, dtype=torch.uint8, device=flat.device)[lead:]
            self.gapped.on(filled, self.gapped.start).copy_(flat.view(self.gapped.dtype).view(self.gapped.size))
            return filled
        if flat.storage_offset() % _ALIGN == lead:
            return flat
        return torch.empty(lead + flat.numel(), dtype=torch.uint8, device=flat.device)[lead:].copy_(flat)


@dataclass(eq=False)
class _Map:
    """Rows [a, n, b] as a table [a, distinct, b] and the index list of the weight."""

    table: _Bytes
    index: _Bytes
    shape: tuple[int, int, int]
    dtype: torch.dtype  # an integer type as wide as an entry

    def restore(self, lead: int) -> Tensor:
        a, n, b = self.shape
        index, table = self.index.whole().view(torch.uint16), self.table.whole().view(self.dtype).view(a, -1, b)
        flat = torch.empty(lead + a * n * b * self.dtype.itemsize, dtype=torch.uint8, device=table.device)[lead:]
        rows = torch.empty(0, dtype=self.dtype, device=table.device).set_(
            flat.untyped_storage(), lead // self.dtype.itemsize, (a, n, b), (n * b, b, 1)
        )
        for begin in range(0, n, _CHUNK):
            rows[:, begin : begin + _CHUNK] = table.index_select(1, index[begin : begin + _CHUNK].to(torch.int32))
        return flat


class _Piece:
    """A stretch of a storage that is held, at one version of it. While what was rebuilt of it is in use, it is rebuilt once."""

    def __init__(self, start: int, stop: int, content: _Dense | _Map, *, once: bool) -> None:
        self.start, self.stop, self.content, self.once = start, stop, content, once
        self.rebuilt: weakref.ref[Any] | None = None
        self.offset = 0

    def covers(self, view: _View) -> bool:
        if isinstance(self.content, _Dense) and self.content.gapped is not None:
            return view == self.content.gapped
        return self.start <= view.start and view.stop <= self.stop and (view.start - self.start) % view.dtype.itemsize == 0

    def restore(self, view: _View) -> Tensor:
        storage = self.rebuilt() if self.rebuilt is not None else None
        if storage is None:
            flat = self.content.restore(self.start % _ALIGN)
            storage, self.offset = flat.untyped_storage(), int(flat.storage_offset())
            if self.once:
                self.rebuilt = weakref.ref(storage)
        else:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, self.offset, (self.stop - self.start,), (1,))
        return view.on(flat, self.start)


class _Held(NamedTuple):
    """A saved tensor whose values are in a piece."""

    piece: _Piece
    view: _View

    def restore(self) -> Tensor:
        return self.piece.restore(self.view)


class _Weight:
    """A 16-bit weight: which entries are equal, in memory at most one at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.n = weight, weight.numel()
        self.version = -1
        self.index: weakref.ref[_Bytes] | None = None  # the index list that is held, while it is

    def ranks(self) -> tuple[Tensor, Tensor]:
        """(index [n] int32 of each entry's distinct value, first [distinct] the position of one entry with that value)."""
        codes = torch.empty(self.n, dtype=torch.int32, device=self.weight.device)
        flat = self.weight.reshape(-1).view(torch.int16)
        last = torch.full((1 << 16,), -1, dtype=torch.int64, device=codes.device)
        for begin in range(0, self.n, _CHUNK):
            part = flat[begin : begin + _CHUNK].to(torch.int32) & 0xFFFF
            codes[begin : begin + _CHUNK] = part
            last[part.long()] = torch.arange(begin, begin + len(part), device=codes.device)
        present = last >= 0
        return (present.cumsum(0).to(torch.int32) - 1).index_select(0, codes), last[present]


@dataclass(eq=False)
class _Packer:
    """The two hooks, and what is held in which storage."""

    saved: Saved
    marshal: bool
    weights: list[_Weight]
    unique: bool
    group: "dist.ProcessGroup | None"
    keep: dict[int, Any]
    copy: bool | None
    pinned: bool
    there: dict[int, tuple[Any, list[tuple[int, Any]]]] = field(default_factory=dict)  # id of a storage: it, and (version, piece) weakly
    ranked: tuple[_Weight, int, Tensor, Tensor] | None = None  # of the last weight packed: its version, index, first

    def close(self) -> None:
        """Forget all but what packed tensors hold themselves."""
        self.there.clear()
        self.weights.clear()
        self.keep = {}
        self.ranked = None

    def unpack(self, packed: _Alias | _Held) -> Tensor:
        return packed.restore()

    @torch.no_grad()
    def pack(self, t: Tensor) -> _Alias | _Held:
        t = t.detach()  # without its graph: a saved output would keep itself alive
        size = t.numel() * t.element_size()
        self.saved.saves += 1
        self.saved.saved_bytes += size
        if type(t) is not Tensor or t.layout is not torch.strided or t.is_conj() or t.is_neg() or t.is_quantized or t.is_meta:
            self.saved.odd += 1
            self.saved.hold(alias := _Alias(t, t._version), size)
            return alias
        storage = t.untyped_storage()
        if not size or self.keep.get(id(storage)) is storage:
            self.saved.kept += bool(size)
            self.saved.kept_bytes += size
            return _Alias(t, t._version)
        view = _view(t)
        for piece in self._pieces(storage, t._version) if self.marshal else ():
            if isinstance(piece, _Piece) and piece.covers(view):
                self.saved.hits += 1
                return _Held(piece, view)
        made = self._mapped(t, view)
        if made is None:
            copies = t.device.type != "cpu" if self.copy is None else self.copy
            if self.marshal and not copies:
                return self._referred(t, storage)
            made = self._copied(t, view)
        if self.marshal:
            self._remember(storage, t._version, made)
        return _Held(made, view)

    def _pieces(self, storage: Any, version: int | None) -> Iterator[Any]:
        known, pieces = self.there.get(id(storage), (None, []))
        if known is None or known() is not storage:
            return
        for at, reference in pieces:
            piece = reference()
            if piece is not None and version in {at, None}:
                yield piece

    def _remember(self, storage: Any, version: int, piece: object) -> None:
        key = id(storage)
        known, pieces = self.there.get(key, (None, []))
        if known is None or known() is not storage:
            there = weakref.ref(self)

            def gone(reference: Any) -> None:
                packer = there()
                if packer is not None and packer.there.get(key, (None,))[0] is reference:
                    del packer.there[key]

            known, pieces = weakref.ref(storage, gone), []
            self.there[key] = (known, pieces)
        pieces[:] = [(at, reference) for at, reference in pieces if reference() is not None] + [(version, weakref.ref(piece))]

    def _referred(self, t: Tensor, storage: Any) -> _Alias:
        """Held by reference; the storage is counted once, whatever its version."""
        owner = next((p for p in self._pieces(storage, None) if isinstance(p, _Owner)), None)
        if owner is None:
            owner = _Owner()
            self.saved.hold(owner, storage.nbytes())
            self._remember(storage, t._version, owner)
        else:
            self.saved.hits += 1
        return _Alias(t, t._version, owner)

    def _copied(self, t: Tensor, view: _View, group: "dist.ProcessGroup | None" = None) -> _Piece:
        """The stretch of the storage that the tensor spans, or its entries where that is less."""
        if view.entries > t.numel():
            content = _Dense(_Bytes(t.contiguous().view(-1).view(torch.uint8), 0, self, group), view)
        else:
            flat = t.as_strided((view.entries,), (1,)).view(torch.uint8)
            content = _Dense(_Bytes(flat, view.start % _ALIGN, self, group))
        return _Piece(view.start, view.stop, content, once=group is None)

    def _mapped(self, t: Tensor, view: _View) -> _Piece | None:
        """A row map of a weight, as table and index, in shares, or both; None if it is not one or would take no fewer bytes."""
        candidates = [w for w in self.weights if t.numel() % w.n == 0 and w.weight.device == t.device]
        if not candidates or t.element_size() not in _INTEGERS or view.entries != t.numel():
            return None
        found = next(((w, *ranks, rows, table) for w in candidates if (hit := self._rows(w, t)) for ranks, rows, table in [hit]), None)
        if found is None:
            self._agreed([], [])
            return None
        weight, index, _, rows, table = found
        self.weights.remove(weight)
        self.weights.insert(0, weight)  # what is saved next is likely of the same weight
        listed = weight.index() if weight.index is not None and weight.version == weight.weight._version else None
        smaller = self.unique and table.nbytes + (0 if listed else 2 * weight.n) < rows.nbytes
        codes = index.to(torch.uint16).view(torch.uint8) if smaller and (listed is None or self.group is not None) else None
        flat = (table if smaller else rows).contiguous().view(-1).view(torch.uint8)
        group = self.group if self._agreed([smaller, *rows.shape], [flat] if codes is None else [flat, codes]) else None
        self.saved.shards += group is not None
        if not smaller:
            return None if group is None else self._copied(t, view, group)
        if listed is None or listed.group is not group:
            assert codes is not None
            listed = _Bytes(codes, 0, self, group)
            weight.index, weight.version = weakref.ref(listed), weight.weight._version
        self.saved.maps += 1
        content = _Map(_Bytes(flat, 0, self, group), listed, (rows.shape[0], weight.n, rows.shape[2]), rows.dtype)
        return _Piece(view.start, view.stop, content, once=group is None)

    def _rows(self, weight: _Weight, t: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor] | None:
        """(ranks, rows [a, n, b] over the tensor's memory, table [a, distinct, b]) if rows are equal, bit for bit, where weights are."""
        index, first = self._ranks(weight)
        if len(first) == weight.n:
            return None
        probe = torch.arange(0, weight.n, max(1, weight.n // _PAIRS), device=t.device)
        same = first[index[probe].long()]
        dims = sorted((d for d in range(t.dim()) if t.size(d) > 1), key=t.stride, reverse=True)
        sizes = [t.size(d) for d in dims]
        for after, before in sorted({(b, a) for a, b in _splits(sizes, weight.n)}):
            integers = t.as_strided((before, weight.n, after), (weight.n * after, after, 1)).view(_INTEGERS[t.element_size()])
            if not torch.equal(integers[:, probe], integers[:, same]):
                continue
            table = integers[:, first]
            step = max(1, _CHUNK // (before * after))
            chunks = range(0, weight.n, step)
            if all(torch.equal(integers[:, i : i + step], table.index_select(1, index[i : i + step])) for i in chunks):
                return (index, first), integers, table
        return None

    def _ranks(self, weight: _Weight) -> tuple[Tensor, Tensor]:
        ranked, version = self.ranked, weight.weight._version
        if ranked is None or ranked[0] is not weight or ranked[1] != version:
            self.ranked = None
            ranked = self.ranked = (weight, version, *weight.ranks())
        return ranked[2:]

    def _agreed(self, shape: list[int], parts: list[Tensor]) -> bool:
        """Whether all learners have a row map here, and the same one. Collective: asked once for every tensor whose shape could be one."""
        if self.group is None:
            return False
        digest = hash((*shape, *(_checksum(part) for part in parts))) >> 1
        on = self.weights[0].weight.device
        votes = torch.tensor([len(parts), digest, -digest], device=on)
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group)
        found, least, most = votes.tolist()
        return bool(found) and least == -most


class _Owner:
    """Stands for a storage that is held by reference."""


def _splits(sizes: list[int], n: int) -> Iterator[tuple[int, int]]:
    """(a, b) such that adjacent sizes multiply to n, with the sizes before to a and those after to b."""
    total = 1
    for size in sizes:
        total *= size
    before = 1
    for i in range(len(sizes)):
        span = 1
        for size in sizes[i:]:
            span *= size
            if span == n:
                yield before, total // before // n
        before *= sizes[i]


def _checksum(flat: Tensor) -> int:
    """63 bits of bytes and their places."""
    total = 0
    for begin in range(0, flat.numel(), 8 * _CHUNK):
        part = flat[begin : begin + 8 * _CHUNK]
        words = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(torch.int64)
        places = torch.arange(1, 2 * len(words) + 1, 2, device=flat.device)
        total = (total * 6364136223846793005 + int(((words ^ (words >> 29)) * places).sum())) % (1 << 64)
    return total >> 1
