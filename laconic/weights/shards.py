"""Tensors whose parts lie in several processes: what they are asked, and how a computation on the whole of one is its
own again."""

from collections.abc import Callable

from torch import Tensor, nn


def is_sharded(tensor: Tensor, by_rows: bool = False) -> bool:
    """Whether a tensor of any shape is a DTensor; with `by_rows`, one that is split along its first dimension over the
    one dimension of a mesh."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor, Shard

    return isinstance(tensor, DTensor) and (
        not by_rows or (tensor.device_mesh.ndim == 1 and tensor.placements == (Shard(0),))
    )


def whole(tensor: Tensor) -> Tensor:
    """A DTensor of any shape gathered in every process; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def on_whole(compute: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """compute(tensor) for a DTensor of any shape: every process gathers it, computes the same, and keeps its part of
    the result. Differentiable.

    `compute` maps a plain tensor to one of the same shape. Cost: an all-gather per pass.
    """
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    replicated = DTensor.from_local(compute(tensor.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, tensor.placements)
