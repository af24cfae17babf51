"""Checkpoints in fp8 and MXFP4: what is read is what transformers dequantizes to, and it is compressed like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import laconic as lc
from laconic.disk.dequantize import from_fp8, from_mxfp4
from laconic.disk.load import open_source
from laconic.disk.store import Compressed
from laconic.errors import CheckpointError
from tests.conftest import tiny_config

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.tensor([[5, 99, 17, 300, 42, 7, 7, 256]])


def scaled(W: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """A matrix in fp8, its scales and what their name ends in."""
    if kind == "tensor":
        scale = (W.abs().amax() / 448).reshape(1)
        return (W / scale).to(torch.float8_e4m3fn), scale, "_scale"
    if kind == "channel":
        scale = W.abs().amax(1, keepdim=True) / 448
        return (W / scale).to(torch.float8_e4m3fn), scale.bfloat16(), "_scale"
    rows, columns = -(-W.shape[0] // 32), -(-W.shape[1] // 32)
    scale = torch.rand(rows, columns, generator=GENERATOR) * 1e-3 + 5e-4
    spread = scale.repeat_interleave(32, 0)[: W.shape[0]].repeat_interleave(32, 1)[:, : W.shape[1]]
    return (W / spread).to(torch.float8_e4m3fn), scale, "_scale_inv"


QUANTIZATION: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    "channel": {"quant_method": "compressed-tensors", "format": "float-quantized"}, "tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
}  # fmt: skip


def checkpoint(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """A Llama whose layers are in fp8; returns what they stand for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1, **changes)).bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    meant = load_file(folder / "model.safetensors")
    stored = {}
    for name, tensor in list(meant.items()):
        if name.endswith("proj.weight"):
            values, scale, end = scaled(tensor.float(), kind)
            stored |= {name: values, name + end: scale, name.replace("weight", "input_scale"): torch.ones(1)}
            meant[name] = from_fp8(values, scale, (32, 32)).bfloat16()
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION[kind]}))
    return meant


@pytest.mark.parametrize("kind", QUANTIZATION)
def test_fp8_is_read_by_its_scales(kind: str, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    meant = checkpoint(tmp_path / "in", kind, tokenizer)
    source = open_source(tmp_path / "in")
    for name, tensor in meant.items():
        assert torch.equal(source.read([name])[name], tensor), name
    report = lc.compress(
        tmp_path / "in", "RTN(8, 32)", str(text), out=tmp_path / "out", samples=4, length=32, test_tokens=256
    )
    assert any("7 tensors are stored as fp8" in note for note in report.notes)
    assert report["unused"] == []
    assert report.metrics["kl"] < 1e-3
    site = next(site for site in report.sites if site["name"].endswith("up_proj"))
    assert 96 * 64 < site["original_bytes"] <= 96 * 64 + 4 * 96, "a byte an entry, and scales"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "laconic"
    kept = lc.compress(
        tmp_path / "in", "[('*up_proj', RTN(8, 32)), ('*', Keep())]", "self", out=tmp_path / "kept", evaluate=False
    )
    down = next(row for row in kept["kept"] if row["name"].endswith("down_proj.weight"))
    assert down["bytes"] == 2 * 96 * 64 == Compressed(tmp_path / "kept").nbytes(down["name"])
    plain = transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1)).bfloat16()
    plain.load_state_dict(meant, strict=False)
    plain.tie_weights()
    with torch.no_grad():
        expected, found = plain.float()(IDS).logits, lc.load(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert (found - expected).norm() / expected.norm() < 0.02


def test_blocks_are_dequantized_as_transformers_does(tokenizer: Any, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values = torch.randn(96, 64, generator=GENERATOR).to(torch.float8_e4m3fn)
    for scales in (
        torch.rand(3, 2, generator=GENERATOR),
        torch.rand(1, 1, generator=GENERATOR),
        torch.rand(96, 1, generator=GENERATOR),
    ):
        theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
        assert torch.equal(from_fp8(values, scales), theirs)
    exponents = torch.randint(120, 130, (3, 2), generator=GENERATOR, dtype=torch.uint8)
    assert torch.equal(
        from_fp8(values, exponents), Fp8Dequantize(None)._dequantize_one(values, exponents, torch.float32)
    )
    uneven = from_fp8(torch.ones(100, 70).to(torch.float8_e4m3fn), torch.arange(12.0).reshape(4, 3), (32, 32))
    assert uneven.shape == (100, 70)
    assert [float(uneven[0, 0]), float(uneven[99, 69]), float(uneven[31, 32])] == [0.0, 11.0, 1.0]


def test_mxfp4_is_dequantized_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=GENERATOR, dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 10, 2), generator=GENERATOR, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(from_mxfp4(blocks, scales), theirs)


def test_gpt_oss_is_read_from_its_blocks(tokenizer: Any, tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, layer_types=["full_attention"], dtype="bfloat16", bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    meant = {}
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, inputs, outs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outs, inputs // 32, 16), generator=GENERATOR, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 123, (experts, outs, inputs // 32), generator=GENERATOR, dtype=torch.uint8
        )
        meant[name] = from_mxfp4(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    told = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(told | {"quantization_config": {"quant_method": "mxfp4"}}))
    source = open_source(tmp_path / "in")
    assert len(meant) == 2
    for name, tensor in meant.items():
        assert torch.equal(source.read([name])[name], tensor)
    lc.compress(tmp_path / "in", "RTN(8, 'channel')", "self", out=tmp_path / "out", evaluate=False)
    found = dict(lc.load(tmp_path / "out", dtype=torch.float32).named_parameters())
    for name, tensor in meant.items():
        assert (found[name] - tensor.float()).norm() / tensor.float().norm() < 0.02


def test_what_is_not_read_says_how_to_go_on(tokenizer: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", "block", tokenizer)
    file = tmp_path / "in" / "model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "in" / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    lost = {key: value for key, value in good.items() if not key.endswith(f"{name}_scale_inv")}
    wrong = good | {f"{name}_scale_inv": torch.ones(5, 7)}
    packed = good | {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(3, dtype=torch.int32)}
    for tensors, message in ((lost, "F8_E4M3"), (wrong, "do not belong together"), (packed, "packed form")):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{message}.*dequantize\(\)"):
            open_source(tmp_path / "in")
    save_file(good, file, metadata={"format": "pt"})
    (tmp_path / "in" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(CheckpointError, match=r"already quantized by 'gptq'.*dequantize\(\)"):
        open_source(tmp_path / "in")
