"""A search that is killed again and again takes the samples of one that is not, waits for nobody, and leaves nothing behind."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laconic.disk.lock import LOCK
from tests.search.digits import Problem, run, sampled

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the workers are forked")
PATIENCE = 300


def killed_at(call: int, original: Callable[..., Any], before: bool) -> Callable[..., Any]:
    """A function that kills its process at its `call`-th call, before or after its work."""
    calls = 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **named)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


PLACES = [
    ("laconic.search.study", "SharedSampler.before_trial", 1, True), ("laconic.recover.checkpoint", "atomically", 2, False),
    ("laconic.recover.checkpoint", "atomically", 1, False), ("laconic.recover.checkpoint", "atomically", 1, False),
    ("laconic.recover.checkpoint", "atomically", 1, False), ("laconic.engine.saved", "write_manifest", 1, True),
    ("laconic.search.study", "tell", 1, True),
    ("laconic.search.study", "SharedSampler.sample_relative", 2, False), ("laconic.search.study", "tell", 1, False),
    ("laconic.search.outcome", "shutil.copytree", 1, False),
]  # fmt: skip


def worker(problem: Problem, out: Path, module: str, name: str, call: int, before: bool) -> None:
    owner: Any = sys.modules[module]
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, killed_at(call, getattr(owner, last), before))
    run(problem, out, resume=True)


def test_killed_at_any_moment_it_takes_the_same_samples(problem: Problem, no_pictures: None, tmp_path: Path) -> None:
    whole, out = run(problem, tmp_path / "w"), tmp_path / "s"
    for place in PLACES:
        process = multiprocessing.get_context("fork").Process(target=worker, args=(problem, out, *place))
        process.start()
        process.join(timeout=PATIENCE)
        assert process.exitcode == -signal.SIGKILL, place
    found = run(problem, out, resume=True)
    assert sampled(found) == sampled(whole)
    assert found.values == whole.values
    assert not [
        file
        for file in out.rglob("*")
        if file.name.endswith(".tmp") or file.name.startswith(".") or file.name == "recovery.safetensors"
    ]
    kept = [row for row in found.result["trials"] if row["state"] == "complete"]
    assert len(list((out / "trials").iterdir())) == len(kept)
    assert not (out / LOCK).exists()
