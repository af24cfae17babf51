"""How OpenMP's threads wait for each other: asleep, not in a loop that keeps a core busy.

Waiting threads of libgomp (PyTorch's on Linux) spin by default. Alone on a machine that saves microseconds per operation; beside another
busy process the thread that is waited for gets no core, because those that wait for it hold one. `benchmarks/other_load.py` measures both.
"""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""What tells an OpenMP runtime how to wait: the standard's variable, GNU's, and two of LLVM's and Intel's."""


def wait_asleep() -> None:
    """Let the threads of this process, and of those it starts, wait asleep, unless the user said how they wait.

    The runtime reads this when PyTorch is loaded, so it has to be called before. It changes the environment of the process: the command
    line, tests and benchmarks call it; a program that uses the library does so itself if it wants to (docs/python.md).
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
