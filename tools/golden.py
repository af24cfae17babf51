"""Compare what two versions of laconic write: sha256 of every file, scheme by scheme.

    python tools/golden.py --base REV                 # every case, REV against the working tree, in one run (about ten minutes on two cores)
    python tools/golden.py --base REV --only gptq lc  # the cases whose names begin so
    python tools/golden.py --write FOLDER             # the cases of the laconic that Python finds, into FOLDER, and their digests

Both sides run this file, with one thread, each with its own `laconic` on the path. Reports are left out: they hold
seconds. What REV wrote is kept (`--cache`) and made again only for another revision or another text of this file. A
refactoring keeps every digest; a mended fault says which it changed. Exit code 1 where a file differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("report.json", "report.html", "recovery.json", "search.json", "search.html", "index.html", "study.db")
"""Files that hold seconds and machines, and no part of a model."""

DIRECTORY: dict[str, Any] = {
    "rtn": "RTN(bits=4, group=32)",
    "rtn-second": "RTN(bits=3, group=16, symmetric=True, second=(4, 16), codec='ans')",
    "gptq": "GPTQ(bits=3, group=32)",
    "gptq-rate-model": "GPTQ(rate=2.5)",
    "gptq-rate-matrix": "GPTQ(rate=3.0, over='matrix')",
    "kmeans": "KMeans(bits=4, rows=64)",
    "kmeans-fisher": "KMeans(bits=3, weights='fisher')",
    "gptvq": "GPTVQ(bits=6, dimension=2)",
    "sparse-then-codes": "Magnitude(sparsity=0.5) >> KMeans(bits=3)",
    "sparsegpt": "SparseGPT(pattern='2:4') >> RTN(bits=4)",
    "threshold": "Magnitude(sparsity=0.5, scope='model', criterion='taylor')",
    "low-rank": "LowRank(rank=0.25, weighted=True, factors=RTN(bits=8, group='channel'))",
    "sum": "GPTQ(bits=3, group=32) + EoRA(rank=4)",
    "afm": "AFM(rank=0.5)",
    "hadamard": "Hadamard(GPTQ(bits=3, group=32))",
    "spqr": "SpQR(bits=3)",
    "awq": "AWQ(bits=3, group=32)",
    "smoothquant": "[('*embed*', Keep()), ('lm_head', Keep()), ('*', SmoothQuant())]",
    "plan": "[('*.mlp.down_proj', GPTQ(bits=4)), ('*embed*', RTN(bits=8, group='channel', codec='ans')), ('*.v_proj', Keep()), ('*', RTN(bits=3))]",
}
MODULE: dict[str, str] = {
    "net-rtn": "RTN(bits=4, group='channel')",
    "net-wanda": "Wanda(sparsity=0.5) >> Cast('float16')",
    "net-blocks": "BlockPrune(sparsity=0.3, block=3)",
    "net-dkm": "DKM(bits=2)",
    "net-gptq": "GPTQ(bits=3, group='channel')",
    "net-plan": "[('1', Keep()), ('*', LowRank(rank=0.5))]",
}


def recoveries() -> dict[str, tuple[str, Any]]:
    """A few steps of every recovery, by name: scheme and how."""
    import laconic as lc

    steps = lc.Steps(lr=0.02, lr_end=0.005)
    return {
        "direct": ("Magnitude(sparsity=0.5, scope='model') >> Cast('float16')", lc.Direct(norm_batches=2)),
        "direct-gptq": ("GPTQ(bits=3, group='channel')", lc.Direct()),
        "lc": (
            "Magnitude(sparsity=0.6, scope='model') >> KMeans(bits=3)",
            lc.LC(3, 3, mu=0.3, learn=steps, norm_batches=2),
        ),
        "lc-then": (
            "RTN(bits=2, group='channel')",
            lc.LC(2, 3, learn=steps, then=lc.FineTune(4, learn=steps, checks=2)),
        ),
        "lc-filters": ("FilterPrune(sparsity=0.4)", lc.LC(2, 3, mu=0.3, learn=steps, norm_batches=2)),
        "finetune": ("RTN(bits=3, group='channel')", lc.FineTune(6, learn=steps, checks=2, norm_batches=2)),
        "finetune-dkm": ("DKM(bits=2, tau=0.01)", lc.FineTune(6, learn=steps, checks=2)),
        "finetune-distilled": (
            "KMeans(bits=3)",
            lc.FineTune(4, learn=lc.Steps(lr=0.01, optimizer="adam", distill=1.0), checks=2),
        ),
    }


def write(folder: Path, only: list[str]) -> dict[str, dict[str, str]]:
    """Carry out the cases; returns the digest of every file they wrote, or of the error that one ended in."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for name, case in cases().items():
        if only and not any(name.startswith(start) for start in only):
            continue
        place = folder / name
        try:
            case(place)
        except Exception as error:  # noqa: BLE001 - whatever a version says is what is compared
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            files = sorted(
                file
                for file in place.rglob("*")
                if file.is_file() and file.name not in LEFT_OUT and not file.name.startswith(".")
            )
            found[name] = {
                str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
            }
        print(
            f"{name}: {'; '.join(f'{file} {digest[:8]}' for file, digest in found[name].items())[:150]}",
            file=sys.stderr,
            flush=True,
        )
    return found


