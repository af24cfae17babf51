"""`offload_saved`: the context in which saved tensors are packed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.offload.held import Saved
from laconic.offload.packer import Packer
from laconic.offload.rows import Rows


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
    """Inside, what autograd saves for backward is held on the CPU in fewer bytes; gradients stay bit-equal. For any
    training loop.

        with offload_saved(keep=model) as saved:
            loss = model(batch).sum()
        loss.backward()                      # may be inside or outside
        print(saved.peak_bytes)

    **What is held.** A tensor of another device is copied to the CPU. A tensor of the CPU is held by reference, as
    autograd does, and counts with its whole storage. `copy=True` copies it too, so that the CPU stands for a second
    device; without `marshal` every tensor is copied (eDKM's baseline). Tensors in storages of `keep` (a module: its
    parameters and buffers), views among them, are never copied and not counted as held. Sparse, conjugated and
    subclassed tensors are held as they are.

    **marshal (M).** A tensor in a storage that is there already is held as (reference, dtype, offset, size, stride).
    The paper walks the forward graph from the new tensor over at most 4 view-like operations to find one that was
    copied. Two tensors that such a walk connects share their storage; here the storage itself is looked up, together
    with its version and the stretch of it that was copied. That finds all that a walk of any length finds, tensors
    without a graph too, at the cost of one look-up; so there is no hop limit. A storage that was written to in between
    is copied again. Storages are told apart by identity while they live, never by address alone.

    **unique (U).** A tensor of which, for one of the 16-bit `weights` [n], n rows are equal wherever the weights are
    (an attention map [n, |C|], a distance [n, 1], a transposed map [|C|, n]) is held as a table [distinct weights, ...]
    and the weight's index list, uint16 [n], which all its tables share. Every row is compared when it is packed; a
    tensor with one row that differs is held dense.

    **shard (S).** Of such row maps every learner of the process group holds 1/learners of the table and of the index
    list (of the dense map without `unique`) and gathers the rest when backward asks for it. Learners agree on a
    checksum first: what is not the same on all of them is not sharded. All must run the same program on the same
    weights (the paper's synchronous training); backward is collective.

    `weights` are the rows' weights for U and S. While the context lasts, 4 bytes per entry of the last weight packed
    are in use besides.

    In-place changes: what is held by reference is checked when it is unpacked and raises RuntimeError if it was
    changed, as autograd does. A copy cannot be spoilt: the gradient is that of the values at the time they were saved,
    where autograd would refuse. Writing through `.data` between two saves of a storage is not seen.

    Contexts nest; the innermost one applies. Raises: SchemeError. Cost: M a look-up per tensor; U two passes over it.
    Source: eDKM, section 2.1, table 1, figure 2 (M); section 2.2, figure 3 (U, S).
    """
    for weight in weights:
        if weight.element_size() != 2 or weight.layout is not torch.strided:
            raise SchemeError(f"weights: expected dense tensors of 16 bits, got {weight.dtype} {tuple(weight.shape)}")
    if (unique or shard is not None) and not len(weights):
        raise SchemeError("unique and shard need weights=[...], the 16-bit weights whose attention maps are packed")
    if len(weights) and not (unique or shard is not None):
        raise SchemeError("weights are given, but neither unique=True nor shard=group says what to do with them")
    if pinned and not torch.cuda.is_available():
        raise SchemeError("pinned=True needs a CUDA device, and there is none here")
    stay = [*keep.parameters(), *keep.buffers()] if isinstance(keep, nn.Module) else list(keep)
    kept = {id(t.untyped_storage()): t.untyped_storage() for t in stay if t.layout is torch.strided}
    saved = Saved()
    packer = Packer(
        saved, marshal, rows=Rows.of(weights), unique=unique, group=shard, keep=kept, copy=copy, pinned=pinned
    )
    try:
        with torch.autograd.graph.saved_tensors_hooks(packer.pack, packer.unpack):
            yield saved
    finally:
        packer.close()
