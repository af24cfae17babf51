"""What each layer of a network holds, computes and takes: entries, multiply-accumulates with weights that are not zero,
milliseconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from laconic.errors import SearchError
from laconic.measure.timing import device_of, evaluating, fixed_threads, spread
from laconic.model.batches import Batch, examples_in, to_device
from laconic.model.calling import call
from laconic.weights import baked, installed

REST = "everything else"
"""The last row of a table of layers: the time of norms, activations, additions and the Python between the layers."""

_aten = torch.ops.aten
_OPERANDS = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.mv: 0,
    _aten.addmm: 1,
    _aten.baddbmm: 1,
    _aten.addmv: 1,
    _aten._scaled_mm: 0,
    _aten._int_mm: 0,
    _aten._grouped_mm: 0,
}
"""Products, and where among the arguments their two factors begin."""


class _Modules:
    """Calls `enter(name)` and `leave(name, module, arguments, output)` around every module of a network while it
    runs.
    """

    def __init__(
        self, network: nn.Module, enter: Callable[[str], None], leave: Callable[[str, nn.Module, Any, Any], None]
    ) -> None:
        self.handles = []
        for name, module in network.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda _module, _given, name=name: enter(name)))
            self.handles.append(
                module.register_forward_hook(
                    lambda module, given, output, name=name: leave(name, module, given, output)
                )
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    """Adds up multiply-accumulates per module: `total[name]`, those with weights that are not zero and all those
    between activations.

    Products are seen below the modules, so functional calls, einsum and attention are counted too. A factor is a weight
    if it lies in a parameter's memory; recurrent layers, whose products are one operation, are counted by their
    weights, once per time step.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        tensors = [p for p in network.parameters() if p.dim() > 1]
        self.memory = {(p.device, p.untyped_storage().data_ptr()) for p in tensors if p.numel()}
        self.total: dict[str, int] = {}
        self.products: set[str] = set()
        self.path, self.recurrent = [""], 0
        self.modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.RNNBase)}

    def enter(self, name: str) -> None:
        self.path.append(name)
        self.recurrent += name in self.modules

    def leave(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        self.path.pop()
        if isinstance(module, nn.RNNBase):
            self.recurrent -= 1
            self._add(
                name, _steps(output[0]) * sum(nonzeros(p) for p in module.parameters(recurse=False) if p.dim() > 1)
            )

    def _add(self, name: str, count: int) -> None:
        self.total[name] = self.total.get(name, 0) + count

    def _is_weight(self, tensor: Tensor) -> bool:
        return (tensor.device, tensor.untyped_storage().data_ptr()) in self.memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet not in _OPERANDS and packet is not _aten.convolution:
            with self:  # an operation made of others, in a forward that runs in inference mode
                output = func.decompose(*args, **(kwargs or {}))
            if output is not NotImplemented:
                return output
        output = func(*args, **(kwargs or {}))
        if self.recurrent:
            return output
        if packet is _aten.convolution:
            at = args[0] if args[6] else output  # a transposed convolution uses every weight once per input position
            self._add(self.path[-1], at.numel() // at.shape[1] * nonzeros(args[1]))
        elif packet in _OPERANDS:
            a, b = args[_OPERANDS[packet] :][:2]
            grouped = packet is _aten._grouped_mm and a.dim() == 2 and b.dim() == 3
            if grouped:
                macs = self._grouped(a, b, args[2] if len(args) > 2 else (kwargs or {})["offs"])
            else:
                macs = self._product(a, b)
            self._add(self.path[-1], macs)
        return output

    def _product(self, a: Tensor, b: Tensor) -> int:
        """Multiply-accumulates of a [.., n, k] times b [.., k, m] or [k]."""
        columns = b.shape[-1] if b.dim() > 1 else 1
        if b.dim() > 1 and self._is_weight(b):
            return a.shape[-2] * nonzeros(b)
        if self._is_weight(a):
            return nonzeros(a) * columns
        self.products.add(self.path[-1])
        return a.numel() * columns

    def _grouped(self, a: Tensor, b: Tensor, ends: Tensor) -> int:
        """Of a [n, k] times b [groups, k, m], where the rows of a up to `ends` [groups] go to one group after the
        other.
        """
        rows = ends.diff(prepend=ends.new_zeros(1))
        return int((rows * torch.count_nonzero(b, (1, 2))).sum()) if self._is_weight(b) else a.numel() * b.shape[-1]


def nonzeros(tensor: Tensor) -> int:
    """How many entries of a tensor of any shape are not zero."""
    return int(torch.count_nonzero(tensor.detach()))


def _steps(output: Tensor | nn.utils.rnn.PackedSequence) -> int:
    """Time steps a recurrent layer made over all its sequences: its output holds a row for each."""
    rows = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return rows.numel() // rows.shape[-1]


def plain(network: nn.Module) -> nn.Module:
    """The network itself, or, if Weights are installed in it, a copy in which they are decoded."""
    return baked(network) if installed(network) else network


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention as the products it is made of, so that they are seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _counted(network: nn.Module, example: Batch) -> _Counter:
    counter = _Counter(network)
    modules = _Modules(network, counter.enter, counter.leave)
    try:
        with evaluating(network), _unfused(), counter:
            call(network, to_device(example, device_of(network)))
    finally:
        modules.remove()
    return counter


def count_macs(network: nn.Module, example: Batch) -> dict[str, float]:
    """Multiply-accumulates per example of every module that makes some, by its path; zero weights do not count, biases
    neither.

    A linear layer: tokens x non-zero weights. A convolution: output positions x non-zero weights (padding counted). A
    recurrent layer: time steps x non-zero weights. Products of activations, as in attention: in full. A weight that is
    changed before it is used (cast, copied) counts in full. Cost: one call.
    """
    counter, count = _counted(plain(network), example), examples_in(example)
    return {name: total / count for name, total in counter.total.items()}


def per_layer(
    network: nn.Module, example: Batch, *, repeats: int = 20, warmup: int = 3, threads: int | None = None
) -> list[dict[str, Any]]:
    """A row per layer: name, kind, entries and non-zeros of its own matrices, MACs per example, milliseconds per call
    of the example.

    Layers are modules that hold a matrix or multiply; their time is without that of modules inside them, the median
    over `repeats` calls. The last row is the rest of the call. `products` marks a row whose MACs are (also) between
    activations, without weights.
    Raises: SearchError for no repeats. Cost: warm-up + repeats calls, and one that counts.
    """
    if repeats < 1 or warmup < 0:
        raise SearchError(f"repeats must be 1 or more and warmup 0 or more, got {repeats} and {warmup}")
    network = plain(network)
    counter, count = _counted(network, example), examples_in(example)
    with fixed_threads(threads):
        seconds = [_own_seconds(network, example) for _ in range(warmup + repeats)][warmup:]
    rows: list[dict[str, Any]] = []
    rest = [0.0] * repeats
    for name, module in network.named_modules():
        times = [run.get(name, 0.0) for run in seconds]
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if not matrices and name not in counter.total:
            rest = [a + b for a, b in zip(rest, times, strict=True)]
            continue
        rows.append(
            {
                "name": name,
                "kind": type(module).__name__,
                "entries": sum(p.numel() for p in matrices),
                "nonzero": sum(map(nonzeros, matrices)),
                "macs": counter.total.get(name, 0) / count,
                "products": name in counter.products,
                "ms": 1000 * spread(times)[1],
            }
        )
    last = {
        "name": REST,
        "kind": "",
        "entries": 0,
        "nonzero": 0,
        "macs": 0.0,
        "products": False,
        "ms": 1000 * spread(rest)[1],
    }
    return [*rows, last]


def _own_seconds(network: nn.Module, example: Batch) -> dict[str, float]:
    """The seconds each module takes in one call, without the modules inside it."""
    device = device_of(network)
    clock = _CudaClock() if device.type == "cuda" else _Stopwatch()
    calls: list[tuple[str, Any, Any, list[int]]] = []
    path: list[tuple[str, Any, list[int]]] = []

    def enter(name: str) -> None:
        path.append((name, clock.now(), []))

    def leave(_name: str, _module: nn.Module, _given: Any, _output: Any) -> None:
        opened, started, inside = path.pop()
        calls.append((opened, started, clock.now(), inside))
        if path:
            path[-1][2].append(len(calls) - 1)

    modules = _Modules(network, enter, leave)
    try:
        with evaluating(network):
            call(network, to_device(example, device))
    finally:
        modules.remove()
    lengths = [clock.seconds(started, ended) for _, started, ended, _ in calls]
    own: dict[str, float] = {}
    for (name, _, _, inside), length in zip(calls, lengths, strict=True):
        own[name] = own.get(name, 0.0) + max(0.0, length - sum(lengths[i] for i in inside))
    return own


class _Stopwatch:
    """The processor's clock."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, started: Any, ended: Any) -> float:
        return float(ended - started)


class _CudaClock(_Stopwatch):
    """Marks in the device's own queue of work."""

    def now(self) -> Any:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, started: Any, ended: Any) -> float:
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1000


def layers_table(reference: nn.Module, network: nn.Module, example: Batch, **options: Any) -> list[dict[str, Any]]:
    """`per_layer` of two networks beside each other, by name, in the reference's order; a layer that is gone holds and
    takes nothing.
    """
    before, after = (
        per_layer(reference, example, **options),
        {row["name"]: row for row in per_layer(network, example, **options)},
    )
    gone = {"entries": 0, "nonzero": 0, "macs": 0.0, "ms": 0.0}
    rows = []
    for row in before:
        now = after.get(row["name"], gone)
        rows.append(
            {
                "name": row["name"],
                "kind": row["kind"],
                "products": row["products"],
                "entries_before": row["entries"],
                "entries_after": now["entries"],
                "nonzero": now["nonzero"],
                "macs_before": row["macs"],
                "macs_after": now["macs"],
                "ms_before": row["ms"],
                "ms_after": now["ms"],
            }
        )
    return rows
