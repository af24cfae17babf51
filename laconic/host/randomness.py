"""Randomness that belongs to a run alone: the global generators are lent to it and put back."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


@contextmanager
def private_randomness(
    seed: int, index: int, device: torch.device | None = None, data: Iterable[Any] | None = None
) -> Iterator[None]:
    """The global generators of torch, numpy and Python seeded for what happens inside (dropout, shuffling, augmentation), then put back.

    With `device`, also that GPU's; with `data`, also those a DataLoader holds of its own.
    """
    number = (seed * 1_000_003 + index) % 2**63
    gpu = [device] if device is not None and device.type == "cuda" else []
    own = _own_generators(data)
    states = [generator.get_state() for generator in own]
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpu):
            torch.default_generator.manual_seed(
                number
            )  # torch.manual_seed would move every GPU's generator too, asked for or not
            for cuda in gpu:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(number)
            for generator in own:
                generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def _own_generators(data: Iterable[Any] | None) -> list[torch.Generator]:
    """The generators given to a DataLoader or its sampler."""
    if not isinstance(data, DataLoader):
        return []
    sampler = getattr(data.batch_sampler, "sampler", data.sampler)
    held = (data.generator, getattr(data.sampler, "generator", None), getattr(sampler, "generator", None))
    return list({id(generator): generator for generator in held if isinstance(generator, torch.Generator)}.values())
