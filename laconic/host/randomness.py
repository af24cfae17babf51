"""Randomness that belongs to a run alone: the global generators are lent to it and put back."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


@contextmanager
def lent_generators(
    seed: int | None, gpus: Sequence[torch.device] = (), own: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """The global generators of torch, NumPy and Python are put back to their states afterwards; inside they are seeded,
    unless `seed` is None.

    So are those of the `gpus`, and `own`, generators that somebody holds. Cost: a copy of the states.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    owned = [generator.get_state() for generator in own]
    try:
        if seed is not None:
            _seed(seed, gpus, own)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for gpu, state in zip(gpus, on_gpus, strict=True):
            torch.cuda.set_rng_state(state, gpu)
        for generator, state in zip(own, owned, strict=True):
            generator.set_state(state)


def _seed(seed: int, gpus: Sequence[torch.device], own: Sequence[torch.Generator]) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # not torch.manual_seed, which would move every GPU's generator too, asked for or not
    torch.default_generator.manual_seed(seed)
    for gpu in gpus:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed)
    for generator in own:
        generator.manual_seed(seed)


@contextmanager
def private_randomness(
    seed: int, index: int, device: torch.device | None = None, data: Iterable[Any] | None = None
) -> Iterator[None]:
    """The global generators seeded for what happens inside (dropout, shuffling, augmentation), then put back.

    With `device`, also that GPU's; with `data`, also those a DataLoader holds of its own.
    """
    number = (seed * 1_000_003 + index) % 2**63
    gpus = [device] if device is not None and device.type == "cuda" else []
    with lent_generators(number, gpus, _own_generators(data)):
        yield


def gpus_in_use() -> list[torch.device]:
    """Every GPU, where any is in use: asking an idle driver for a generator's state would start it."""
    if not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def _own_generators(data: Iterable[Any] | None) -> list[torch.Generator]:
    """The generators given to a DataLoader or its sampler."""
    if not isinstance(data, DataLoader):
        return []
    sampler = getattr(data.batch_sampler, "sampler", data.sampler)
    held = (data.generator, getattr(data.sampler, "generator", None), getattr(sampler, "generator", None))
    return list({id(generator): generator for generator in held if isinstance(generator, torch.Generator)}.values())
