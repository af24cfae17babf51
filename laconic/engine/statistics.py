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

from laconic.engine.reservoir import Reservoir
from laconic.model.products import Product, products
from laconic.model.sites import INPUTS, Site, Slot, Stats
from laconic.model.usage import Owners, Place, place_of

_STRIPS = 4  # more of them save little more (1/2 at most) and make the products thinner


class Gram:
    """Sums X^T X (or only its diagonal) over tokens, per group: X [groups, tokens, in]; `magnitude` sums |x|, `centre`
    sums x, `peak` holds the largest |x|, `low` and `high` the smallest and the largest x (0 included), `sample` some
    rows of all groups.

    Of the symmetric sum only blocks on and above the diagonal are computed, five eighths of the work, until `mean`
    mirrors them. `number` is the input's: slots that are fed one tensor share it.
    """

    def __init__(
        self,
        groups: int,
        columns: int,
        wanted: Stats,
        device: torch.device,
        number: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.wanted, self.number, self.diagonal = wanted & INPUTS, number, not wanted & Stats.HESSIAN
        side = torch.zeros(groups, columns, dtype=dtype, device=device)
        self.total = side if self.diagonal else torch.zeros(groups, columns, columns, dtype=dtype, device=device)
        self.magnitude = side.clone() if wanted & Stats.MEAN else None
        self.peak = side.clone() if wanted & Stats.MAX else None
        self.centre = side.clone() if wanted & Stats.CENTRE else None
        self.low, self.high = (side.clone() if wanted & Stats.RANGE else None for _ in range(2))
        self.sample = Reservoir(columns, device, dtype) if wanted & Stats.SAMPLE else None
        self.tokens = torch.zeros(groups, dtype=torch.int64)
        self._divided = False

    def covers(self, wanted: Stats) -> bool:
        """Whether everything wanted of an input is summed here; its mean squares always are, look-ups
        (which are a table's) never.
        """
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
        if self.low is not None and self.high is not None and x.shape[1]:
            self.low[rows] = torch.minimum(self.low[rows], x.amin(1))
            self.high[rows] = torch.maximum(self.high[rows], x.amax(1))
        if self.sample is not None:
            self.sample.add(x)
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
        copy.low = self.low.clone() if self.low is not None else None
        copy.high = self.high.clone() if self.high is not None else None
        copy.sample = self.sample.copy() if self.sample is not None else None
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


Seen = Callable[[Slot, Product, Place, Tensor], None]
"""Called with a slot, a product with it, where in the slot the product's operand lies, and what came out."""
Fused = Callable[[Slot, Tensor], Tensor]
"""Called with a slot and its parameter where that goes into a fused call; what it returns goes there instead."""


class Tap(TorchFunctionMode):
    """Sees every product with a watched parameter, on either side of it: found by the parameter's storage, so no layer
    is known by name.

    Of a fused call (a recurrent layer, multi-head attention) only the parameters are seen, not what they are multiplied
    with.
    """

    def __init__(self, watched: dict[Slot, nn.Parameter], seen: Seen, fused: Fused) -> None:
        super().__init__()
        self._slots = Owners(watched.items())
        self._places = {tensor.data_ptr(): slot for slot, tensor in watched.items()}
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
            with (
                torch.backends.cudnn.flags(enabled=False)
                if torch.is_grad_enabled() and torch.cuda.is_available()
                else nullcontext()
            ):
                return func(*self._replaced(args), **named)
        output = func(*args, **(kwargs or {}))
        for product in products(func, args, kwargs or {}):
            owner = self._slots.of(product.w)
            if owner is not None and not owner[1].is_meta:
                slot, tensor = owner
                place = place_of(product, slot.view, slot.groups, tensor)
                if place is not None:
                    self._seen(slot, product, place, output)
        return output


_FUSED = {
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    torch.lstm_cell,
    torch.gru_cell,
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
    F.multi_head_attention_forward,
}


def _identity(x: Tensor) -> tuple[Any, ...]:
    """What is equal for two looks at one tensor between which nothing was written to it."""
    return x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version


class Statistics:
    """Accumulates what was asked for of some slots while the model runs inside `watch`.

    Slots that are fed the same tensor (queries, keys and values; gate and up) share one Gram matrix, if it has what
    each of them wants.
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
        self.turned: set[Slot] = set()
        self._last: tuple[Tensor, Any, list[Gram]] | None = (
            None  # the input, kept so that its memory is not another's; what it was then
        )
        self._numbers = count()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inputs (and, in a backward pass, gradients) are summed inside this context."""
        with Tap(self.watched, self._seen, self._inside):
            yield
        self._last = None

    def _seen(self, slot: Slot, product: Product, place: Place, output: Tensor) -> None:
        if slot not in self.order:
            self.order.append(slot)
        if not place.forward:  # what it is fed then are outputs of W x: a sum over both would be nobody's Hessian
            self.turned.add(slot)
            return
        needs = self.needs[slot]
        x = self._inputs(slot, product, place) if needs & INPUTS or needs & Stats.FISHER else None
        if x is not None and needs & INPUTS:
            self._sum_inputs(slot, self._by_group(slot, x, place), place.group)
        if needs & (Stats.FISHER | Stats.OUTPUT_FISHER) and output.requires_grad and product.kind == "lookup":
            ids = product.inputs().flatten()
            output.register_hook(lambda g: self._sum_of_rows(slot, ids, product.outputs(g.detach())[0]))
        elif needs & (Stats.FISHER | Stats.OUTPUT_FISHER) and output.requires_grad:
            output.register_hook(lambda g: self._sum_gradients(slot, x, place, product.outputs(g.detach())))

    def _inputs(self, slot: Slot, product: Product, place: Place) -> Tensor:
        """X [matrices or 1, tokens, in] with all the site's columns: those a product leaves out are fed zeros by it."""
        x = product.inputs()
        if product.kind == "product" and x.shape[-1] < slot.shape[1]:
            return F.pad(x, (place.column, slot.shape[1] - place.column - x.shape[-1]))
        return x

    def _by_group(self, slot: Slot, x: Tensor, place: Place) -> Tensor:
        """The inputs as [groups, tokens, in], or [1, tokens, in] of one group."""
        if len(x) == 1 < slot.groups and place.group is None:
            return x.expand(slot.groups, -1, -1)
        return x if len(x) in (1, slot.groups) else x.reshape(1, -1, x.shape[-1])

    def _inside(self, slot: Slot, w: Tensor) -> Tensor:
        """A leaf in the place of a parameter in a fused call, so that its gradient is seen whether or not it is
        trained.
        """
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
        now = _identity(x)
        summed = self._last[2] if self._last is not None and self._last[1] == now and group is None else []
        gram = self.grams.get(slot) or next((gram for gram in summed if gram.covers(self.needs[slot])), None)
        if gram is not None and gram in summed:
            self.grams[slot] = gram
            return  # summed already, for the slot this one shares its input with
        shared = [other for other, gram in self.grams.items() if gram is self.grams.get(slot) and other is not slot]
        if shared and self.order.index(shared[0]) < self.order.index(slot):
            # it was fed what another slot was fed, and now is not
            self.grams[slot] = self.grams[slot].split(next(self._numbers))
        gram = self._gram(slot, x.device)
        gram.add(x, group)
        self._last = (x, now, [*summed, gram]) if group is None else None

    def _gram(self, slot: Slot, device: torch.device) -> Gram:
        if slot not in self.grams:
            self.grams[slot] = Gram(slot.groups, slot.shape[1], self.needs[slot], device, next(self._numbers))
        return self.grams[slot]

    def input_of(self, slot: Slot) -> int | None:
        """A number that slots have in common which are fed one tensor and share its sums; None where nothing was
        summed.
        """
        return self.grams[slot].number if slot in self.grams else None

    def _sum_gradients(self, slot: Slot, x: Tensor | None, place: Place, g: Tensor) -> None:
        """Add the gradients g [matrices, tokens, rows] of one product, one sequence's if the model runs on one sequence
        at a time.
        """
        per_row = g.square().sum(1).flatten()
        rows = slice(place.row, place.row + len(per_row))
        total = self.output.setdefault(slot, torch.zeros(slot.shape[0], device=g.device))
        total[rows] += per_row
        if self.needs[slot] & Stats.FISHER and x is not None and x.is_floating_point():
            self._fisher(slot)[rows] += (g.mT.to(x.dtype) @ x).flatten(0, 1).square()

    def _sum_of_rows(self, slot: Slot, ids: Tensor, g: Tensor) -> None:
        """Add the gradients g [look-ups, in] to the rows of a table they are of: its entries are outputs, so a row
        counts by their mean square.

        Rows that are summed or averaged before they are put out (EmbeddingBag) are left out: nothing tells whose a
        gradient is.
        """
        if len(ids) == len(g):
            total = self.output.setdefault(slot, torch.zeros(slot.shape[0], device=g.device))
            total.index_add_(0, ids, g.float().square().mean(1))

    def forget(self, slot: Slot) -> None:
        """Drop what was summed for a slot (what it shares with another stays for that one)."""
        for kept in (self.grams, self.fisher, self.output, self.uses):
            kept.pop(slot, None)

    def describe(self, slot: Slot, W: Tensor, seed: int) -> Site:
        """The site a method is given: its values and everything that was summed for it. Nothing can be added
        afterwards.

        What was not seen stays None (see `unmeasured.completed`).
        """
        site = Site(slot.name, W, slot.groups, dims=slot.view.shape, role=slot.role, seed=seed)
        if slot in self.fused:
            site = site.having(
                unseen=(
                    "it is multiplied inside a fused call (a recurrent layer, multi-head attention), where inputs "
                    "cannot be seen"
                )
            )
        gram = self.grams.get(slot)
        if slot in self.turned and gram is None:
            site = site.having(
                unseen="only its transpose is multiplied with anything, the other way round than its layer does"
            )
        elif slot in self.turned and self.needs[slot] & INPUTS:
            site.notes.append(
                f"{slot.name}: its transpose is multiplied with something too; only the inputs of the matrix itself "
                "are looked at"
            )
        if gram is not None:
            mean, magnitude, peak = gram.mean(), gram.magnitude, gram.peak  # `mean` divides the sums in place
            if slot.role == "embedding" and not mean.any():
                mean = (
                    torch.eye(slot.shape[1], device=mean.device).unsqueeze(0)
                    if not gram.diagonal
                    else torch.ones_like(mean)
                )
                magnitude, peak = (torch.ones_like(side) if side is not None else None for side in (magnitude, peak))
            site = site.having(
                tokens=gram.tokens,
                magnitude=magnitude,
                peak=peak,
                centre=gram.centre,
                input=gram.number,
                low=gram.low,
                high=gram.high,
                sample=gram.sample.rows if gram.sample is not None else None,
            )
            site = site.having(**({"squares": mean} if gram.diagonal else {"hessian": mean}))
        if slot in self.uses:
            site = site.having(uses=self.uses[slot])
        if slot in self.output:
            site = site.having(output_fisher=self.output[slot] / max(self.tokens, 1))
        if slot in self.fisher:
            site = site.having(fisher=self.fisher[slot] / max(self.sequences, 1))
        return site
