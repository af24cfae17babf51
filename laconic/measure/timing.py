"""How long networks take: repeated runs after a warm-up, with fixed threads, one network or several in turn."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import SearchError
from laconic.model.batches import Batch, examples_in, to_device
from laconic.model.calling import call, in_evaluation

_LEAST = 0.005  # seconds per measurement, so that the clock and the call of a short network do not count


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients; every module's mode is put back."""
    with in_evaluation(network), torch.no_grad():
        yield


@contextmanager
def fixed_threads(threads: int | None) -> Iterator[int]:
    """So many threads for one operation (None: as many as are set), and then again as many as before."""
    if threads is not None and threads < 1:
        raise SearchError(f"threads must be 1 or more, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def resized(batch: Batch, count: int) -> Batch:
    """The batch with `count` examples: the first ones, or all of them over and over. Raises: SearchError for a count
    below 1.
    """
    if count < 1:
        raise SearchError(f"a batch must hold 1 example or more, got {count}")
    size = examples_in(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            fits = value.dim() and len(value) == size
            return torch.cat([value] * -(-count // size))[:count] if fits else value  # keeps the memory format
        if isinstance(value, dict):
            return {key: take(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(take(item) for item in value)
        return value

    return take(batch)


def device_of(network: nn.Module) -> torch.device:
    """Where the network's first parameter is; the CPU for a network without any."""
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def seconds_per_call(
    networks: Mapping[str, nn.Module],
    example: Batch,
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    compile: bool = False,
    channels_last: bool = False,
) -> dict[str, list[float]]:
    """The seconds of one call of each network, measured `repeats` times, the networks in turn: what slows the machine
    slows them all.

    A measurement is as many calls as take 5 ms. `channels_last` and `compile` work on copies. The number of threads is
    put back.
    Raises: SearchError for no repeats, or where torch.compile has no compiler. Cost: (warm-up + repeats) calls of each
    network.
    """
    if repeats < 1 or warmup < 0:
        raise SearchError(f"repeats must be 1 or more and warmup 0 or more, got {repeats} and {warmup}")
    with fixed_threads(threads):
        timers = {name: _timer(network, example, warmup, compile, channels_last) for name, network in networks.items()}
        found: dict[str, list[float]] = {name: [] for name in networks}
        names = list(networks)
        for round_ in range(repeats):
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                found[name].append(timers[name]())
    return found


def _timer(network: nn.Module, example: Batch, warmup: int, compile: bool, channels_last: bool) -> Callable[[], float]:
    """A function that measures one call of the network, which is warm."""
    device = device_of(network)
    batch = to_device(example, device)
    if channels_last:
        network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = _channels_last(batch)
    runner = network
    if compile:
        # torch keeps what it compiled per line of code, and after 8 networks of one class would stop compiling
        torch.compiler.reset()
        runner = torch.compile(copy.deepcopy(network), dynamic=False)  # type: ignore[assignment]

    def seconds(calls: int) -> float:
        with evaluating(runner):
            _finish(device)
            started = time.perf_counter()
            for _ in range(calls):
                call(runner, batch)
            _finish(device)
            return (time.perf_counter() - started) / calls

    try:
        for _ in range(warmup + compile):
            seconds(1)
    except RuntimeError as error:
        if not compile:
            raise
        raise SearchError(
            f"torch.compile does not work here ({str(error).splitlines()[0]}); measure with compile=False"
        ) from error
    calls = math.ceil(_LEAST / max(seconds(1), 1e-7))
    return lambda: seconds(calls)


def _channels_last(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, dict):
        return {key: _channels_last(value) for key, value in batch.items()}
    return type(batch)(_channels_last(value) for value in batch) if isinstance(batch, list | tuple) else batch


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def side_by_side(
    networks: Mapping[str, nn.Module], example: Batch, *, batch: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """A row per network: seconds per call, examples per second, and how many times as fast as the first one, medians
    with quartiles.

    Every round measures each network once, and the speed-up is that of the round: the ratio is surer than the two times
    it is made of. `options` are those of `seconds_per_call`. Raises: SearchError for no network at all.
    """
    if not networks:
        raise SearchError("side_by_side needs one network or more, got none")
    given = resized(example, batch) if batch is not None else example
    found, count = seconds_per_call(networks, given, **options), examples_in(given)
    first = next(iter(found.values()))
    rows = []
    for name, times in found.items():
        low, middle, high = spread(times)
        ratios = spread([a / b for a, b in zip(first, times, strict=True)])
        rows.append(
            {
                "name": name,
                "seconds": middle,
                "seconds_quartiles": [low, high],
                "throughput": count / middle,
                "throughput_quartiles": [count / high, count / low],
                "speedup": ratios[1],
                "speedup_quartiles": [ratios[0], ratios[2]],
                "batch": count,
                "rounds": len(times),
            }
        )
    return rows
