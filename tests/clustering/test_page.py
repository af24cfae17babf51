"""The page on clustering during training: its examples run, the script under torchrun too."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic as lc
from laconic.weights import Codebook, installed
from tests.needs import extra
from tests.processes import PATIENCE
from tests.test_docs import DOCS, ROOT, blocks

PAGE = DOCS / "edkm.md"
SCRIPT = "# train.py\n"


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the script for several processes."""
    extra("accelerate")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(PAGE, "python"):
            if not code.startswith(SCRIPT):
                exec(compile(code, PAGE.name, "exec"), names)


def test_the_script_runs_in_two_processes(tmp_path: Path) -> None:
    (script,) = (code for code in blocks(PAGE, "python") if code.startswith(SCRIPT))
    assert any("torchrun --nproc-per-node 2 train.py" in text for text in blocks(PAGE, "bash"))
    (tmp_path / "train.py").write_text(script)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    found = lc.load_into(
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), tmp_path / "small"
    )
    assert all(isinstance(weight, Codebook) for weight in installed(found).values())
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert (found.eval()(x).argmax(1) == x[:, :8].argmax(1)).float().mean() > 0.5
