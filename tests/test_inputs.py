"""What is known of data before the work: its tokenizer, its length, its ids, its kind. Nothing is written when it cannot be the model's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import laconic as lc
from laconic.data.modality import most_positions
from laconic.data.text import read_text
from laconic.measure.quality import evaluate_source

SMALL = dict(samples=4, length=16, test_tokens=64)
CHANNEL = "GPTQ(4, 'channel')"


def saved(model: Any, path: Path, tokenizer: Any | None) -> Path:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def llama(**changes: Any) -> Any:
    sizes = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(sizes | dict(max_position_embeddings=64) | changes))
    )


def refused(source: Path, data: str, out: Path, scheme: str = CHANNEL, **options: Any) -> str:
    with pytest.raises((lc.DataError, lc.CheckpointError)) as caught:
        lc.compress(source, scheme, data, out=out, **(SMALL | options))
    assert not out.exists(), "refused before anything is written"
    return str(caught.value)


@pytest.mark.parametrize("scheme", [CHANNEL, "RTN(4, 'channel')"])
def test_a_model_without_a_tokenizer_calibrates_itself(scheme: str, tmp_path: Path, text: Path) -> None:
    source = saved(llama(), tmp_path / "m", None)
    report = lc.compress(source, scheme, "self", out=tmp_path / "o", **SMALL)
    assert report.metrics["kl"] >= 0
    assert any("no samples of text" in note for note in report.notes)
    assert json.loads((tmp_path / "o" / "report.json").read_text())["samples"] == []
    for options in (dict(data=str(text)), dict(data="self", test=str(text))):
        assert "no tokenizer" in refused(source, out=tmp_path / "p", scheme=scheme, **options)


@pytest.mark.parametrize("data", ["text", "self"])
def test_windows_longer_than_the_positions_are_refused(data: str, tokenizer: Any, tmp_path: Path, text: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=0
    )
    source = saved(transformers.GPT2LMHeadModel(config), tmp_path / "g", tokenizer)
    given = str(text) if data == "text" else data
    for scheme in (CHANNEL, "RTN(4, 'channel')"):
        assert "takes at most 48 tokens, ask for --length 48" in refused(
            source, given, tmp_path / "o", scheme, length=49
        )
    with pytest.raises(lc.DataError, match="at most 48 tokens"):
        evaluate_source(source, data=str(text))
    assert lc.compress(source, CHANNEL, given, out=tmp_path / "o", **(SMALL | dict(length=48))).metrics["tokens"] == 47


def test_how_many_positions_a_model_has() -> None:
    sizes = dict(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with torch.device("meta"):
        assert (
            most_positions(transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=40))) == 40
        )
        roberta = transformers.RobertaModel(
            transformers.RobertaConfig(**sizes, max_position_embeddings=42, pad_token_id=1)
        )
        assert most_positions(roberta) == 40, "positions are counted from behind the padding index"
        assert (
            most_positions(
                transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24))
            )
            == 24
        )
        mamba = transformers.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1)
        assert most_positions(transformers.MambaForCausalLM(mamba)) is None
    assert most_positions(torch.nn.Linear(2, 2)) is None


def test_as_many_positions_as_are_said_are_taken(tokenizer: Any, tmp_path: Path, text: Path) -> None:
    """A table with a padding index holds fewer positions than rows, and exactly so many are taken."""
    sizes = dict(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1)
    source = saved(transformers.RobertaModel(config), tmp_path / "r", tokenizer)
    assert "at most 18 tokens" in refused(source, str(text), tmp_path / "o", length=19)
    assert (
        lc.compress(source, CHANNEL, str(text), out=tmp_path / "o", samples=2, length=18, test_tokens=36).metrics[
            "cosine"
        ]
        > 0.9
    )


def test_ids_without_a_row_are_refused(tokenizer: Any, tmp_path: Path, text: Path) -> None:
    source = saved(llama(vocab_size=100), tmp_path / "v", tokenizer)
    for scheme in (CHANNEL, "RTN(4, 'channel')"):
        message = refused(source, str(text), tmp_path / "o", scheme)
        assert "TokenizersBackend" in message
        assert "model.embed_tokens has 100 rows" in message
    with pytest.raises(lc.DataError, match="embed_tokens has 100 rows"):
        evaluate_source(source, data=str(text), length=16)
    assert lc.compress(source, CHANNEL, "self", out=tmp_path / "o", **SMALL, evaluate=False).stored_bytes > 0, (
        "sampled inside the embedding"
    )


def vit() -> Any:
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def whisper() -> Any:
    layers = dict(
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    places = dict(num_mel_bins=8, max_source_positions=20, max_target_positions=16)
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(vocab_size=320, d_model=32, **layers, **places, **ids)
    )


@pytest.mark.parametrize(("make", "kind"), [(vit, "images"), (whisper, "sound")])
def test_models_of_other_kinds_are_refused_text(
    make: Any, kind: str, tokenizer: Any, tmp_path: Path, text: Path
) -> None:
    source = saved(make(), tmp_path / "m", tokenizer)
    assert "writes no text" in refused(source, "self", tmp_path / "o")
    for scheme in (CHANNEL, "RTN(4, 'channel')"):
        assert f"reads {kind}" in refused(source, str(text), tmp_path / "o", scheme)
    with pytest.raises(lc.DataError, match=f"reads {kind}"):
        evaluate_source(source, reference=source, data=str(text), length=16)
    report = lc.compress(source, "RTN(4, 'channel')", out=tmp_path / "o")
    assert report.metrics == {}
    assert any("no figures of quality" in note for note in report.notes)


def test_an_encoder_decoder_reads_one_half_and_writes_the_other(tokenizer: Any, tmp_path: Path, text: Path) -> None:
    config = transformers.T5Config(
        vocab_size=320, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    source = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5", tokenizer)
    assert "writes no text" in refused(source, "self", tmp_path / "o")
    report = lc.compress(source, CHANNEL, str(text), out=tmp_path / "o", **SMALL)
    assert 0 < report.metrics["relative_error"] < 0.2
    assert evaluate_source(tmp_path / "o", reference=source, data=str(text), length=16, tokens=64)["cosine"] > 0.9


def test_a_call_that_fails_is_tried_before_the_work(tokenizer: Any, tmp_path: Path, text: Path) -> None:
    """CLIP reads ids, but not alone."""
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=part | dict(vocab_size=320, max_position_embeddings=32),
        vision_config=part | dict(image_size=16, patch_size=8),
        projection_dim=8,
    )
    source = saved(transformers.CLIPModel(config), tmp_path / "c", tokenizer)
    message = refused(source, str(text), tmp_path / "o")
    assert "CLIPModel cannot be called with input_ids [1, 16]" in message


def test_texts_that_are_none(tmp_path: Path, tiny: Path) -> None:
    for name, content, words in (
        ("utf16.txt", "text\n".encode("utf-16"), "UTF-16"),
        ("binary.txt", b"a\0b" * 100, "zero bytes"),
        ("latin.txt", b"\xe9t\xe9", "not UTF-8"),
        ("rows.jsonl", b'{"text": 3}\n', "line 1"),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "line 2"),
        ("deep.jsonl", b"[" * 200_000, "line 1"),
        ("empty.txt", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refused(tiny, str(tmp_path / name), tmp_path / "o"), name


def test_texts_as_they_come(tmp_path: Path) -> None:
    """Lines end as the platform ends them, a mark says UTF-8, and a string may hold every separator that is no line's end."""
    for name, content, expected in (
        ("bom.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}', "one\n\ntwo"),
        ("separators.jsonl", '{"text": "a\u2028b\u2029c\x85d"}\n{"text": "e"}\n'.encode(), "a\u2028b\u2029c\x85d\n\ne"),
        ("UPPER.TXT", b"one", "one"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == expected, name
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "UPPER.TXT", folder)
    assert read_text(folder) == "one"
