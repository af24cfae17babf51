"""How PyTorch's threads share a machine: they wait for each other asleep, and there are no more of them than the
process has cores.

Waiting threads of libgomp (PyTorch's on Linux) spin by default. Alone on a machine that saves microseconds per
operation; beside another busy process the thread that is waited for gets no core, because those that wait for it hold
one. `benchmarks/other_load.py` measures both. In a container, the runtime counts the cores of the machine and not those
the container may use.
"""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""What tells an OpenMP runtime how to wait: the standard's variable, GNU's, and two of LLVM's and Intel's."""

_NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
_QUOTA = "/sys/fs/cgroup/cpu.max"


def wait_asleep() -> None:
    """Let the threads of this process, and of those it starts, wait asleep, and keep within a container's share of the
    cores.

    What the user has said of either wins. The runtime reads this when PyTorch is loaded, so it has to be called before.
    It changes the environment of the process: the command line, tests and benchmarks call it; a program that uses the
    library does so itself if it wants to (docs/python.md).
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    cores = quota()
    if cores is not None and cores < (os.cpu_count() or 1) and not any(name in os.environ for name in _NUMBERS):
        os.environ["OMP_NUM_THREADS"] = str(cores)


def quota(file: str = _QUOTA) -> int | None:
    """The cores that a container's quota comes to, at least one; None where there is no quota that is known
    (Linux, cgroup version 2).
    """
    try:
        with open(file, encoding="ascii") as lines:
            allowed, period = lines.readline().split()
        return None if allowed == "max" else max(1, int(allowed) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
