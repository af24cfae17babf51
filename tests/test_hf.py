"""A compressed directory in transformers' own hands: loaded by the Auto classes, generating, sharded, and saved again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import laconic as lc
from laconic.disk.store import MANIFEST, Compressed, stored_bytes, write_manifest
from laconic.errors import CheckpointError
from tests.conftest import tiny_config

IDS = torch.tensor([[5, 99, 17, 300, 42, 7, 7, 256]])
SCHEMES = [
    "GPTQ(rate=3.0)", "[('lm_head', RTN(8, 32)), ('*', GPTQ(bits=3, group=32) + EoRA(rank=2))]", "Hadamard(RTN(4, 32))",
    "Magnitude(0.5) >> KMeans(bits=3)",
]  # fmt: skip


def compress(source: Path, scheme: str, text: Path, out: Path) -> Path:
    lc.compress(source, scheme, data=str(text), out=out, samples=8, length=32, evaluate=False)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tiny, SCHEMES[1], text, tmp_path_factory.mktemp("hf") / "model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_loaders_give_the_same_logits(scheme: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = compress(tiny, scheme, text, tmp_path / "out")
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        ours = lc.load(out, dtype=dtype)
        assert type(theirs) is type(ours) is transformers.LlamaForCausalLM
        assert {p.dtype for p in theirs.parameters()} == {dtype}
        assert torch.equal(logits(theirs), logits(ours))
        original = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
        assert not torch.equal(logits(theirs), logits(original)), "it is the compressed model that was loaded"


def test_without_a_dtype_both_take_the_checkpoints(made: Path) -> None:
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(made), lc.load(made)
    assert {p.dtype for p in theirs.parameters()} == {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(theirs), logits(ours))


def test_nothing_is_missing_and_nothing_is_left_over(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.get_rng_state()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), state), "no weight is made up, only to be overwritten"
    assert "corrupted" not in caplog.text
    assert {name: set(found) for name, found in info.items() if found} == {}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())


def test_it_generates_what_the_measured_model_does(made: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    options = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)
    found = theirs.generate(IDS, **options)
    assert found.shape == (1, IDS.shape[1] + 12)
    assert torch.equal(found, lc.load(made, dtype=torch.float32).generate(IDS, **options))
    assert torch.equal(found, lc.load(made, dense=False, dtype=torch.float32).generate(IDS, **options)), (
        "with its weights installed, too"
    )
    ids = IDS
    for _ in range(12):  # without a cache, from the definition
        with torch.no_grad():
            ids = torch.cat([ids, theirs(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert tokenizer.decode(found[0])


def test_shards_are_read(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compress(tiny, SCHEMES[0], text, tmp_path / "whole")
    monkeypatch.setattr("laconic.disk.assemble._SHARD", 2_000)
    out = compress(tiny, SCHEMES[0], text, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {file.name for file in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) > 5
    split = [
        name
        for name in Compressed(out).weights
        if len({f for t, f in index["weight_map"].items() if t.startswith(name + ".")}) > 1
    ]
    assert split, "a weight whose parts lie in different files"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(lc.load(whole, dtype=torch.float32)))
    assert torch.equal(logits(theirs), logits(lc.load(out, dtype=torch.float32)))


def test_an_encoder_and_a_transposed_layer(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    """GPT-2 stores x W, and a model without a head is loaded by AutoModel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(vocab_size=320, intermediate_size=96, max_position_embeddings=128)
        gpt2 = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
            )
        )
        bert = transformers.BertModel(
            transformers.BertConfig(**sizes, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        )
    for name, model, kind in (
        ("gpt2", gpt2, transformers.AutoModelForCausalLM),
        ("bert", bert, transformers.AutoModel),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        out = compress(tmp_path / name, "GPTQ(bits=4, group=32)", text, tmp_path / f"{name}-out")
        theirs, ours = kind.from_pretrained(out, dtype=torch.float32).eval(), lc.load(out, dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(theirs(IDS)[0], ours(IDS)[0], atol=1e-5), name


def test_what_is_loaded_is_an_ordinary_model_that_can_be_trained(made: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    before = logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model), before)


def test_saving_again_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    """Dense parameters under a config that says laconic would be a directory nobody can read."""
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    with pytest.raises(ValueError, match=r"(?i)laconic.*not serializable|not serializable.*laconic"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_dense_parameters_are_saved_by_the_plain_loader(made: Path, tmp_path: Path) -> None:
    """The way to a dense checkpoint: `lc.load` gives a model whose `save_pretrained` writes one that needs no laconic."""
    model = lc.load(made, dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    assert "laconic" not in (tmp_path / "dense" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_directory_that_is_not_what_its_config_says(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / "config.json").write_text(
        json.dumps(json.loads((copy / "config.json").read_text()) | {"intermediate_size": 128})
    )
    with pytest.raises(CheckpointError, match=r"config.json: damaged, or changed"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    write_manifest(copy, manifest, config=True)
    with pytest.raises(CheckpointError, match="mlp"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    shutil.copy(made / "config.json", copy / "config.json")
    (copy / MANIFEST).write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises((CheckpointError, OSError), match=MANIFEST):
        transformers.AutoModelForCausalLM.from_pretrained(copy)


def test_an_untied_head_stays_one_of_its_own(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    out = compress(
        tmp_path / "untied",
        "[('lm_head', RTN(4, 32)), ('*.embed_tokens', RTN(8, 32)), ('*', Keep())]",
        text,
        tmp_path / "out",
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert theirs.lm_head.weight is not theirs.model.embed_tokens.weight
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(logits(theirs), logits(lc.load(out, dtype=torch.float32)))


def saved(model: Any, folder: Path, tokenizer: Any, **config: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(
        json.dumps({key: value for key, value in (json.loads(file.read_text()) | config).items() if value is not None})
    )
    return folder


def test_other_classes_of_the_same_model_are_read(made: Path) -> None:
    """The base model has other prefixes and no head, another head is new; the body is the stored one."""
    whole = lc.load(made, dtype=torch.float32)
    base = transformers.AutoModel.from_pretrained(made, dtype=torch.float32)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(f"model.{name}")), name
    other, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(f"model.{name}")), name


SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
CLASSES = [
    (transformers.LlamaForCausalLM, tiny_config(num_hidden_layers=1)),
    (transformers.LlamaModel, tiny_config(num_hidden_layers=1)),
    (transformers.LlamaForCausalLM, tiny_config(num_hidden_layers=1, tie_word_embeddings=False)),
    (transformers.BertModel, transformers.BertConfig(vocab_size=320, **SMALL)),
    (transformers.BertForMaskedLM, transformers.BertConfig(vocab_size=320, **SMALL)),
    (transformers.ViTForImageClassification, transformers.ViTConfig(**SMALL)),
]


@pytest.mark.parametrize(("cls", "config"), CLASSES)
def test_a_config_that_names_no_class(cls: Any, config: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = saved(cls(config), tmp_path / "in", tokenizer, architectures=None)
    report = lc.compress(source, "RTN(8, 'channel')", "self", out=tmp_path / "out", evaluate=False)
    assert f"config.json names no architecture; by its tensors it is a {cls.__name__}" in report.notes
    assert type(lc.load(tmp_path / "out")) is cls
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("architectures") == [cls.__name__]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert type(lc.load(tmp_path / "out")) is cls


def test_what_lies_beside_a_model_is_no_part_of_it(tiny: Path, tmp_path: Path) -> None:
    """Another format's weights are not counted, and an index left behind is not read: as transformers does."""
    source = shutil.copytree(tiny, tmp_path / "in")
    size = (source / "model.safetensors").stat().st_size
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    report = lc.compress(source, "RTN(4, 32)", "self", out=tmp_path / "out", evaluate=False)
    assert report["original_bytes"] == size
    shutil.copy(source / "model.safetensors", tmp_path / "out" / "consolidated.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    assert stored_bytes(tmp_path / "out") == report.stored_bytes
    assert lc.load(tmp_path / "out") is not None
