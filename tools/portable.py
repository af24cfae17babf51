"""Run the tests as other machines would: another number of threads, another instruction set. A test that fails here asserts what arithmetic
does not promise.

    python tools/portable.py                      # every test file that computes, under every setting
    python tools/portable.py tests/test_evaluate.py --only "old, 2 threads" -x

Sums are associated differently in every setting: PyTorch's own kernels without vector units (`ATEN_CPU_CAPABILITY=default`), oneDNN and MKL
with the instructions of 2008 (SSE 4), and products split between threads. It is the machine's plain setting that `make test` runs.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
SETTINGS = {
    "this machine, 2 threads": {"LACONIC_TEST_THREADS": "2"},
    "old, 1 thread": {"LACONIC_TEST_THREADS": "1"} | OLD,
    "old, 2 threads": {"LACONIC_TEST_THREADS": "2"} | OLD,
}


def computing() -> list[str]:
    """The test files that compute with tensors."""
    files = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("tests/**/laws_*.py")])
    return [str(file.relative_to(ROOT)) for file in files if "import torch" in file.read_text()]


def run(files: list[str], setting: dict[str, str], arguments: list[str]) -> bool:
    """Whether the tests of all files pass under a setting."""
    environment = (
        os.environ | {"OMP_NUM_THREADS": setting["LACONIC_TEST_THREADS"], "OMP_WAIT_POLICY": "PASSIVE"} | setting
    )
    command = [sys.executable, "-m", "pytest", *arguments, *files]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="test files; by default all that compute")
    parser.add_argument(
        "--only", choices=list(SETTINGS), action="append", help="one setting instead of all; may be repeated"
    )
    given, arguments = parser.parse_known_args()
    failed = []
    for name in given.only or SETTINGS:
        started = time.monotonic()
        print(f"== {name}: {' '.join(f'{k}={v}' for k, v in SETTINGS[name].items())}", flush=True)
        if not run(given.files or computing(), SETTINGS[name], arguments):
            failed.append(name)
        print(
            f"== {name}: {'FAILED' if name in failed else 'passed'} in {time.monotonic() - started:.0f} s", flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
