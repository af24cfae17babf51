"""Installs every peer into a virtual environment of its own: `python install.py [PEER ...] [--root DIR]`.

Needs only the standard library. Each `ROOT/PEER/` receives `venv/` (the environment), `constraints.txt` and `versions.txt`
(`pip freeze` of the finished environment, which also marks it as complete).
"""

import argparse
import os
import subprocess
import venv
from pathlib import Path

TORCH = "torch==2.13.0"  # exactly this: a CPU wheel exists for it, any other request may download gigabytes of CUDA

# What each environment needs besides torch. The peer itself comes first, at the version the runner was tested with.
PEERS: dict[str, tuple[str, ...]] = {
    "llmcompressor": ("llmcompressor==0.14.0",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "autoround": (
        "auto-round==0.16.0",
        "auto-round-lib==0.16.0",
    ),  # without the kernels its 4-bit files do not load on a CPU
    "hqq": ("hqq==0.2.8",),
    "quanto": ("optimum-quanto==0.2.7", "transformers==5.23.0", "accelerate==1.15.0"),
}


def default_root() -> Path:
    """The folder that holds the environments when `--root` is not given."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "laconic-peers"


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder` (= ROOT/PEER)."""
    return folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_complete(folder: Path, requirements: tuple[str, ...]) -> bool:
    """Whether `folder` holds a finished environment with torch and exactly these pinned requirements."""
    record = folder / "versions.txt"
    if not record.is_file() or not python_of(folder).exists():
        return False
    frozen = [line.replace("_", "-").lower() for line in record.read_text().splitlines()]
    wanted = [spec.replace("_", "-").lower() for spec in (TORCH, *requirements)]
    return all(any(line == spec or line.startswith(spec + "+") for line in frozen) for spec in wanted)


def pip(python: Path, *arguments: str) -> str:
    """Runs pip in the environment of `python` and returns its standard output; complaints go to our standard error.

    Raises: subprocess.CalledProcessError when pip fails.
    """
    command = [str(python), "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install(peer: str, root: Path) -> Path:
    """Creates the environment of one peer unless it is there already, and returns its interpreter."""
    folder, requirements = root / peer, PEERS[peer]
    python = python_of(folder)
    if is_complete(folder, requirements):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    (folder / "versions.txt").unlink(missing_ok=True)
    venv.create(folder / "venv", with_pip=True, clear=True)
    pip(python, "install", "--quiet", TORCH)
    pip(python, "install", "--quiet", "wheel", "setuptools")
    pip(python, "install", "--quiet", "--constraint", str(constraints), *requirements)
    (folder / "versions.txt").write_text(pip(python, "freeze"))
    return python


def main() -> None:
    """Installs the peers named on the command line (all by default) and prints the interpreter of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"any of {', '.join(PEERS)}; default: all")
    parser.add_argument("--root", type=Path, default=default_root(), help="where the environments live")
    arguments = parser.parse_args()
    if unknown := [peer for peer in arguments.peers if peer not in PEERS]:
        parser.error(f"unknown peer {unknown[0]}: expected one of {', '.join(PEERS)}")
    for peer in arguments.peers or PEERS:
        print(peer, install(peer, arguments.root.resolve()), flush=True)


if __name__ == "__main__":
    main()
