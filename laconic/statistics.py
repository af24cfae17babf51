"""The only place where inputs and gradients are seen and summed.

One normalisation everywhere: a Hessian is X^T X / n over the n tokens (or image patches) a site saw, in its own groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from laconic.sites import INPUTS, Site, Slot, Stats

_STRIPS = 4  # more of them save little more (1/2 at most) and make the products thinner


class Gram:
    """Sums X^T X (or only its diagonal) over tokens, per group: X [groups, tokens, in]; `magnitude` sums |x|, `centre` sums x, `peak`
    holds the largest |x|.

    Of the symmetric sum only blocks on and above the diagonal are computed, five eighths of the work, until `mean` mirrors them.
    `number` is the input's: slots that are fed one tensor share it.
    """

    def __init__(self, groups: int, columns: int, wanted: Stats, device: torch.device, number: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.wanted, self.number, self.diagonal = wanted & INPUTS, number, not wanted & Stats.HESSIAN
        side = torch.zeros(groups, columns, dtype=dtype, device=device)
        self.total = side if self.diagonal else torch.zeros(groups, columns, columns, dtype=dtype, device=device)
        self.magnitude = side.clone() if wanted & Stats.MEAN else None
        self.peak = side.clone() if wanted & Stats.MAX else None
        self.centre = side.clone() if wanted & Stats.CENTRE else None
        self.tokens = torch.zeros(groups, dtype=torch.int64)
        self._divided = False

    def covers(self, wanted: Stats) -> bool:
        """Whether everything wanted of an input is summed here; its mean squares always are, look-ups (which are a table's) never."""
        return not wanted & INPUTS & ~(self.wanted | Stats.SQUARES | Stats.USES)

    def add(self, x: Tensor, group: int | None = None) -> None:
        """Add the inputs x [groups, tokens, in], or x [1, tokens, in] of one group."""
        x = x.to(self.total.dtype)
        rows = slice(None) if group is None else slice(group, group + 1)
        if self.diagonal:
            self.total[rows] += x.square().sum(1)
        else:
            for total, part in zip(self.total[rows], x, strict=True):
                for here, rest in self._strips():
                    total[here, rest].addmm_(part[:, here].t(), part[:, rest])
        if self.magnitude is not None:
            self.magnitude[rows] += x.abs().sum(1)
        if self.centre is not None:
            self.centre[rows] += x.sum(1)
        if self.peak is not None and x.shape[1]:
            self.peak[rows] = torch.maximum(self.peak[rows], x.abs().amax(1))
        self.tokens[rows] += x.shape[1]

    def _strips(self) -> list[tuple[slice, slice]]:
        """Quarters of the rows, and for each the columns from its own first one on."""
        columns = self.total.shape[1]
        step = -(-columns // _STRIPS)
        return [(slice(start, start + step), slice(start, None)) for start in range(0, columns, step)]

    def split(self, number: int) -> "Gram":
        """A copy that goes on alone, under a number of its own."""
        copy = Gram(len(self.tokens), self.total.shape[1], self.wanted, self.total.device, number, self.total.dtype)
        copy.total, copy.tokens = self.total.clone(), self.tokens.clone()
        copy.magnitude = self.magnitude.clone() if self.magnitude is not None else None
        copy.peak = self.peak.clone() if self.peak is not None else None
        copy.centre = self.centre.clone() if self.centre is not None else None
        return copy

    def mean(self) -> Tensor:
        """X^T X (and `magnitude`, `centre`) divided by the tokens of each group, zero for a group that saw none.

        In place, as it can be the largest tensor.
        """
        if not self._divided:
            for here, _ in self._strips() if not self.diagonal else ():
                self.total[:, here.stop :, here] = self.total[:, here, here.stop :].transpose(1, 2)
            n = self.tokens.clamp(min=1).to(self.total)
            self.total /= n.view(-1, *(1,) * (self.total.dim() - 1))
            if self.magnitude is not None:
                self.magnitude /= n.view(-1, 1)
            if self.centre is not None:
                self.centre /= n.view(-1, 1)
            self._divided = True
        return self.total


Seen = Callable[[Slot, Tensor, int | None, Tensor, bool], None]
"""Called with a slot, its input [groups, tokens, in], the group (None for all), the product's output, and whether that is channels-first."""
Fused = Callable[[Slot, Tensor], Tensor]
"""Called with a slot and its parameter where that goes into a fused call; what it returns goes there instead."""


class Tap(TorchFunctionMode):
    """Sees every matrix product or convolution with a watched parameter: found by the parameter's storage, so no layer is known by name.

    Of a fused call (a recurrent layer, multi-head attention) only the parameters are seen, not what they are multiplied with.
    """

    def __init__(self, watched: dict[Slot, nn.Parameter], seen: Seen, fused: Fused) -> None:
        super().__init__()
        self._slots = {tensor.untyped_storage().data_ptr(): (slot, tensor) for slot, tensor in watched.items()}
        self._places = {tensor.data_ptr(): slot for slot, tensor in watched.items()}  # a recurrent layer's weights may share one storage
        self._seen, self._fused = seen, fused

    def _replaced(self, value: Any) -> Any:
        """The arguments of a fused call with what stands for the watched parameters in them."""
        if isinstance(value, list | tuple):
            return type(value)(self._replaced(item) for item in value)
        slot = self._places.get(value.data_ptr()) if isinstance(value, Tensor) and value.device.type != "meta" else None
        return value if slot is None else self._fused(slot, value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUSED:
            named = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
            # cuDNN's recurrent layers have gradients in training mode only
            with torch.backends.cudnn.flags(enabled=False) if torch.is_grad_enabled() and torch.cuda.is_available() else nullcontext():
                return func(*self._replaced(args), **named)
        output = func(*args, **(kwargs or {}))
        product = PRODUCTS.get(func)
        if product is not None:
            x, w, extra = product(*args, **(kwargs or {}))
            if isinstance(w, Tensor) and w.device.type != "meta":
                slot, tensor = self._slots.get(w.untyped_storage().data_ptr(), (None, None))
                if slot is not None and tensor is not None:
                    whole = w.numel() == tensor.numel()
                    group = None if whole else (w.storage_offset() - tensor.storage_offset()) // tensor.stride(0)
                    self._seen(slot, _inputs(slot, x, w, extra, whole), group, output, isinstance(extra, tuple))
        return output


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return input, weight, None


def _addmm(_: Tensor, mat1: Tensor, mat2: Tensor, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return mat1, mat2, None


def _matmul(input: Tensor, other: Tensor, **_: Any) -> tuple[Tensor, Tensor, Any]:
    return input, other, None


def _conv(
    input: Tensor, weight: Tensor, _: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, *__: Any, **___: Any
) -> tuple[Tensor, Tensor, Any]:
    return input, weight, (stride, padding, dilation)


def _lookup(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Any]:
    return input, weight, "lookup"


PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor, Any]]] = {
    F.linear: _linear, torch.addmm: _addmm, torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.bmm: _matmul,
    torch.mm: _matmul, F.conv1d: _conv, F.conv2d: _conv, torch.conv1d: _conv, torch.conv2d: _conv, F.embedding: _lookup,
}  # fmt: skip

_FUSED = {
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell,
    F.multi_head_attention_forward,
}  # fmt: skip


def _inputs(slot: Slot, x: Tensor, w: Tensor, extra: Any, whole: bool) -> Tensor:
    """The input of a product as X [groups, tokens, in]; of a look-up the rows [1, tokens, 1], which are integers."""
    if extra == "lookup":  # the input is one-hot, and the table's columns are not mixed: X^T X / n is the identity
        return x.detach().reshape(1, -1, 1)  # the row of each token, as an integer
    if extra is not None:
        return _patches(x, w, extra, slot.groups)
    if whole and slot.groups > 1:  # all experts at once, each with its own rows
        return x.detach().reshape(slot.groups, -1, x.shape[-1])
    return x.detach().reshape(1, -1, x.shape[-1])


def _patches(x: Tensor, w: Tensor, extra: Any, groups: int) -> Tensor:
    """The patches a convolution multiplies, [groups, patches, in / groups x kernel]."""
    kernel = tuple(w.shape[2:])
    stride, padding, dilation = (_pair(value, len(kernel)) for value in extra)
    x = x.detach()
    if isinstance(extra[1], str):
        total = [d * (k - 1) if extra[1] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        padding = (0,) * len(kernel)
    if len(kernel) == 1:
        x, kernel, stride, padding, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    unfolded = F.unfold(x, kernel, dilation, padding, stride)  # [batch, in x kernel, patches]
    return unfolded.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _pair(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, str):
        return (0,) * dimensions
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


class Statistics:
    """Accumulates what was asked for of some slots while the model runs inside `watch`.

    Slots that are fed the same tensor (queries, keys and values; gate and up) share one Gram matrix, if it has what each of them wants.
    """

    def __init__(self, watched: dict[Slot, nn.Parameter], needs: dict[Slot, Stats]) -> None:
        self.watched, self.needs = watched, needs
        self.grams: dict[Slot, Gram] = {}
        self.fisher: dict[Slot, Tensor] = {}
        self.output: dict[Slot, Tensor] = {}
        self.uses: dict[Slot, Tensor] = {}
        self.tokens = self.sequences = 0
        self.order: list[Slot] = []
        self.fused: set[Slot] = set()
        self._last: tuple[Tensor, list[Gram]] | None = None
        self._numbers = count()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inputs (and, in a backward pass, gradients) are summed inside this context."""
        with Tap(self.watched, self._seen, self._inside):
            yield
        self._last = None

    def _seen(self, slot: Slot, x: Tensor, group: int | None, output: Tensor, channels_first: bool) -> None:
        if slot not in self.order:
            self.order.append(slot)
        if self.needs[slot] & INPUTS:
            self._sum_inputs(slot, x, group)
        if self.needs[slot] & (Stats.FISHER | Stats.OUTPUT) and output.requires_grad:
            output.register_hook(lambda g: self._sum_gradients(slot, x, group, g.detach().movedim(1, -1) if channels_first else g.detach()))

    def _inside(self, slot: Slot, w: Tensor) -> Tensor:
        """A leaf in the place of a parameter in a fused call, so that its gradient is seen whether or not it is trained."""
        self.fused.add(slot)
        if not (self.needs[slot] & Stats.FISHER and torch.is_grad_enabled()):
            return w
        leaf = w.detach().requires_grad_()
        leaf.register_hook(lambda g: self._fisher(slot).add_(slot.view.matrix(g.detach()).square()))
        return leaf

    def _fisher(self, slot: Slot) -> Tensor:
        return self.fisher.setdefault(slot, torch.zeros(slot.shape, device=self.watched[slot].device))

    def _sum_inputs(self, slot: Slot, x: Tensor, group: int | None) -> None:
        if not x.is_floating_point():
            self._gram(slot, x.device).tokens += x.shape[1]
            if self.needs[slot] & Stats.USES:
                counts = torch.bincount(x.flatten(), minlength=slot.shape[0]).float()
                self.uses[slot] = self.uses[slot] + counts if slot in self.uses else counts
            return
        same = self._last is not None and self._last[0].data_ptr() == x.data_ptr() and self._last[0].shape == x.shape and group is None
        summed = self._last[1] if same and self._last is not None else []
        gram = self.grams.get(slot) or next((gram for gram in summed if gram.covers(self.needs[slot])), None)
        if gram is not None and gram in summed:
            self.grams[slot] = gram
            return  # summed already, for the slot this one shares its input with
        shared = [other for other, gram in self.grams.items() if gram is self.grams.get(slot) and other is not slot]
        if shared and self.order.index(shared[0]) < self.order.index(slot):
            self.grams[slot] = self.grams[slot].split(next(self._numbers))  # it was fed what another slot was fed, and now is not
        gram = self._gram(slot, x.device)
        gram.add(x, group)
        self._last = (x, [*summed, gram]) if group is None else None

    def _gram(self, slot: Slot, device: torch.device) -> Gram:
        if slot not in self.grams:
            self.grams[slot] = Gram(slot.groups, slot.shape[1], self.needs[slot], device, next(self._numbers))
        return self.grams[slot]

    def input_of(self, slot: Slot) -> int | None:
        """A number that slots have in common which are fed one tensor and share its sums; None where nothing was summed."""
        return self.grams[slot].number if slot in self.grams else None

    def _sum_gradients(self, slot: Slot, x: Tensor, group: int | None, g: Tensor) -> None:
        """Add the gradients g [..., rows] of one product, one sequence's if the model runs on one sequence at a time."""
        g = g.reshape(-1, g.shape[-1])
        per_row = g.square().sum(0)
        start = (group or 0) * (slot.shape[0] // slot.groups)
        total = self.output.setdefault(slot, torch.zeros(slot.shape[0], device=g.device))
        total[start : start + len(per_row)] += per_row
        if self.needs[slot] & Stats.FISHER and x.is_floating_point():
            squared = self._fisher(slot)
            grouped = g.unflatten(1, (x.shape[0], -1)).permute(1, 2, 0)  # [groups, rows, tokens]
            squared[start : start + len(per_row)] += (grouped @ x).flatten(0, 1).square()

    def forget(self, slot: Slot) -> None:
        """Drop what was summed for a slot (what it shares with another stays for that one)."""
        for kept in (self.grams, self.fisher, self.output, self.uses):
            kept.pop(slot, None)

    def describe(self, slot: Slot, W: Tensor, seed: int) -> Site:
        """The site a method is given: its values and everything that was summed for it. Nothing can be added afterwards.

        What was not seen stays None (see `unmeasured.completed`).
        """
        site = Site(slot.name, W, slot.groups, dims=slot.view.shape, role=slot.role, seed=seed)
        if slot in self.fused:
            site = site.having(unseen="it is multiplied inside a fused call (a recurrent layer, multi-head attention), where inputs cannot be seen")
        gram = self.grams.get(slot)
        if gram is not None:
            mean, magnitude, peak = gram.mean(), gram.magnitude, gram.peak  # `mean` divides the sums in place
            if slot.role == "embedding" and not mean.any():
                mean = torch.eye(slot.shape[1], device=mean.device).unsqueeze(0) if not gram.diagonal else torch.ones_like(mean)
                magnitude, peak = (torch.ones_like(side) if side is not None else None for side in (magnitude, peak))
            site = site.having(tokens=gram.tokens, magnitude=magnitude, peak=peak, centre=gram.centre, input=gram.number)
            site = site.having(**({"squares": mean} if gram.diagonal else {"hessian": mean}))
        if slot in self.uses:
            site = site.having(uses=self.uses[slot])
        if slot in self.output:
            site = site.having(output=self.output[slot] / max(self.tokens, 1))
        if slot in self.fisher:
            site = site.having(fisher=self.fisher[slot] / max(self.sequences, 1))
        return site
