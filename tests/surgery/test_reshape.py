"""Thinned networks on disk: shapes as JSON, rebuilding, stock transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaForCausalLM

import laconic as lc
from laconic.errors import CheckpointError, SurgeryError
from laconic.surgery import Coupling, couple, rebuild, save_pretrained, shapes, thin
from tests.conftest import tiny_config
from tests.surgery.nets import Transformer, conv_net, shaken
from tests.surgery.test_thinning import output, some, zero

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(conv_net(("grouped", "dense", "separable"), (6, 8, 9, 8), True))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """An original and its thinned network."""
    model = net()
    coupling = couple(model, X)
    masked = copy.deepcopy(model)
    zero(masked, coupling, some(coupling, torch.Generator().manual_seed(2)))
    return model, thin(masked, X, coupling)


def llama(**changes: object) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config(dtype="float32", **changes)).eval()


def evenly(coupling: Coupling, heads: int = 1) -> torch.Tensor:
    """The same number of channels from every group of a kind: some groups of heads, a third of the others."""
    parts = [torch.arange(g.ids[0], g.ids[0] + (heads if g.heads else len(g) // 3)) for g in coupling.groups]
    return torch.cat(parts)


def test_round_trip_is_bit_equal(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    original, thinned = pair
    found = shapes(thinned, original)
    assert found == json.loads(json.dumps(found))
    stored = lc.save(thinned, tmp_path, shapes=found)
    assert stored < lc.save(original, tmp_path / "whole")
    reloaded = lc.load_into(net(), tmp_path)
    assert torch.equal(output(reloaded, X), output(thinned, X))
    assert shapes(reloaded, thinned) == {}
    assert str(reloaded) == str(thinned)  # in_channels, groups and the like are right too


def test_thinned_and_compressed_round_trip(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    original, thinned = pair
    compressed, _ = lc.compress(copy.deepcopy(thinned), "RTN(bits=4, group='channel')")
    lc.save(compressed, tmp_path, shapes=shapes(compressed, original))
    assert torch.equal(output(lc.load_into(net(), tmp_path), X), output(compressed, X))


def test_a_module_that_was_not_thinned_has_no_shapes(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    original, _ = pair
    assert shapes(original, net()) == {}
    lc.save(original, tmp_path, shapes={})
    assert "shapes" not in json.loads((tmp_path / "laconic.json").read_text())


def test_ties_stay_ties() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    coupling = couple(model, {"input_ids": IDS})
    joint = coupling.channels["model.layers.0.mlp.up_proj"]
    assert torch.equal(joint, coupling.channels["model.layers.1.mlp.up_proj"])
    zero(model, coupling, joint[:9])
    thinned = thin(model, {"input_ids": IDS}, coupling)
    assert thinned.model.layers[0].mlp.down_proj.weight is thinned.model.layers[1].mlp.down_proj.weight
    fresh = llama()
    fresh.model.layers[1].mlp.down_proj.weight = fresh.model.layers[0].mlp.down_proj.weight
    entry = shapes(thinned, model)
    rebuild(fresh, entry)
    assert fresh.model.layers[0].mlp.down_proj.weight is fresh.model.layers[1].mlp.down_proj.weight
    assert fresh.model.layers[0].mlp.down_proj.weight.shape == (64, 87)
    del entry["model.layers.1.mlp.down_proj"]
    with pytest.raises(CheckpointError, match="are one tensor, but not of one shape"):
        rebuild(copy.deepcopy(model), entry)


def test_attributes_of_hand_written_attention_come_back() -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return shaken(Transformer(1, 4, 2, False, True, False, nn.LayerNorm))

    model, ids = build(), torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(3))
    coupling = couple(model, ids)
    zero(model, coupling, evenly(coupling))
    thinned = thin(model, ids, coupling)
    found = shapes(thinned, model)
    assert found["attention.0"] == {"counts": {"heads": 2, "kv_heads": 1}, "tensors": {}}
    again = rebuild(build(), found)
    again.load_state_dict(thinned.state_dict())
    assert torch.equal(output(again, ids), output(thinned, ids))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "expected a dictionary by module path, got list"),
        ({"nowhere": {"counts": {}, "tensors": {}}}, "the module has no part 'nowhere'"),
        ({"0": {"counts": {}}}, "0: expected counts and tensors"),
        ({"0": {"counts": {"weight": 2}, "tensors": {}}}, "Conv2d has no integer 'weight'"),
        ({"0": {"counts": {"__class__": 2}, "tensors": {}}}, "Conv2d has no integer '__class__'"),
        ({"0": {"counts": {"out_channels": 0}, "tensors": {}}}, "expected an integer from 1 to 6, got 0"),
        ({"0": {"counts": {"out_channels": True}, "tensors": {}}}, "expected an integer from 1 to 6, got True"),
        ({"0": {"counts": {"out_channels": 7}, "tensors": {"weight": [7, 3, 3, 3]}}}, "expected an integer from 1 to 6, got 7"),
        ({"0": {"counts": {"out_channels": 2}, "tensors": {}}}, "out_channels: its tensors say 6, the counts 2"),
        ({"0": {"counts": {}, "tensors": {"weight": [2, 3, 3, 3]}}}, "out_channels: its tensors say 2, the counts 6"),
        ({"0": {"counts": {}, "tensors": {"bias": [2]}}}, "Conv2d has no tensor 'bias'"),
        ({"0": {"counts": {}, "tensors": {"weight": [10**9, 3, 3, 3]}}}, r"expected a shape within \[6, 3, 3, 3\]"),
        ({"0": {"counts": {}, "tensors": {"weight": [6, 3, 3]}}}, r"expected a shape within \[6, 3, 3, 3\]"),
        ({"0": {"counts": {}, "tensors": {"weight": "6"}}}, r"expected a shape within \[6, 3, 3, 3\]"),
        ({"0": {"counts": {}, "tensors": {"weight": [6, 3, 3, -3]}}}, r"expected a shape within \[6, 3, 3, 3\]"),
    ],
)  # fmt: skip
def test_damaged_shapes_are_refused(entry: Any, message: str) -> None:
    model = net()
    before = str(model)
    with pytest.raises(CheckpointError, match=message):
        rebuild(model, entry)
    assert str(model) == before


def test_another_architecture_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="expected Sequential, as in the original, got Linear"):
        shapes(nn.Linear(2, 2), pair[0])


def test_a_thinned_directory_does_not_load_into_something_else(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    original, thinned = pair
    lc.save(thinned, tmp_path, shapes=shapes(thinned, original))
    with pytest.raises(CheckpointError):
        lc.load_into(nn.Linear(2, 2), tmp_path)
    lc.save(thinned, tmp_path / "without")
    with pytest.raises(CheckpointError, match="the module has"):
        lc.load_into(net(), tmp_path / "without")


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"intermediate_size": 64, "num_hidden_layers": 4}])
def test_uniform_cuts_load_in_stock_transformers(changes: dict[str, int], tmp_path: Path) -> None:
    """Also where the same number stands in several fields of the configuration."""
    model, batch = llama(**changes), {"input_ids": IDS}
    coupling = couple(model, batch)
    groups = changes.get("num_key_value_heads", 2)
    zero(model, coupling, evenly(coupling, groups // 2))
    thinned = thin(model, batch, coupling)
    config = save_pretrained(thinned, tmp_path, batch)
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (groups // 2, 2, 16)
    assert config.intermediate_size == (43 if "intermediate_size" in changes else 64)
    assert config.num_hidden_layers == changes.get("num_hidden_layers", 3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(output(stock, batch), output(thinned, batch))
    assert thinned.config.intermediate_size == changes.get(
        "intermediate_size", 96
    )  # the thinned model itself is left alone


def test_uneven_cuts_are_refused_by_name(tmp_path: Path) -> None:
    model, batch = llama(), {"input_ids": IDS}
    coupling = couple(model, batch)
    zero(model, coupling, coupling.channels["model.layers.1.mlp.up_proj"][:5])
    with pytest.raises(
        SurgeryError,
        match=r"model\.layers\.0\.mlp\.gate_proj\.weight has 96, model\.layers\.1\.mlp\.gate_proj\.weight 91",
    ):
        save_pretrained(thin(model, batch, coupling), tmp_path, batch)
    assert not any(tmp_path.iterdir())


def test_what_transformers_refuses_is_quoted(tmp_path: Path) -> None:
    """Llama's configuration wants a number of heads that divides the hidden size, whatever the heads' own size."""
    model, batch = llama(num_key_value_heads=4), {"input_ids": IDS}
    coupling = couple(model, batch)
    zero(model, coupling, evenly(coupling))
    with pytest.raises(
        SurgeryError, match=r"transformers says: .*not a multiple of the number of attention heads \(3\)"
    ):
        save_pretrained(thin(model, batch, coupling), tmp_path, batch)


def test_a_configuration_that_cannot_say_it(tmp_path: Path) -> None:
    """BERT's head size is its width divided by its heads."""
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(config).eval()
    batch = {"input_ids": IDS}
    coupling = couple(model, batch)
    zero(model, coupling, evenly(coupling, 2))
    with pytest.raises(SurgeryError, match=r"no configuration of BertForMaskedLM has the thinned shapes .*shapes="):
        save_pretrained(thin(model, batch, coupling), tmp_path, batch)


def test_only_transformers_models_have_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="expected a transformers model, got Sequential"):
        save_pretrained(net(), tmp_path, X)
