"""A compressed directory made better part by part, with a block in memory at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.disk.load import CompressedCheckpoint
from laconic.disk.store import read_manifest, stored_bytes
from laconic.errors import OutputError, SchemeError
from laconic.model.residence import Residence
from laconic.recover import AdaRound, Blockwise, Direct, Steps
from laconic.recover.directory import reconstruct_directory

ADAM = Steps("adam", lr=1e-2, lr_end=1e-3)
HOWS = {"adaround": AdaRound(60, 8, checks=1), "side": Blockwise(20, 8, ADAM, fisher=True)}


@pytest.fixture(scope="module")
def compressed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "compressed"
    lc.compress(tiny, "RTN(2, 16)", out=out, keep="embedding", evaluate=False)
    return out


def minibatches(tiny: Path, count: int = 8) -> list[dict[str, Any]]:
    size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(size, (2, 12), generator=g), "use_cache": False} for _ in range(count)]


def distance(tiny: Path, folder: Path) -> float:
    """Between the outputs of a stored model and those of the original, on text that nothing was trained on."""
    batch = {"input_ids": torch.randint(100, (8, 12), generator=torch.Generator().manual_seed(9)), "use_cache": False}
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        own, other = (model(**batch).logits for model in (lc.load(folder, dtype=torch.float32), original))
    return float((own - other).square().mean())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_it_loses_less_at_the_same_size_and_resumes_to_the_same_bytes(
    how: Any, tiny: Path, compressed: Path, tmp_path: Path
) -> None:
    data = minibatches(tiny)
    told = reconstruct_directory(tiny, compressed, how, data, tmp_path / "whole")
    assert [part["part"] for part in told["parts"]] == [f"model.layers.{i}" for i in range(len(told["parts"]))]
    assert all(part["after"] < part["before"] for part in told["parts"] if not part["note"])
    assert distance(tiny, tmp_path / "whole") < distance(tiny, compressed)
    stored = CompressedCheckpoint(tmp_path / "whole").stored
    assert stored.verify() > 0
    before = CompressedCheckpoint(compressed).stored
    assert stored.weights == before.weights  # the same specs, so the same sizes
    assert abs(stored_bytes(tmp_path / "whole") - stored_bytes(compressed)) < 4096
    assert read_manifest(tmp_path / "whole")["reconstruction"]["recovery"] == repr(how)

    class Killed(Exception):  # noqa: N818
        pass

    class Kill:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def advance(self, units: float, note: str = "") -> None:
            if note.endswith("layers.0"):
                raise Killed

    with pytest.raises(Killed):
        reconstruct_directory(tiny, compressed, how, data, tmp_path / "again", progress=Kill())  # type: ignore[arg-type]
    assert not (tmp_path / "again" / "laconic.json").exists()
    with pytest.raises(OutputError):
        reconstruct_directory(tiny, compressed, how, data, tmp_path / "again")
    again = reconstruct_directory(tiny, compressed, how, data, tmp_path / "again", resume=True)
    assert again == told
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert reconstruct_directory(tiny, compressed, how, data, tmp_path / "again", resume=True) == told


def test_one_block_of_either_model_is_in_memory(
    tiny: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: dict[int, int] = {}
    load = Residence._load

    def counted(self: Residence, path: str, *more: Any) -> list[int]:
        found = load(self, path, *more)
        blocks = [held for held in (*self._held, path) if ".layers." in held and (held == path or self._held.get(held))]
        most[id(self)] = max(most.get(id(self), 0), len(set(blocks)))
        return found

    monkeypatch.setattr(Residence, "_load", counted)
    reconstruct_directory(tiny, compressed, AdaRound(2, 3), minibatches(tiny, 3), tmp_path / "out")
    assert list(most.values()) == [1, 1]


def test_what_cannot_be_done_is_refused(tiny: Path, compressed: Path, tmp_path: Path) -> None:
    data, out = minibatches(tiny, 3), tmp_path / "out"
    with pytest.raises(SchemeError, match="say trains='side'"):
        reconstruct_directory(tiny, compressed, Blockwise(2, 3, trains="w"), data, out)
    with pytest.raises(SchemeError, match="part by part"):
        reconstruct_directory(tiny, compressed, Direct(), data, out)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="expected a compressed directory"):
        reconstruct_directory(tiny, tiny, AdaRound(2, 3), data, out)
    with pytest.raises(SchemeError, match="is compressed; expected the model"):
        reconstruct_directory(compressed, compressed, AdaRound(2, 3), data, out)
    with pytest.raises(SchemeError, match="at least two minibatches"):
        reconstruct_directory(tiny, compressed, AdaRound(2, 3), data[:1], out)


def test_the_command(tiny: Path, compressed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind came up the valley and nobody knew what it wanted there. " * 60)
    out = tmp_path / "out"
    words = [
        "recover",
        str(tiny),
        "--start",
        str(compressed),
        "--data",
        str(text),
        "--length",
        "16",
        "--batch",
        "2",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, [*words, "--recovery", "AdaRound(steps=3, samples=3)", "--json"])
    assert done.exit_code == 0, done.output
    assert [part["steps"] for part in json.loads(done.stdout)["parts"]] == [3] * len(json.loads(done.stdout)["parts"])
    lc.load(out)
    for more, word in ((["--scheme", "RTN"], "--scheme"), (["--recovery", "LC()"], "AdaRound")):
        refused = CliRunner().invoke(app, [*words, *more])
        assert refused.exit_code != 0
        assert word in refused.output