def cases() -> dict[str, Callable[[Path], Any]]:
    """Every case: what it writes into a folder."""
    found: dict[str, Callable[[Path], Any]] = {}
    for name, scheme in DIRECTORY.items():
        found[name] = lambda place, scheme=scheme: _directory(place, scheme)
    for name, scheme in MODULE.items():
        found[name] = lambda place, scheme=scheme: _module(place, scheme)
    for name in (
        "direct",
        "direct-gptq",
        "lc",
        "lc-then",
        "lc-filters",
        "finetune",
        "finetune-dkm",
        "finetune-distilled",
    ):
        found[name] = lambda place, name=name: _recovered(place, name)
    found["search"] = _searched
    return found


def _directory(place: Path, scheme: str) -> None:
    """The embedded language model, from its files."""
    import laconic as lc
    from laconic.demo import corpus

    Path("text.txt").write_text("\n".join(corpus.training_text()), encoding="utf-8")
    if not Path("model").exists():  # config and manifest hold the paths they are given
        shutil.copytree(Path(corpus.__file__).parent / "model", "model")
    lc.compress("model", scheme, out=place, data="text.txt", samples=4, length=64, evaluate=False)


def _net() -> Any:
    """A small conv net, the same on every side."""
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


def _batches(seed: int, number: int = 8) -> list[Any]:
    """Labelled pictures [16, 8, 8], the same on every side."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(0, 10, (16,), generator=generator) for _ in range(number)]
    return [(torch.randn(16, 8, 8, generator=generator) + 0.3 * label[:, None, None], label) for label in labels]


def _module(place: Path, scheme: str) -> None:
    """The conv net, in memory."""
    import laconic as lc

    net, _ = lc.compress(_net().eval(), scheme, data=[batch for batch, _ in _batches(1)])
    lc.save(net, place)


def _recovered(place: Path, name: str) -> None:
    """The conv net after some steps of a recovery."""
    import laconic as lc

    scheme, how = recoveries()[name]
    net, _ = lc.recover(_net(), scheme, how, train=_batches(1), validation=_batches(2, 2))
    lc.save(net, place)


def _searched(place: Path) -> None:
    """What a search of three trials delivers."""
    import laconic as lc

    how = lc.LC(2, 3, mu=0.3, learn=lc.Steps(lr=0.02, lr_end=0.005))
    scheme = "Magnitude(sparsity=Free(0, 1), scope='model') >> Cast('float16')"
    lc.search(
        _net(), scheme, objective=lc.Maximize(_zeros), keep=lc.within(0.5), recover=how, train=_batches(1),
        validation=_batches(2, 2), test=_batches(3, 2), out=place, trials=3,
    )  # fmt: skip


def _zeros(candidate: Any) -> float:
    """Zeros of the network that would run."""
    return float(sum((p == 0).sum() for p in candidate.network.parameters()))


def side(tree: Path, only: list[str]) -> dict[str, dict[str, str]]:
    """The digests of the laconic in a checkout, from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="laconic-golden-") as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, __file__, "--write", folder, *(["--only", *only] if only else [])]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, dict[str, str]] = json.loads(done.stdout)
        return found


def of_revision(revision: str, cache: Path, only: list[str]) -> dict[str, dict[str, str]]:
    """The digests of a revision, from the cache or from a checkout of it."""
    full = subprocess.run(
        ["git", "rev-parse", revision], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    text = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    file = cache / f"golden-{full[:12]}-{text[:12]}.json"
    known: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.is_file() else {}
    missing = [
        name for name in cases() if name not in known and (not only or any(name.startswith(start) for start in only))
    ]
    if missing:
        with tempfile.TemporaryDirectory(prefix="laconic-base-") as folder:
            tree = Path(folder) / "tree"
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(tree), full], cwd=ROOT, check=True, capture_output=True
            )
            try:
                known |= side(tree, missing)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
    return known


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", metavar="REV", help="the revision to compare the working tree with")
    options.add_argument(
        "--write", type=Path, metavar="FOLDER", help="carry out the cases here and print their digests"
    )
    options.add_argument("--only", nargs="+", default=[], metavar="NAME", help="the cases whose names begin so")
    options.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "laconic-golden",
        help="where digests of revisions are kept",
    )
    args = options.parse_args()
    if args.write is not None:
        print(json.dumps(write(args.write, args.only)))
        return
    if args.base is None:
        options.error("give --base REV or --write FOLDER")
    before, now = of_revision(args.base, args.cache, args.only), side(ROOT, args.only)
    differing = 0
    for name, files in now.items():
        changed = sorted(
            file for file in files.keys() | before[name].keys() if files.get(file) != before[name].get(file)
        )
        differing += bool(changed)
        error = files.get("error") or before[name].get("error")
        print(
            f"{name:22} {'same' if not changed else 'differs: ' + ', '.join(changed)}{f' ({error})' if error else ''}"
        )
    print(f"{len(now)} cases, {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
