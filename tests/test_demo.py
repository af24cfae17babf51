"""The embedded default: a model small enough to ship, text that keeps its held-out modules out, and the demo's comparison."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from laconic.command.cli import app
from laconic.demo import corpus, demo
from laconic.disk.load import open_source
from laconic.errors import CheckpointError, OutputError
from laconic.host.progress import Log
from laconic.measure.quality import evaluate_source


def test_the_model_is_small_and_complete() -> None:
    source = open_source(demo.MODEL)
    assert type(source.skeleton).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in source.skeleton.parameters()) <= 4_000_000
    assert sum(file.stat().st_size for file in demo.MODEL.iterdir()) <= 8_000_000
    training = json.loads((demo.MODEL / "training.json").read_text())
    assert training["held_out_modules"] == list(corpus.HELD_OUT)
    assert training["curve"][-1]["step"] == int(training["arguments"]["steps"]), (
        "what is shipped is the end of its recipe"
    )


def test_it_learned_what_was_held_out(tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text("\n".join(corpus.held_out_text()), encoding="utf-8")
    found = evaluate_source(demo.MODEL, data=str(text), tokens=4096)
    assert found["nats_per_token"] < 3.0, "a uniform guess has 7.6 nats, single tokens' frequencies about 6"


def test_held_out_modules_are_nowhere_in_the_training_text() -> None:
    training, held_out = corpus.training_text(), corpus.held_out_text()
    assert len(held_out) == len(corpus.HELD_OUT)
    assert not set(training) & set(held_out)
    assert not any(text[:2000] in other for text in held_out for other in training)
    assert sum(map(len, training)) > 20 * sum(map(len, held_out)) > 0
    assert len(corpus.topics_text()) > 50


class Cells(HTMLParser):
    """The text of a page's table cells, and its links."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.links: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag == "td":
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bits only, on few tokens."""
    chosen = [row for row in demo.schemes() if row[0] == 2]
    monkeypatch.setattr(demo, "schemes", lambda: iter(chosen))
    monkeypatch.setattr(demo, "_TEST_TOKENS", 2048)


def test_the_demo_compares_three_schemes(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", "--out", str(out), "--samples", "16", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((out / "demo.json").read_text())
    rtn, gptq, rate = result["rows"]
    assert rate["matrix_bits"] <= gptq["matrix_bits"] == rtn["matrix_bits"], "at equal bytes"
    assert rate["kl"] < 0.5 * gptq["kl"] < 0.5 * rtn["kl"]
    assert [row["best"] for row in result["rows"]] == [False, False, True]
    page = Cells()
    page.feed((out / "index.html").read_text())
    assert {row["scheme"] for row in result["rows"]} <= set(page.cells)
    for row in result["rows"]:
        assert row["link"] in page.links
        assert (out / row["link"]).is_file()
        files = [
            file
            for file in (out / row["link"]).parent.iterdir()
            if file.suffix == ".safetensors" or file.name == "laconic.json"
        ]
        assert row["stored_bytes"] == sum(file.stat().st_size for file in files)

    again = CliRunner().invoke(app, ["demo", "--out", str(out), "--samples", "16"])
    assert again.exit_code == 0, again.output
    assert rate["scheme"] in again.stdout
    assert "same first token" in again.stdout


def test_a_folder_of_somebodys_stays(quick: None, tmp_path: Path) -> None:
    (tmp_path / "2-bits-rtn").mkdir()
    (tmp_path / "2-bits-rtn" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="thesis"):
        demo.run_demo(tmp_path, 16, Log())
    assert (tmp_path / "2-bits-rtn" / "thesis.txt").read_text() == "mine"


def test_an_installation_without_the_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", tmp_path / "absent")
    with pytest.raises(CheckpointError, match="embedded model is missing"):
        demo.run_demo(tmp_path / "out", 16, Log())


def test_peak_memory_is_predicted(tmp_path: Path) -> None:
    """In a process of its own, whose peak nothing else has raised."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpus.training_text()[:200]), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "laconic",
        "compress",
        str(demo.MODEL),
        "--scheme",
        "GPTQ(rate=3.0, over='matrix')",
        "--data",
        str(text),
    ]
    command += ["--samples", "32", "--test-tokens", "8192", "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout)["peak_memory"]
    assert 1.0 <= peak["expected"] / peak["actual"] < 1.6, peak
