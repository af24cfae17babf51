"""What the benchmarks share: where data lies, a record of figures with the machine that made them, a table, a process's peak memory.

Run a benchmark from anywhere as `python benchmarks/NAME.py`; its figures go to `benchmarks/results/NAME.json`. Nothing heavy is imported
here at the top: a process started by a large one inherits its peak memory in `ru_maxrss`. This module is imported before PyTorch, which reads
how its threads are to wait when it is loaded.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from laconic.host.threads import wait_asleep

wait_asleep()
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
STARTED = time.time()

Row = Mapping[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has: `--shared` (the team's models and data) and `--seed`."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument(
        "--shared",
        type=Path,
        default=Path(os.environ.get("LACONIC_SHARED", ROOT.parent / "shared")),
        help="folder of models/ and data/",
    )
    made.add_argument("--seed", type=int, default=0)
    return made


def shared(args: argparse.Namespace, relative: str) -> Path:
    """A file of the shared folder. Exits with a message, and 0, where it is absent: nobody is required to have it."""
    path = args.shared / relative
    if not path.exists():
        print(
            f"skipped: {relative} is not in the shared folder; say where that is with --shared or LACONIC_SHARED",
            file=sys.stderr,
        )
        raise SystemExit(0)
    return path


def record(name: str, rows: Sequence[Row], args: argparse.Namespace, **extra: Any) -> Path:
    """Write rows, arguments, machine and versions to `results/NAME.json`, whole or not at all. `extra` adds entries or replaces them."""
    content = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "seed": getattr(args, "seed", None),
        "arguments": {key: _portable(value) for key, value in vars(args).items() if key != "shared"},
        "seconds": round(time.time() - STARTED, 1),
        "machine": machine(),
        "versions": versions(),
        **extra,
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=_portable) + "\n")
    temporary.replace(file)
    return file


def command_line() -> str:
    """The command that is running, without the machine's own folders."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(str(_portable(a)) for a in sys.argv[1:])])


def _portable(value: Any) -> Any:
    """A value as JSON knows it; of an absolute path only its last name."""
    if isinstance(value, str | Path):
        return Path(value).name if os.path.isabs(value) else str(value)
    if isinstance(value, int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return str(value)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; the threads PyTorch may use when it is loaded."""
    system = (
        platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
        if platform.system() == "Linux"
        else platform.platform()
    )
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "ram_gb": None,
        "os": f"{system}, {platform.machine()}",
    }
    if hasattr(os, "sysconf"):
        found["ram_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    torch = sys.modules.get("torch")
    found["threads"] = torch.get_num_threads() if torch is not None else os.environ.get("OMP_NUM_THREADS")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def versions() -> dict[str, str]:
    """The versions that produced a figure, with the commit of this checkout (and whether files differ from it)."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy", "constriction", "laconic"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found | {
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("-modified" if _git("status", "--porcelain", "laconic") else "")
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def show(title: str, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """Print rows as a table; numbers to the right, floats in four digits."""
    from rich.console import Console
    from rich.table import Table

    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(text(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def text(value: Any) -> str:
    """A table's cell: nothing for None, thousands separated, floats to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


@dataclass(frozen=True)
class Peak:
    """How a process ended and the most memory it had; bytes.

    `rss` is the system's figure (ru_maxrss) and counts the pages of mapped files that happen to be in memory, which the system takes back
    when it needs room; `anonymous` is what the process itself allocated, sampled every 20 ms (None where there is no /proc).
    """

    code: int
    seconds: float
    rss: int
    anonymous: int | None
    timeline: list[tuple[float, int, int]]
    """(seconds, anonymous, file-backed) about once a second."""


def peak_rss_of(command: Sequence[str], *, env: Mapping[str, str | None] | None = None, quiet: bool = False) -> Peak:
    """Run a command to its end and return its exit code, seconds and peak memory. Its output goes to stderr, or nowhere.

    `env` changes its environment: None takes a variable out.
    """
    started = time.time()
    output = subprocess.DEVNULL if quiet else sys.stderr
    environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    anonymous, timeline = None, []
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        now = _resident(process.pid)
        if now is not None:
            anonymous = max(anonymous or 0, now[0])
            if not timeline or time.time() - started - timeline[-1][0] >= 1:
                timeline.append((round(time.time() - started, 2), *now))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    unit = 1 if sys.platform == "darwin" else 1024
    return Peak(process.returncode, time.time() - started, usage.ru_maxrss * unit, anonymous, timeline)


def _resident(pid: int) -> tuple[int, int] | None:
    """(anonymous, file-backed) bytes in memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssFile:"))
    }
    return (found["RssAnon"], found["RssFile"]) if len(found) == 2 else None
