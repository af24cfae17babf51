"""What a network computes with while a weight is trained towards its set: differentiable in the uncompressed w, and a Weight in the end."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from laconic.errors import CheckpointError
from laconic.weights.base import Weight
from laconic.weights.sparse import Sparse


class Relaxation(nn.Module, ABC):
    """Stands between the uncompressed matrix w [out, in], which is trained, and the matrix the network multiplies with.

    In training mode `forward(w)` is differentiable in w; in evaluation mode it is what `stored(w)` decodes to. Between two changes of w it
    computes the same however often it is called. `weight` is the compressed weight training starts from. It is no submodule: its scales and
    tables are not the optimizer's to train nor a wrapper's to shard, and casting the model does not round them. It goes where w is when it is
    used; buffers follow the model from device to device. The state dict holds all that `stored` depends on beside w.
    """

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._held = (weight,)

    @property
    def weight(self) -> Weight:
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0)).device
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device))
        return self

    @abstractmethod
    def forward(self, w: Tensor) -> Tensor:
        """What the network sees in the place of w, [out, in] in w's dtype."""

    @abstractmethod
    def stored(self, w: Tensor) -> Weight:
        """The point of the set that stands for w in the end: a Weight of its own, which later training does not move."""

    def takes_shard(self, w: Tensor) -> bool:
        """Whether `forward` takes this DTensor as it lies in the processes; otherwise each of them gathers the whole of it first."""
        return False

    def advance(self, progress: float) -> None:
        """Be told how much of the training is done, 0 to 1; a relaxation that hardens on the way does so. Nothing happens by default."""


class StraightThrough(Relaxation):
    """Forward: the nearest point of a weight's set, its side information (mask, scales, tables) as it is. Backward: as if it were w.

    Entries outside a mask get no gradient: it would only count in a norm that is clipped. The state dict holds the weight.
    Source: Bengio et al. 2013, section 3. Cost: a projection per forward pass.
    """

    def forward(self, w: Tensor) -> Tensor:
        value = self._projected(w)
        passed: Tensor = _Through.apply(w, value, self.weight.mask if isinstance(self.weight, Sparse) else None)
        return passed

    @torch.compiler.disable  # type: ignore[untyped-decorator] # projections choose by data, and keep what they chose
    @torch.no_grad()
    def _projected(self, w: Tensor) -> Tensor:
        self.weight.to(w.device).right_inverse(w)
        return self.weight.forward().to(w.dtype)

    def stored(self, w: Tensor) -> Weight:
        with torch.no_grad():
            self.weight.to(w.device).right_inverse(w)
        return copy.deepcopy(self.weight)

    def get_extra_state(self) -> Tensor:
        """The weight as bytes, in a tensor because checkpoints of tensors are what everybody writes."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.weight.state_dict().items()}
        return torch.frombuffer(bytearray(save(tensors | {_KIND: self._kind()})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`. Raises: CheckpointError for a weight of another make."""
        tensors = load(state.cpu().numpy().tobytes())
        if not torch.equal(tensors.pop(_KIND), kind := self._kind()):
            raise CheckpointError(
                f"this state was prepared under another scheme: expected {kind.numpy().tobytes().decode()}"
            )
        self.weight.load_state_dict(tensors)

    def _kind(self) -> Tensor:
        """What the weight is, apart from its numbers."""
        return torch.frombuffer(bytearray(repr(self.weight).encode()), dtype=torch.uint8)


_KIND = "kind"  # beside the names of a weight's tensors


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] if mask is None else grads[0] * mask, None, None
