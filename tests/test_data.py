"""Windows of tokens: where they come from, what they share, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from laconic.data.sampled import sample_windows
from laconic.data.text import calibration_windows, evaluation_windows, read_text, split_text
from laconic.errors import DataError
from tests.needs import extra


def test_files_directories_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read_text(tmp_path) == "first\n\nsecond"
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(lines) == "one\n\ntwo"
    lines.write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match="'text'"):
        read_text(lines)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no text files"):
        read_text(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not UTF-8"):
        read_text(tmp_path / "x.txt")


def test_a_hub_data_set_is_read_through_its_library(tmp_path: Path) -> None:
    """A local folder of JSON lines stands in for the hub: the code path is the same, the network is not needed."""
    extra("datasets")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(3)))
    assert read_text(f"hub:{tmp_path}") == "row 0\n\nrow 1\n\nrow 2"
    with pytest.raises(DataError, match="cannot be read"):
        read_text("hub:nobody/has-this-one")


def test_calibration_never_sees_the_reports_text() -> None:
    text = "\n".join(f"line {i}" for i in range(1000)) + "\n"
    calibration, test = split_text(text)
    assert calibration + test == text
    assert 0.08 < len(test) / len(text) < 0.12
    assert calibration.endswith("\n")


def test_calibration_windows_are_the_seeds(tokenizer: transformers.PreTrainedTokenizerFast, text: Path) -> None:
    body = text.read_text()
    first = calibration_windows(body, tokenizer, 8, 32, 0, "t")
    state = torch.random.get_rng_state()
    assert torch.equal(calibration_windows(body, tokenizer, 8, 32, 0, "t").tokens, first.tokens)
    assert not torch.equal(calibration_windows(body, tokenizer, 8, 32, 1, "t").tokens, first.tokens)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.tokens.shape == (8, 32)
    assert len(first.hash) == 64


def test_long_texts_are_sampled_without_tokenising_them_whole(
    tokenizer: transformers.PreTrainedTokenizerFast, text: Path
) -> None:
    body = text.read_text() * 50
    calls = []

    class Counting:
        def __call__(self, part: str, **options: object) -> dict[str, list[int]]:
            calls.append(len(part))
            return tokenizer(part, **options)

    windows = calibration_windows(body, Counting(), 4, 32, 0, "t")
    assert windows.tokens.shape == (4, 32)
    assert sum(calls) < len(body) / 10


@pytest.mark.parametrize("body", ["", "   \n"])
def test_empty_text_says_how_much_is_needed(tokenizer: transformers.PreTrainedTokenizerFast, body: str) -> None:
    with pytest.raises(DataError, match=r"empty; 4,096 tokens are needed \(128 windows of 32\)"):
        calibration_windows(body, tokenizer, 128, 32, 0, "t")


def test_short_text_says_how_much_is_needed_and_what_fits(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"4,096 tokens are needed \(128 windows of 32\), the text has \d+, or ask for --samples \d"
    ):
        calibration_windows("The old fox sees the cat. " * 20, tokenizer, 128, 32, 0, "t")
    with pytest.raises(DataError, match="at least 500 tokens are needed"):
        evaluation_windows("The old fox.", tokenizer, 500, None, "t")


def test_evaluation_windows_are_the_text_cut_once(tokenizer: transformers.PreTrainedTokenizerFast, text: Path) -> None:
    body = text.read_text()
    ids = tokenizer(body, add_special_tokens=False, verbose=False)["input_ids"]
    windows = evaluation_windows(body, tokenizer, 32, None, "t")
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert evaluation_windows(body, tokenizer, 32, 100, "t").tokens.shape == (3, 32)


def test_a_model_writes_its_own_calibration_text(tiny: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    state = torch.random.get_rng_state()
    windows = sample_windows(model, 6, 20, seed=0, batch=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(sample_windows(model, 6, 20, seed=0, batch=4).tokens, windows.tokens)
    assert windows.tokens.shape == (6, 20)
    # the first tokens after the start are the model's most likely ones
    with torch.no_grad():
        logits = model(windows.tokens[:, :4]).logits
    logits[..., 0] = -torch.inf
    assert torch.equal(logits.argmax(-1), windows.tokens[:, 1:5])
