"""The page on surgery runs from top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "surgery.md"


def test_the_page_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M):
            exec(compile(code, PAGE.name, "exec"), names)
    said = capsys.readouterr().out
    assert "tensor([0, 1, 2, 3, 4, 5, 6, 7])" in said
    assert "0 (8, 27) (4, 27)\n3 (16, 72) (8, 36)\n8 (10, 64) (10, 32)\n" in said
    assert said.endswith("2 1 32\n")
    assert names["dead"] == 12
