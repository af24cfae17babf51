"""What a network computes with in a weight's place while it is trained: differentiable in what is trained, and a Weight
in the end.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.base import Weight
from laconic.weights.compose import Scaled
from laconic.weights.dense import Dense
from laconic.weights.sparse import Sparse
from laconic.weights.uniform import Uniform


class Relaxation(nn.Module, ABC):
    """Stands between the uncompressed matrix w [out, in] and the matrix the network multiplies with, and says what
    training moves.

    In training mode `forward(w)` is differentiable in everything that `trained(w)` names; in evaluation mode it is what
    `stored(w)` decodes to. Between two changes of that it computes the same however often it is called. `weight` is the
    compressed weight training starts from. It is no submodule: its scales and tables are not a wrapper's to shard, and
    casting the model does not round them. It goes where w is when it is used; buffers, and parameters of the
    relaxation's own, follow the model from device to device. The state dict holds all that `stored` depends on beside
    w.
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
        for own in self.parameters(recurse=False):
            own.data = own.data.to(device)
        return self

    def trained(self, w: nn.Parameter) -> dict[str, nn.Parameter]:
        """What training moves, by name: w itself, unless a relaxation trains states of its own (scales, tables, logits)
        in w's stead.
        """
        return {"w": w}

    @abstractmethod
    def forward(self, w: Tensor) -> Tensor:
        """What the network sees in the place of w, [out, in] in w's dtype."""

    @abstractmethod
    def stored(self, w: Tensor) -> Weight:
        """The point of the set that stands for w in the end: a Weight of its own, which later training does not
        move.
        """

    def takes_shard(self, w: Tensor) -> bool:
        """Whether `forward` takes this DTensor as it lies in the processes; otherwise each of them gathers the whole of
        it first.
        """
        return False

    def advance(self, progress: float) -> None:
        """Be told how much of the training is done, 0 to 1; a relaxation that hardens on the way does so. Nothing
        happens by default.
        """


class Carrying(Relaxation):
    """A relaxation whose state dict holds the weight itself, codes and masks included."""

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


class StraightThrough(Carrying):
    """Forward: the nearest point of a weight's set, its side information (mask, scales, tables) as it is. Backward: as
    if it were w.

    Entries outside a mask get no gradient: it would only count in a norm that is clipped. The state dict holds the
    weight.
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


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] if mask is None else grads[0] * mask, None, None


class Tuned(Carrying):
    """Trains a weight's own float states, codes and masks as they are: scales, float zero points, tables, low-rank
    factors, dense parts.

    Forward: D(Theta), each state rounded to the type it is stored in, gradients straight through that rounding. w is
    not looked at. `stored` is a weight with these states, rounded, so what is judged is what is stored. The states are
    parameters of the relaxation, float32 in the weight's names with "/" for ".". Raises: SchemeError for a weight that
    has none.
    """

    def __init__(self, weight: Weight) -> None:
        super().__init__(copy.deepcopy(weight))
        self._names = list(float_states(self.weight))
        if not self._names:
            raise SchemeError(
                f"a {weight.kind} weight has no scales, tables or other float states that could be trained"
            )
        for name, state in float_states(self.weight).items():
            self.register_parameter(_own(name), nn.Parameter(state.detach().clone()))

    def _states(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(_own(name)) for name in self._names}

    def trained(self, w: nn.Parameter) -> dict[str, nn.Parameter]:
        return self._states()

    def forward(self, w: Tensor) -> Tensor:
        states: dict[str, Tensor] = {**self._states()}
        decoded: Tensor = functional_call(self.weight.to(w.device), states, ())
        return decoded.to(w.dtype)

    def stored(self, w: Tensor) -> Weight:
        weight = copy.deepcopy(self.weight.to(w.device))
        with torch.no_grad():
            found = float_states(weight)
            for name, state in self._states().items():
                found[name].copy_(state)
            for part in weight.modules():
                if isinstance(part, Dense):
                    part.right_inverse(part.values)
                elif isinstance(part, Uniform):
                    part.forget()
        return weight


def float_states(weight: Weight) -> dict[str, nn.Parameter]:
    """The float states of a weight that training may move, by name.

    Two kinds may not: the step of integer zero points, which is 1, and the column scale of a weight that rounds inputs,
    which says where they are rounded.
    """
    fixed: set[int] = set()
    for part in weight.modules():
        if isinstance(part, Uniform) and part.zero is not None and part.integer_zero:
            fixed |= {id(state) for state in part.zero.parameters()}
        if isinstance(part, Scaled) and part.column_scale is not None and weight.inputs is not None:
            fixed |= {id(state) for state in part.column_scale.parameters()}
    return {
        name: state for name, state in weight.named_parameters() if state.is_floating_point() and id(state) not in fixed
    }


def _own(name: str) -> str:
    """A state's name as a parameter of the relaxation, which may hold no dot."""
    return name.replace(".", "/")
