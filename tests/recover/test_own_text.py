"""Text that a model writes for its training: kept while it is written, gone on with, replaced where it is another's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

pytest.importorskip("optuna")

import laconic as lc
from laconic.data import sample_windows
from laconic.progress import Log
from laconic.recover import own_text as module
from laconic.recover.own_text import OWN_TEXT, own_text
from laconic.recover.text import text_task
from laconic.recover.train import Trainer
from laconic.store import stored_bytes
from tests.test_cli import laconic

COUNTS = [70, 40]  # batches of 32, 32, 6 and 32, 8
SELF = ["--data", "self", "--length", 64, "--batch", 4, "--train-tokens", 1024]


class Killed(Exception):  # noqa: N818 - what happens to a run
    pass


class Until(Log):
    """Progress that ends the run after so many windows."""

    def __init__(self, windows: int = 10**6) -> None:
        self.left = windows

    def advance(self, units: float, note: str = "") -> None:
        self.left -= int(units)
        if self.left <= 0:
            raise Killed


@pytest.fixture
def model(tiny: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture
def calls(model: Any) -> list[int]:
    """A list that gets an entry for every token the model writes."""
    made: list[int] = []
    model.register_forward_hook(lambda *_: made.append(1))
    return made


def written(model: Any, folder: Path | None, windows: int = 10**6, seed: int = 3) -> list[torch.Tensor]:
    return [part.tokens for part in own_text(model, COUNTS, 6, seed, folder, Until(windows))]


@pytest.mark.parametrize("windows", [1, 33, 70, 71, 103])
def test_what_was_killed_goes_on_to_the_same_text(windows: int, model: Any, calls: list[int], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_EVERY", -1.0)  # seconds: after every batch
    expected = [sample_windows(model, count, 6, 3 + i).tokens for i, count in enumerate(COUNTS)]
    whole = len(calls)
    with pytest.raises(Killed):
        written(model, tmp_path, windows)
    calls.clear()
    found = written(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lost = whole - len(calls)
    assert lost == {1: 0, 33: 5, 70: 10, 71: 15, 103: 20}[windows], "batches before the one it was killed in are not written again"
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(written(model, tmp_path), expected, strict=True))
    assert not calls
    assert load_file(tmp_path / OWN_TEXT)["1"].dtype == torch.int32


def test_without_a_folder_nothing_is_kept(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert [len(part) for part in written(model, None)] == COUNTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["seed", "model", "size", "cut off", "empty"])
def test_what_does_not_fit_is_replaced(other: str, model: Any, tmp_path: Path) -> None:
    file = tmp_path / OWN_TEXT
    before = written(model, tmp_path, seed=4 if other == "seed" else 3)
    if other == "model":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:2] += 1
    elif other == "size":
        own_text(model, [70, 32], 6, 3, tmp_path, Log())
    elif other in ("cut off", "empty"):
        file.write_bytes(file.read_bytes()[: 0 if other == "empty" else -7])
    found = written(model, tmp_path)
    assert torch.equal(load_file(file)["0"].long(), found[0])
    assert torch.equal(found[0], sample_windows(model, 70, 6, 3).tokens)
    assert torch.equal(before[0], found[0]) == (other not in ("seed", "model"))


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_recover_does_not_write_it_twice(resume: list[str], tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C in training, then the same command; nothing of it stays in a finished model's folder."""
    out = tmp_path / "out"
    recover = ["recover", tiny, *SELF, "--scheme", "RTN(4, 32)", "--recovery", "FineTune(2, checks=2)", "--out", out]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", _interrupted)
        stopped = laconic(*recover)
    assert stopped.exit_code == 130, stopped.stderr
    assert (out / OWN_TEXT).is_file()
    with monkeypatch.context() as patched:
        patched.setattr(module, "sampled_batches", _nothing)
        done = laconic(*recover, *resume)
    assert done.exit_code == 0, done.stderr
    assert not (out / OWN_TEXT).exists()
    assert json.loads((out / "recovery.json").read_text())["stored_bytes"] == stored_bytes(out)


def test_search_does_not_write_it_twice(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    search = ["search", tiny, *SELF, "--scheme", "[('*', Magnitude(Free(0, 0.5)) >> RTN(8, 32))]", "--recovery", "Direct()", "--keep", 9]
    found = laconic(*search, "--trials", 1, "--out", tmp_path / "s")
    assert found.exit_code == 0, found.stderr
    with monkeypatch.context() as patched:
        patched.setattr(module, "sampled_batches", _nothing)
        for more in (["--trials", 2, "--resume"], ["--trials", 1, "--overwrite"]):
            found = laconic(*search, *more, "--out", tmp_path / "s")
            assert found.exit_code == 0, found.stderr
    assert lc.load(tmp_path / "s" / "model") is not None


@pytest.fixture(autouse=True)
def little_to_check(monkeypatch: Any) -> None:
    """Writing 65,536 tokens for validation and test, and drawing a report, would take most of the time."""
    monkeypatch.setitem(text_task.__kwdefaults__, "check_tokens", 512)
    monkeypatch.setattr(sys.modules["laconic.search.report"], "render_search", lambda result: "<html></html>")


def _interrupted(*_: Any, **__: Any) -> float:
    raise KeyboardInterrupt


def _nothing(_: Any, samples: int, *__: Any) -> list[torch.Tensor]:
    assert samples == 0, "the text is there"
    return []
