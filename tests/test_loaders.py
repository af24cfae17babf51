"""Data of every kind: what comes as batches, how padding leaves no trace, what is held out, and one sentence for what is no data."""

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature

import laconic as lc
from laconic.data.loaders import Examples, as_batch, checked_data, for_model, joined, taken, without_padding
from laconic.data.media import read_wave
from laconic.data.reading import Reader
from laconic.errors import CheckpointError
from laconic.measure.quality import evaluate_source
from laconic.model.blocks import BlockModel, InMemory
from tests.needs import extra

CHANNEL = "GPTQ(4, 'channel')"


def llama(**changes: Any) -> Any:
    sizes = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **(sizes | dict(max_position_embeddings=64, initializer_range=0.1, bos_token_id=0) | changes)
        )
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def language(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loaders") / "llama"
    llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loaders") / "vit"
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(path)
    return path


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WRONG = [
    (torch.zeros(2, 8), r"a tensor of shape \[2, 8\]: for one batch pass \[tensor\]"),
    (np.zeros((2, 8)), r"an array of shape \[2, 8\]"),
    ({"x": torch.zeros(2, 8)}, "one dict with 'x'"),
    (BatchEncoding({"input_ids": torch.zeros(2, 8)}), "one BatchEncoding"),
    (3, "got a int"),
    (torch.nn.Linear(2, 2), "got a Linear"),
    (["a text"], "batch 0: .* got a str"),
    ((i for i in range(3)), "batch 0: .* got a int"),
    ([torch.zeros(2, 8), None], "batch 1: .* got a NoneType"),
    ([np.zeros((2, 8))], "torch.from_numpy"),
    ([{"text": "a"}], "a dict of tensors, got 'text' without any"),
    ([()], "got a tuple"),
    ([{"input_ids": [[1], [1, 2]]}], "lists of unequal length"),
]


@pytest.mark.parametrize(("data", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_no_data_is_one_sentence(data: Any, words: str, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(lc.DataError, match=words):
        taken(data, 4, 0)


def test_directories_and_modules_say_it_alike(vision: Path, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    for data in (torch.zeros(2, 8), {"x": torch.zeros(2, 8)}, 3, ["a"]):
        for source in (vision, net):
            options = {"out": tmp_path / "o"} if source is vision else {}
            with pytest.raises(lc.DataError, match="expected a"):
                lc.compress(source, CHANNEL, data, **options)
    with pytest.raises(lc.DataError, match=r"calibrated with batches it can be called with, not with 'books\.txt'"):
        lc.compress(net, CHANNEL, "books.txt")
    with pytest.raises(lc.DataError, match="expected batches, got none"):
        lc.compress(vision, CHANNEL, [], out=tmp_path / "o")
    with pytest.raises(lc.DataError, match=r"cannot be called with pixel_values \[1, 3, 17, 16\]"):
        lc.compress(vision, CHANNEL, [numbers(2, 3, 17, 16)], out=tmp_path / "o")
    with pytest.raises(lc.DataError, match=r"cannot be called with pixel_values \[1, 3, 15, 16\]"):
        lc.compress(
            vision, CHANNEL, [numbers(8, 3, 16, 16)], test=[numbers(2, 3, 15, 16)], samples=4, out=tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


def test_an_option_called_use_cache_makes_no_model_one_of_token_ids() -> None:
    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            return self.layer(x)

    _, report = lc.compress(Cached(), CHANNEL, [numbers(8, 64)])
    assert not report.sites[0].get("unmeasured")


def test_batches_come_in_many_forms(vision: Path, tmp_path: Path) -> None:
    """The same twenty images however they are packed: the same bytes."""
    images = numbers(20, 3, 16, 16)
    forms: list[Any] = [
        list(images.split(5)),
        (batch for batch in images.split(5)),
        [(part, torch.zeros(5)) for part in images.split(5)],
        [{"pixel_values": part, "labels": torch.zeros(5, dtype=torch.long)} for part in images.split(5)],
        [BatchFeature({"pixel_values": part}) for part in images.split(5)],
        DataLoader(TensorDataset(images, torch.zeros(20)), batch_size=5),
        TensorDataset(images),
        [{"pixel_values": image.numpy()} for image in images],
    ]
    source = transformers.ViTForImageClassification.from_pretrained(vision).eval()
    found = [
        Examples([for_model(as_batch(b, ""), source) for b in taken(checked_data(form), 99, 0)], "") for form in forms
    ]
    merged = [Examples(joined(examples.calls, 99), "").hash for examples in found]
    assert len(set(merged)) == 1
    report = lc.compress(vision, CHANNEL, forms[0], out=tmp_path / "o", samples=10)
    assert report["data"]["examples"] == 10
    assert report["data"]["inputs"] == {"pixel_values": [3, 16, 16]}
    assert 0 < report.metrics["relative_error"] < 0.2
    assert "examples" in (tmp_path / "o" / "report.html").read_text()


def test_what_measures_never_calibrates(vision: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(vision)
    images = numbers(40, 3, 16, 16)

    def read(data: Any, samples: int) -> tuple[Any, Any]:
        return Reader(model, vision, lambda: None, 16, 0).both(data, samples, None, 0, True, True)

    for size, samples in ((8, 99), (40, 99), (7, 10), (1, 4)):
        calibration, test = read(images.split(size), samples)
        seen = {tuple(row[0, 0].tolist()) for call in calibration.calls for row in call["pixel_values"]}
        held = {tuple(row[0, 0].tolist()) for call in test.calls for row in call["pixel_values"]}
        assert not seen & held
        assert len(held) >= 1
        assert len(seen) == (min(samples, 36) if size != 1 else 4)
    endless = (numbers(4, 3, 16, 16, seed=i) for i in range(10**9))
    calibration, test = read(endless, 18)
    assert (calibration.count, test.count) == (18, 2)
    reader = Reader(model, vision, lambda: None, 16, 0)
    assert reader.both([numbers(1, 3, 16, 16)], 4, None, 0, True, True)[1] is None
    assert "one example" in reader.notes[0]


def test_a_shuffling_loader_follows_the_seed_and_leaves_the_global_one_alone(language: Path, tmp_path: Path) -> None:
    """So a run is continued by the same call."""
    loader = DataLoader(TensorDataset(torch.arange(1, 301).view(30, 10)), batch_size=3, shuffle=True)
    state = torch.get_rng_state()
    first, second, other = (Examples(taken(loader, 99, seed), "").hash for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second != other


def padded(sequences: list[torch.Tensor], left: bool = False) -> dict[str, torch.Tensor]:
    """Sequences as one batch, filled up with zeros."""
    width = max(map(len, sequences))
    ids, mask = (
        torch.zeros(len(sequences), width, dtype=torch.long),
        torch.zeros(len(sequences), width, dtype=torch.long),
    )
    for i, row in enumerate(sequences):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True])
def test_padding_leaves_no_trace(left: bool, language: Path, tmp_path: Path) -> None:
    """Padded on either side or not at all: the same sums, and the same bytes."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 320, (n,), generator=generator) for n in (12, 5, 9, 12, 3, 12, 7, 7, 12, 6)]
    parts = without_padding(padded(rows, left))
    assert [part["input_ids"].shape for part in parts] == [
        (1, 12),
        (1, 5),
        (1, 9),
        (1, 12),
        (1, 3),
        (1, 12),
        (2, 7),
        (1, 12),
        (1, 6),
    ]
    assert all(part["attention_mask"].all() for part in parts)
    model, other = llama(), llama()
    lc.compress(model, CHANNEL, [padded(rows, left)])
    lc.compress(other, CHANNEL, [{"input_ids": row[None]} for row in rows])
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), other.state_dict()[name].float(), atol=1e-5), name
    report = lc.compress(language, CHANNEL, [padded(rows, left)], out=tmp_path / "o")
    assert report["data"]["examples"] == 9
    assert report.metrics["tokens"] == 5, "the sixth row, its first position not predicted"


def test_both_sides_of_an_encoder_decoder_lose_their_own_padding() -> None:
    ids, answers = torch.arange(8).view(2, 4), torch.arange(6).view(2, 3)
    batch = {
        "input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "decoder_input_ids": answers, "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
    }  # fmt: skip
    first, second = without_padding(batch)
    assert (first["input_ids"].tolist(), first["decoder_input_ids"].tolist()) == ([[0, 1]], [[0, 1, 2]])
    assert (second["input_ids"].tolist(), second["decoder_input_ids"].tolist()) == ([[4, 5, 6, 7]], [[3]])
    with pytest.raises(lc.DataError, match="every position"):
        without_padding({"input_ids": ids, "attention_mask": torch.zeros(2, 4)})


def test_labels_are_what_a_decoder_writes_and_no_loss() -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    made = for_model(
        {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([[5, 6, 7], [5, -100, -100]])}, model
    )
    assert "labels" not in made
    assert made["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 5, 0]]
    assert [part["decoder_input_ids"].shape[1] for part in without_padding(made)] == [3, 2]
    assert "labels" not in for_model({"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4)}, llama())


@torch.no_grad()
def test_a_block_is_run_twice_without_meeting_its_own_past() -> None:
    """A cache would hold the keys of the first run; batches are called without one."""
    model = llama()
    blocks = BlockModel(InMemory(model), "model.layers")
    batch = for_model(as_batch(torch.arange(1, 9)[None], ""), model)
    call = blocks.capture([batch])[0]
    first, second = (blocks.run(0, call.hidden, call) for _ in range(2))
    assert torch.equal(first, second)


def test_columns_of_a_data_set(language: Path, tmp_path: Path) -> None:
    datasets = extra("datasets")
    rows = {"input_ids": [list(range(1, 11))] * 20, "attention_mask": [[1] * 8 + [0] * 2] * 20, "text": ["x"] * 20}
    report = lc.compress(language, CHANNEL, datasets.Dataset.from_dict(rows), out=tmp_path / "o")
    assert report["data"]["examples"] == 18
    assert report["data"]["inputs"] == {"input_ids": [8], "attention_mask": [8]}
    assert report.metrics["tokens"] == 2 * 7


def test_ids_and_lengths_of_batches_are_checked(language: Path, tmp_path: Path) -> None:
    for data, words in (
        ([torch.full((2, 8), 400)], "embed_tokens has 320 rows"),
        ([torch.ones(2, 65, dtype=torch.long)], "at most 64"),
    ):
        with pytest.raises(lc.DataError, match=words):
            lc.compress(language, CHANNEL, data, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_folders_of_images(vision: Path, tmp_path: Path) -> None:
    image = extra("PIL.Image")
    folder = tmp_path / "images" / "cats"
    folder.mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'JPG'}", format="png" if i % 2 else "jpeg")
    report = lc.compress(vision, CHANNEL, str(tmp_path / "images"), out=tmp_path / "o", samples=8)
    assert report["data"]["examples"] == 8
    assert any("no preprocessor_config.json" in note for note in report.notes)
    assert evaluate_source(tmp_path / "o", reference=vision, data=str(folder))["cosine"] > 0.9
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(lc.DataError, match=r"broken\.png: cannot be read as an image"):
        lc.compress(vision, CHANNEL, str(tmp_path / "images"), out=tmp_path / "p")
    with pytest.raises(lc.DataError, match="reads images"):
        lc.compress(vision, CHANNEL, str(tmp_path / "nowhere"), out=tmp_path / "p")


def recording(file: Path, width: int, channels: int, values: np.ndarray, rate: int = 16_000) -> Path:
    scaled = np.round(values * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    stored = (
        (scaled + 128).astype(np.uint8)[:, None]
        if width == 1
        else (scaled & (2 ** (8 * width) - 1)).astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width]
    )
    with wave.open(str(file), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(stored.tobytes())
    return file


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings_are_read_as_they_were_written(width: int, tmp_path: Path) -> None:
    values = np.sin(np.arange(400) / 7) * 0.8
    samples, rate = read_wave(recording(tmp_path / "a.wav", width, 1, values, 8000))
    assert rate == 8000
    assert np.allclose(samples.numpy(), values, atol=2.0 ** (2 - 8 * width))
    both, _ = read_wave(recording(tmp_path / "b.wav", width, 2, np.repeat(values, 2)))
    assert np.allclose(both.numpy(), values, atol=2.0 ** (2 - 8 * width))
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(lc.DataError, match=r"c\.wav: cannot be read"):
        read_wave(tmp_path / "c.wav")


def test_folders_of_sound(tmp_path: Path) -> None:
    folder = tmp_path / "sound"
    folder.mkdir()
    for i in range(6):
        recording(folder / f"{i}.wav", 2, 1, np.random.default_rng(i).uniform(-0.5, 0.5, 3000 + 100 * i))
    layers = dict(
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    places = dict(num_mel_bins=8, max_source_positions=50, max_target_positions=16)
    config = transformers.WhisperConfig(vocab_size=320, d_model=32, **layers, **places, **ids)
    source = tmp_path / "whisper"
    transformers.WhisperForConditionalGeneration(config).save_pretrained(source)
    with pytest.raises(lc.CheckpointError, match="feature extractor"):
        lc.compress(source, CHANNEL, str(folder), out=tmp_path / "o")
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(source)
    report = lc.compress(source, CHANNEL, str(folder), out=tmp_path / "o")
    assert report["data"]["inputs"] == {"input_features": [8, 100], "decoder_input_ids": [1]}
    assert any("start token alone" in note for note in report.notes)
    recording(folder / "fast.wav", 2, 1, np.zeros(300) + 0.1, rate=44_100)
    with pytest.raises(lc.DataError, match=r"fast\.wav: 44100 samples per second"):
        lc.compress(source, CHANNEL, str(folder), out=tmp_path / "p")


def test_conversations(language: Path, tmp_path: Path, tokenizer: Any) -> None:
    chat = tmp_path / "chat.jsonl"
    rows = [
        [{"role": "user", "content": "The fox " * (i % 5 + 1)}, {"role": "assistant", "content": "sees\u2028 the cat."}]
        for i in range(20)
    ]
    chat.write_text("\n".join(json.dumps({"messages": row}, ensure_ascii=False) for row in rows), encoding="utf-8")
    options = dict(out=tmp_path / "o", length=32, samples=10)
    with pytest.raises(
        lc.DataError, match="line 2: the tokenizer has no chat template|line 1: the tokenizer has no chat template"
    ):
        lc.compress(language, CHANNEL, str(chat), **options)
    own = transformers.AutoTokenizer.from_pretrained(language)
    own.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
    model = transformers.AutoModelForCausalLM.from_pretrained(language)
    read, held = Reader(model, language, lambda: own, 32, 0).both(str(chat), 10, None, 0, True, True)
    texts = {own.decode(ids) for ids in (*read.sequences(), *held.sequences())}
    assert texts <= {f"u:{row[0]['content']}a:{row[1]['content']}" for row in rows}
    assert (read.count, held.count) == (10, 2)
    short, _ = Reader(model, language, lambda: own, 5, 0).both(str(chat), 10, None, 0, True, True)
    assert {len(ids) for ids in short.sequences()} == {5}
    with pytest.raises(lc.DataError, match="100 conversations are needed, there are 18 .* --samples 18"):
        Reader(model, language, lambda: own, 32, 0).both(str(chat), 100, None, 0, True, True)
    chat.write_text('{"messages": [{"role": "user", "content": "a b c"}]}\n{"text": "a"}\n')
    with pytest.raises(lc.DataError, match="line 2"):
        Reader(model, language, lambda: own, 32, 0).both(str(chat), 1, None, 0, True, True)


def test_prompts_and_completions(language: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": "The fox", "completion": " sees the cat." * (i % 3 + 1)}) for i in range(20))
    )
    report = lc.compress(language, CHANNEL, str(file), out=tmp_path / "o", length=32, samples=10)
    assert report["data"]["examples"] == 10
    assert report.metrics["kl"] > 0
    found = evaluate_source(language, data=str(file), length=32)
    assert found["tokens"] == sum(len(ids) - 1 for ids in _pairs(language, file))


def _pairs(language: Path, file: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(language)
    rows = [json.loads(line) for line in file.read_text().split("\n")]
    return [tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"][:32] for row in rows]


def test_a_processor_that_is_code_runs_if_it_is_trusted(vision: Path, tmp_path: Path) -> None:
    """Nobody is asked, and nothing runs, without the word for it."""
    image = extra("PIL.Image")
    folder = shutil.copytree(vision, tmp_path / "model")
    (tmp_path / "images").mkdir()
    image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    told = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="preprocessor_config.json: cannot be loaded.*--trust-remote-code"):
        lc.compress(folder, CHANNEL, str(tmp_path / "images"), out=tmp_path / "out", evaluate=False, samples=1)
    assert not (tmp_path / "ran").exists()
