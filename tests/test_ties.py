"""Ties on disk: what the config says and what the checkpoint stores need not agree; every reader takes the same of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import laconic as lc
from laconic.disk.load import open_source
from laconic.disk.originals import Checkpoint
from laconic.disk.store import Compressed
from laconic.disk.ties import differing
from laconic.errors import CheckpointError
from laconic.measure.quality import outputs
from laconic.model.residence import Residence
from laconic.model.sites import tied_names
from tests.conftest import tiny_config

IDS = torch.tensor([[5, 99, 17, 300, 42, 7, 7, 256]])
SCHEMES = ["RTN(8, 'channel')", "[('lm_head', RTN(8, 'channel')), ('*', Keep())]", "[('*embed_tokens', RTN(8, 'channel')), ('*', Keep())]",
           "[('*embed_tokens', RTN(8, 'channel')), ('*lm_head', RTN(8, 'channel')), ('*', Keep())]"]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def save(model: Any, folder: Path, tokenizer: Any, **more: torch.Tensor) -> Path:
    """A checkpoint with tensors of its own beside those that transformers writes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(
        load_file(file) | {name.replace("__", "."): value for name, value in more.items()},
        file,
        metadata={"format": "pt"},
    )
    return folder


def make(cls: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


@pytest.fixture(scope="module")
def contradicted(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The config says tied; a head of its own is stored."""
    model = make(transformers.LlamaForCausalLM, tiny_config(dtype="float32", num_hidden_layers=1))
    head = torch.randn(320, 64, generator=torch.Generator().manual_seed(3)) * 0.2
    return save(model, tmp_path_factory.mktemp("ties") / "contradicted", tokenizer, lm_head__weight=head)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_holds_for_every_reader(contradicted: Path, scheme: str, text: Path, tmp_path: Path) -> None:
    report = lc.compress(contradicted, scheme, str(text), out=tmp_path / "out", samples=4, length=32, test_tokens=256)
    assert any("lm_head.weight" in note and "ties" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    reference = logits(transformers.AutoModelForCausalLM.from_pretrained(contradicted, dtype=torch.float32))
    found = [
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)),
        logits(lc.load(tmp_path / "out", dtype=torch.float32)), logits(lc.load(tmp_path / "out", dense=False, dtype=torch.float32)),
        next(iter(outputs(open_source(tmp_path / "out"), [{"input_ids": IDS, "use_cache": False}], torch.float32, torch.device("cpu")))).logits,
    ]  # fmt: skip
    for one in found:
        assert torch.allclose(one.reshape(reference.shape), found[0], atol=1e-5)
    assert (found[0] - reference).norm() / reference.norm() < 0.05
    assert report.metrics["kl"] < 0.01


def test_equal_values_are_one_tensor_still(tmp_path: Path, tokenizer: Any) -> None:
    model = make(transformers.LlamaForCausalLM, tiny_config(dtype="float32", num_hidden_layers=1))
    source = save(model, tmp_path / "in", tokenizer, lm_head__weight=model.model.embed_tokens.weight.detach().clone())
    report = lc.compress(
        source, "[('lm_head', RTN(8, 32)), ('*', Keep())]", "self", out=tmp_path / "out", evaluate=False
    )
    assert not report.notes
    stored = Compressed(tmp_path / "out")
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & stored.names) == 1
    assert lc.load(tmp_path / "out").config.tie_word_embeddings is True


def test_an_encoder_and_a_decoder_stay_tied_where_the_head_is_not(tmp_path: Path, tokenizer: Any) -> None:
    """One switch in the config for two ties: off it would take both, so it stays on and readers go by what is stored."""
    config = transformers.T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, tie_word_embeddings=True
    )
    model = make(transformers.T5ForConditionalGeneration, config)
    head = torch.randn(320, 32, generator=torch.Generator().manual_seed(3))
    source = save(model, tmp_path / "in", tokenizer, lm_head__weight=head)
    call = {"input_ids": IDS, "decoder_input_ids": IDS}
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32).eval()
    for i, scheme in enumerate(("[('*SelfAttention.q', RTN(8, 32)), ('*', Keep())]", "[('*', RTN(8, 'channel'))]")):
        out = tmp_path / f"out {i}"
        lc.compress(source, scheme, "self", out=out, evaluate=False)
        ours = lc.load(out, dtype=torch.float32)
        again = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            expected, found, other = theirs(**call).logits, ours(**call).logits, again(**call).logits
        assert torch.allclose(found, other, atol=1e-5)
        assert (found - expected).norm() / expected.norm() < 0.1, scheme
        assert ours.shared.weight is ours.encoder.embed_tokens.weight
        assert ours.shared.weight is not ours.lm_head.weight


def test_a_head_that_is_nowhere_stored_is_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    """The config says untied and only one is stored: transformers would make a head up."""
    source = save(
        make(transformers.LlamaForCausalLM, tiny_config(dtype="float32", num_hidden_layers=1)),
        tmp_path / "in",
        tokenizer,
    )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(
        CheckpointError, match="lm_head.weight, which is not stored; if the head is the embedding.*tie_word_embeddings"
    ):
        lc.compress(source, "RTN(4, 32)", "self", out=tmp_path / "out")


def test_which_names_differ() -> None:
    """The rule alone: the source decides where it is stored, else the first target; equal values stay tied."""
    values = {"s": 1, "a": 1, "b": 2, "c": 2}
    for stored, expected in (
        ("sab", ["b"]),
        ("sabc", ["b", "c"]),
        ("bc", []),
        ("abc", ["b", "c"]),
        ("bca", ["b", "c"]),
        ("s", []),
    ):
        found = differing(
            [["s", "a", "b", "c"]], {"a": "s", "b": "s", "c": "s"}, set(stored), lambda x, y: values[x] == values[y]
        )
        assert [name for _, name in found] == expected


class Shares(nn.Module):
    """Blocks that share a layer, as Zamba's do: one module at two places, and one parameter of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(8, 8), "tied": nn.Linear(8, 8)}) for _ in range(3))
        shared = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        for block in (self.blocks[0], self.blocks[2]):
            block["shared"] = shared
        self.blocks[2]["tied"].weight = self.blocks[1]["tied"].weight


class Values:
    """A provider of a module's values under the first name of each."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {names[0]: dict(model.named_parameters())[names[0]].detach() for names in tied_names(model)}
        self.values |= dict(model.named_buffers())

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self.values[name] for name in names if name in self.values}

    def demands(self, name: str) -> None:
        return None

    def nbytes(self, name: str) -> int:
        return 0


def test_what_blocks_share_is_there_for_each_of_them() -> None:
    model, skeleton = make(lambda _: Shares(), None), make(lambda _: Shares(), None)
    nn.init.normal_(model.blocks[0]["shared"][1].running_mean)
    residence = Residence(skeleton, Values(model), "blocks", torch.float32, torch.device("cpu"))
    last, first = skeleton.blocks[2], skeleton.blocks[0]
    with residence.hold("blocks.2"):
        assert torch.equal(last["shared"][0].weight, model.blocks[0]["shared"][0].weight)
        assert torch.equal(last["shared"][1].running_mean, model.blocks[0]["shared"][1].running_mean)
        assert torch.equal(last["tied"].weight, model.blocks[1]["tied"].weight)
        assert first["own"].weight.is_meta
        with residence.hold("blocks.0"):
            assert not first["own"].weight.is_meta
        assert not last["shared"][0].weight.is_meta, "block 2 holds it still"
        assert first["own"].weight.is_meta
    assert last["shared"][0].weight.is_meta
    assert last["tied"].weight.is_meta


@pytest.mark.parametrize("scheme", ["RTN(8, 32)", "GPTQ(bits=8, group=32)"])
def test_a_model_whose_layers_are_one(scheme: str, text: Path, tmp_path: Path, tokenizer: Any) -> None:
    """ALBERT runs one layer several times."""
    config = transformers.AlbertConfig(
        vocab_size=320, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
    )  # fmt: skip
    model = make(transformers.AlbertModel, config)
    source = save(model, tmp_path / "in", tokenizer)
    lc.compress(source, scheme, str(text), out=tmp_path / "out", samples=4, length=32, evaluate=False)
    ours = lc.load(tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(ours(IDS)[0], theirs(IDS)[0], atol=1e-5)
        assert (ours(IDS)[0] - model(IDS)[0]).norm() / model(IDS)[0].norm() < 0.1


def test_a_checkpoint_with_notes_reads_as_transformers_does(contradicted: Path) -> None:
    checkpoint = Checkpoint(contradicted)
    assert checkpoint.untied == ["lm_head.weight"]
    assert checkpoint.skeleton.lm_head.weight is not checkpoint.skeleton.model.embed_tokens.weight
    assert checkpoint.config.tie_word_embeddings is False
