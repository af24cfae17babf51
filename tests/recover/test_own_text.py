"""Text that a model writes for its training: kept while it is written, gone on with, replaced where it is another's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.needs import extra

extra("optuna")

import laconic as lc
from laconic.data.sampled import sample_windows
from laconic.disk.store import stored_bytes
from laconic.host.progress import Log
from laconic.recover import own_text as module
from laconic.recover.checkpoint import STATE
from laconic.recover.own_text import is_own_text, own_text
from laconic.recover.text import text_task
from laconic.recover.train import Trainer
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


def kept(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if is_own_text(file))


def written(model: Any, folder: Path | None, windows: int = 10**6, seed: int = 3) -> list[torch.Tensor]:
    return [part.tokens for part in own_text(model, COUNTS, 6, seed, folder, Until(windows))]


@pytest.mark.parametrize("windows", [1, 33, 70, 71, 103])
def test_what_was_killed_goes_on_to_the_same_text(
    windows: int, model: Any, calls: list[int], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "_EVERY", -1.0)  # seconds: after every batch
    expected = [sample_windows(model, count, 6, 3 + i).tokens for i, count in enumerate(COUNTS)]
    whole = len(calls)
    with pytest.raises(Killed):
        written(model, tmp_path, windows)
    calls.clear()
    found = written(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lost = whole - len(calls)
    assert lost == {1: 0, 33: 5, 70: 10, 71: 15, 103: 20}[windows], (
        "batches before the one it was killed in are not written again"
    )
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(written(model, tmp_path), expected, strict=True))
    assert not calls
    assert load_file(kept(tmp_path)[0])["1"].dtype == torch.int32


def test_without_a_folder_nothing_is_kept(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert [len(part) for part in written(model, None)] == COUNTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut off", "empty", "one bit"])
def test_a_damaged_text_is_written_anew(
    damage: str, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = written(model, tmp_path)
    (file,) = kept(tmp_path)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"cut off": content[:-7], "empty": b"", "one bit": content}[damage])
    found = written(model, tmp_path)
    assert "damaged; the text is written anew" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))
    assert torch.equal(load_file(file)["0"].long(), found[0])


def test_texts_of_other_runs_are_left_alone(model: Any, calls: list[int], tmp_path: Path) -> None:
    """Another seed, size or model has a file of its own: a command that is refused later costs nobody what was written."""
    first = written(model, tmp_path)
    written(model, tmp_path, seed=4)
    own_text(model, [70, 32], 6, 3, tmp_path, Log())
    own_text(model, [70, 40], 5, 3, tmp_path, Log())
    calls.clear()
    assert torch.equal(written(model, tmp_path)[1], first[1])
    assert not calls
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:2] += 1
    assert not torch.equal(written(model, tmp_path)[0], first[0])
    assert len(kept(tmp_path)) == 5


def test_what_others_wrote_is_not_taken_for_it(tmp_path: Path) -> None:
    for name in ("own_text-notes.md", "own_text-0123456789ab.safetensors.bak", "own_text.safetensors"):
        assert not is_own_text(tmp_path / name)
    (tmp_path / "own_text-0123456789ab.safetensors").mkdir()
    assert not is_own_text(tmp_path / "own_text-0123456789ab.safetensors")
    assert is_own_text(tmp_path / "own_text-123456789abc.safetensors.77.tmp")


def test_two_workers_do_not_take_each_others_temporary_file(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    names = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda file, target: (names.append(file.name), replace(file, target))[1])
    written(model, tmp_path)
    assert [f".{os.getpid()}." in name and is_own_text(tmp_path / name) for name in names] == [True]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_recover_does_not_write_it_twice(resume: list[str], tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C in training, then the same command; nothing of it stays in a finished model's folder."""
    out = tmp_path / "out"
    recover = ["recover", tiny, *SELF, "--scheme", "RTN(4, 32)", "--recovery", "FineTune(2, checks=2)", "--out", out]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", _interrupted)
        stopped = laconic(*recover)
    assert stopped.exit_code == 130, stopped.stderr
    assert len(kept(out)) == 1
    (out / f"{kept(out)[0].name}.123.tmp").write_bytes(b"")  # of runs that were killed while they wrote
    (out / f"{STATE}.tmp").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr(module, "sampled_batches", _nothing)
        done = laconic(*recover, *resume)
    assert done.exit_code == 0, done.stderr
    assert not [file for file in out.iterdir() if is_own_text(file) or file.name.startswith(STATE)]
    assert json.loads((out / "recovery.json").read_text())["stored_bytes"] == stored_bytes(out)


def test_search_does_not_write_it_twice(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    search = [
        "search",
        tiny,
        *SELF,
        "--scheme",
        "[('*', Magnitude(Free(0, 0.5)) >> RTN(8, 32))]",
        "--recovery",
        "Direct()",
        "--keep",
        9,
    ]
    found = laconic(*search, "--trials", 1, "--out", tmp_path / "s")
    assert found.exit_code == 0, found.stderr
    with monkeypatch.context() as patched:
        patched.setattr(module, "sampled_batches", _nothing)
        for more in (["--trials", 2, "--resume"], ["--trials", 1, "--overwrite"]):
            found = laconic(*search, *more, "--out", tmp_path / "s")
            assert found.exit_code == 0, found.stderr
    assert lc.load(tmp_path / "s" / "model") is not None
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(module, "sampled_batches", None)  # what is refused is refused before anything is written
        for code, wrong in (
            (8, []),
            (8, ["--seed", 7]),
            (8, ["--resume", "--scheme", "RTN(4, 32)"]),
            (4, ["--resume", "--test", "/nowhere/test.txt"]),
            (8, ["--storage", tmp_path / "s" / "study.db"]),
            (2, ["--overwrite", "--scheme", "RTN(4, Free(choices=(-5,)))"]),
        ):
            refused = laconic(*search, *wrong, "--out", tmp_path / "s")
            assert (refused.exit_code, refused.exception.__class__) == (code, SystemExit), refused.stderr
        (tmp_path / "file").write_text("")
        assert laconic(*search, "--out", tmp_path / "file").exit_code == 5
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()} == before


@pytest.fixture(autouse=True)
def little_to_check(monkeypatch: Any) -> None:
    """Writing 65,536 tokens for validation and test, and drawing a report, would take most of the time."""
    monkeypatch.setitem(text_task.__kwdefaults__, "check_tokens", 512)
    monkeypatch.setattr("laconic.show.search_page.render_search", lambda result: "<html></html>")


def _interrupted(*_: Any, **__: Any) -> float:
    raise KeyboardInterrupt


def _nothing(_: Any, samples: int, *__: Any) -> list[torch.Tensor]:
    assert samples == 0, "the text is there"
    return []
