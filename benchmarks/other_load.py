"""What a busy neighbour costs: one compression alone, beside a busy process and beside a niced one, with threads that spin and that sleep.

    python benchmarks/other_load.py            # one compression of the embedded model, 12 runs: about five minutes on an idle machine
    python benchmarks/other_load.py --demo     # `laconic demo` itself

Threads of OpenMP that wait for each other spin by default (libgomp: about 3 ms); `laconic` lets them sleep. The machine should be idle:
the load average before every run is in the result.
"""

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import parser, peak_rss_of, record, show

from laconic.demo.corpus import training_text
from laconic.host.threads import SETTINGS

NEIGHBOURS = {"none": None, "one": 0, "one, niced": 19}
"""Who else is busy, by how nice: a loop that never waits. A priority of 19 is what compilers and backups are started with."""

WAITING = {"spinning": {"KMP_BLOCKTIME": "200"}, "asleep": {}}
"""A setting of the user's wins over laconic's; this one is the default of the runtime that knows it, and nothing to libgomp."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--demo", action="store_true", help="time `laconic demo` instead of one compression")
    options.add_argument("--runs", type=int, default=1, help="runs of each kind; the quickest counts")
    options.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1, 1], help="threads of PyTorch")
    options.add_argument(
        "--neighbours", nargs="+", default=list(NEIGHBOURS), choices=NEIGHBOURS, help="who else is busy"
    )
    options.add_argument("--waiting", nargs="+", default=list(WAITING), choices=WAITING, help="how threads wait")
    options.add_argument("--samples", type=int, default=16, help="calibration windows of 256 tokens")
    args = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="laconic-other-load-") as folder:
        for threads in args.threads:
            rows += measure(args, Path(folder), threads)
    name = "other_load-demo" if args.demo else "other_load"
    columns = ["threads", "waiting", "neighbour", "seconds", "times alone", "load before"]
    show("laconic demo" if args.demo else "One compression", rows, columns)
    print(f"wrote {record(name, rows, args).name}", file=sys.stderr)


def measure(args: Namespace, folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """A row per way to wait and neighbour: the quickest run, all runs, and the quickest in units of the quickest alone.

    The runs of all rows take turns, so that a load that comes and goes falls on each.
    """
    kinds = [(waiting, neighbour) for waiting in args.waiting for neighbour in args.neighbours]
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    loads: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.runs):
        for waiting, neighbour in kinds:
            loads[waiting, neighbour].append(round(os.getloadavg()[0], 1))
            with busy(NEIGHBOURS[neighbour]):
                seconds[waiting, neighbour].append(round(timed(args, folder, waiting, threads), 1))
    for waiting, neighbour in kinds:
        best, alone = min(seconds[waiting, neighbour]), min(seconds.get((waiting, "none"), [0.0]))
        yield {
            "threads": threads, "waiting": waiting, "neighbour": neighbour, "seconds": best, "times alone": round(best / alone, 2) if alone else None,
            "load before": max(loads[waiting, neighbour]), "runs": seconds[waiting, neighbour], "loads": loads[waiting, neighbour],
        }  # fmt: skip


def timed(args: Namespace, folder: Path, waiting: str, threads: int) -> float:
    """Seconds of one command, its start included."""
    command = [sys.executable, "-m", "laconic", "demo", "--out", str(folder / "demo"), "--json"]
    if not args.demo:
        text = folder / "text.txt"
        text.write_text("\n".join(training_text()), encoding="utf-8")
        model = Path(sys.modules["laconic.demo.corpus"].__file__ or "").parent / "model"
        command = [
            sys.executable,
            "-m",
            "laconic",
            "compress",
            str(model),
            "--scheme",
            "GPTQ(rate=3.0)",
            "--data",
            str(text),
            "--overwrite",
        ]
        command += ["--samples", str(args.samples), "--test-tokens", "4096", "--out", str(folder / "out"), "--json"]
    cleared = dict.fromkeys((*SETTINGS, "OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    ended = peak_rss_of(command, env=cleared | WAITING[waiting] | {"OMP_NUM_THREADS": str(threads)}, quiet=True)
    if ended.code != 0:
        raise SystemExit(f"{command}: exit code {ended.code}")
    return ended.seconds


@contextmanager
def busy(niceness: int | None) -> Iterator[None]:
    """One process that never waits, while inside; none for None."""
    if niceness is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", f"import os; os.nice({niceness})\nwhile True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
