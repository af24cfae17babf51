"""The two hooks of `offload_saved`, and what is held of which storage."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laconic.offload.held import ALIGN, Alias, Bytes, Held, Layout, Map, Owner, Piece, Saved, Whole
from laconic.offload.learners import agree
from laconic.offload.rows import Rows


class Storages:
    """What is held of which storage, found by the storage's identity. Holds neither of them itself."""

    def __init__(self) -> None:
        self.known: dict[
            int, tuple[weakref.ref[Any], list[tuple[int, weakref.ref[Any]]]]
        ] = {}  # by id: the storage, and (version, what is held)

    def held(self, storage: Any, version: int | None) -> Iterator[Any]:
        """What is held of a storage at a version (None: any)."""
        known = self.known.get(id(storage))
        if known is None or known[0]() is not storage:
            return
        for at, reference in known[1]:
            held = reference()
            if held is not None and version in {at, None}:
                yield held

    def remember(self, storage: Any, version: int, held: object) -> None:
        key = id(storage)
        known = self.known.get(key)
        if known is None or known[0]() is not storage:
            here = weakref.ref(self)

            def gone(reference: Any) -> None:
                storages = here()
                if storages is not None and key in storages.known and storages.known[key][0] is reference:
                    del storages.known[key]

            known = self.known[key] = (weakref.ref(storage, gone), [])
        known[1][:] = [(at, reference) for at, reference in known[1] if reference() is not None] + [
            (version, weakref.ref(held))
        ]


@dataclass(eq=False)
class Packer:
    """`pack` and `unpack`, with the settings of `offload_saved`."""

    saved: Saved
    marshal: bool
    rows: Rows
    unique: bool
    group: "dist.ProcessGroup | None"
    keep: dict[int, Any]
    copy: bool | None
    pinned: bool
    storages: Storages = field(default_factory=Storages)

    def close(self) -> None:
        """Forget all but what packed tensors hold themselves."""
        self.storages.known.clear()
        self.rows.close()
        self.keep = {}

    def unpack(self, packed: Alias | Held) -> Tensor:
        return packed.restore()

    @torch.no_grad()
    def pack(self, t: Tensor) -> Alias | Held:
        t = t.detach()  # without its graph: a saved output would keep itself alive
        size = t.numel() * t.element_size()
        self.saved.saves += 1
        self.saved.saved_bytes += size
        if (
            type(t) is not Tensor
            or t.layout is not torch.strided
            or t.is_conj()
            or t.is_neg()
            or t.is_quantized
            or t.is_meta
        ):
            self.saved.odd += 1
            self.saved.hold(alias := Alias(t, t._version), size)
            return alias
        storage = t.untyped_storage()
        if not size or self.keep.get(id(storage)) is storage:
            self.saved.kept += bool(size)
            self.saved.kept_bytes += size
            return Alias(t, t._version)
        view = Layout.of(t)
        for piece in self.storages.held(storage, t._version) if self.marshal else ():
            if isinstance(piece, Piece) and piece.covers(view):
                self.saved.hits += 1
                return Held(piece, view)
        made = self._mapped(t, view)
        if made is None:
            copies = t.device.type != "cpu" if self.copy is None else self.copy
            if self.marshal and not copies:
                return self._referred(t, storage)
            made = self._copied(t, view)
        if self.marshal:
            self.storages.remember(storage, t._version, made)
        return Held(made, view)

    def _referred(self, t: Tensor, storage: Any) -> Alias:
        """Held by reference; the storage is counted once, whatever its version."""
        owner = next((held for held in self.storages.held(storage, None) if isinstance(held, Owner)), None)
        if owner is None:
            owner = Owner()
            self.saved.hold(owner, storage.nbytes())
            self.storages.remember(storage, t._version, owner)
        else:
            self.saved.hits += 1
        return Alias(t, t._version, owner)

    def _copied(self, t: Tensor, view: Layout, group: "dist.ProcessGroup | None" = None) -> Piece:
        """The stretch of the storage that the tensor spans, or its entries where that is less."""
        if view.entries > t.numel():
            content = Whole(self._bytes(t, 0, group), view)
        else:
            content = Whole(self._bytes(t.as_strided((view.entries,), (1,)), view.start % ALIGN, group))
        return Piece(view.start, view.stop, content, once=group is None)

    def _bytes(self, t: Tensor, lead: int, group: "dist.ProcessGroup | None") -> Bytes:
        return Bytes(_flat(t), lead, group, self.saved, pinned=self.pinned)

    def _mapped(self, t: Tensor, view: Layout) -> Piece | None:
        """A row map of a weight, as table and index list, in shares, or both; None if it is not one or would take no
        fewer bytes.
        """
        candidates = self.rows.candidates(t, view)
        if not candidates:
            return None
        found = self.rows.find(t, candidates)
        if found is None:
            agree(self.group, t.device)
            return None
        weight, ranks, rows, table = found
        listed = weight.listed(ranks)
        smaller = self.unique and table.nbytes + (2 * weight.n if listed is None else 0) < rows.nbytes
        about = (smaller, *rows.shape, ranks.mark)
        group = self.group if agree(self.group, t.device, about, _flat(table if smaller else rows)) else None
        self.saved.shards += group is not None
        if not smaller:
            return None if group is None else self._copied(t, view, group)
        if listed is None or listed.group is not group:
            listed = weight.hold(ranks, self._bytes(ranks.codes.to(torch.uint16), 0, group))
        self.saved.maps += 1
        content = Map(self._bytes(table, 0, group), listed, (rows.shape[0], weight.n, rows.shape[2]), rows.dtype)
        return Piece(view.start, view.stop, content, once=group is None)


def _flat(t: Tensor) -> Tensor:
    """A tensor's entries in order, as bytes."""
    return t.contiguous().view(-1).view(torch.uint8)
