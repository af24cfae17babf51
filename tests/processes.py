"""Processes of the tests: how many threads each computes with, and two that meet through a folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

THREADS = int(os.environ.get("LACONIC_TEST_THREADS", "1"))
"""Of each process; one by default, since the tests themselves run in parallel. `make test-portable` asks for others."""
PATIENCE = 1800
"""Seconds until something that hangs is given up; on a busy machine the rest only takes longer."""


def halves_of(work: Callable[[int, str], None], folder: Path) -> list[Any]:
    """What `work(rank, folder)` stored as `rank.pt` in this process (0) and in a new one (1)."""
    other = mp.get_context("spawn").Process(target=work, args=(1, str(folder)))
    other.start()
    work(0, str(folder))
    other.join()
    assert other.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
