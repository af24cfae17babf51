"""Runs HQQ (calibration-free half-quadratic quantization) on one model; start it with the interpreter of the hqq environment."""

import time
from importlib.metadata import version
from typing import Any

import common

import torch
from torch import Tensor, nn

PEER = "HQQ"


def compress(task: common.Task, model: nn.Module) -> tuple[dict[str, Any], float]:
    """Quantizes every linear layer (the head excluded by the peer itself); returns the peer's settings and the seconds."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group)
    start = time.perf_counter()
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    return config["weight_quant_params"], time.perf_counter() - start


def read_packed(task: common.Task) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """What the native file holds: its tensors as `module.part`, and the settings of each compressed module."""
    stored: dict[str, Tensor] = {}
    settings: dict[str, dict] = {}
    modules = torch.load(task.native / "qmodel.pt", map_location="cpu", weights_only=True)
    for module, parts in modules.items():
        stored |= {f"{module}.{part}": value for part, value in parts.items() if isinstance(value, Tensor)}
        if "W_q" in parts:
            settings[module] = parts
    return stored, settings


def decode(stored: dict[str, Tensor], settings: dict[str, dict]) -> dict[str, Tensor]:
    """Decodes the stored codes in float32 with the peer's own unpacking: `(code - zero) * scale`, scale and zero in fp16."""
    from hqq.core.quantize import Quantizer

    dense = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for module, meta in settings.items():
        widened = {part: meta[part].float() for part in ("scale", "zero")}
        dense[f"{module}.weight"] = Quantizer.dequantize(meta["W_q"], meta | widened | {"compute_dtype": torch.float32})
    return dense


def main() -> None:
    """Compresses, stores, decodes, checks, and writes result.json."""
    task = common.parse_task(__doc__, methods=("hqq",), bits=(2, 3, 4, 8))
    common.go_offline()
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    original = common.read_tensors(task.model)
    undivided = common.undivided(original, task.group)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float16)
    options, seconds = compress(task, model)
    start = time.perf_counter()
    AutoHQQHFModel.save_quantized(model, str(task.native))
    timing = {"seconds": seconds, "seconds_save": time.perf_counter() - start}
    stored, settings = read_packed(task)
    dense = common.save_dense(task.out / "dense.safetensors", decode(stored, settings), original)
    dense_model = common.load_dense(AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), dense)
    peer_model = AutoHQQHFModel.from_quantized(str(task.native), compute_dtype=torch.float32, device="cpu").eval()
    notes = [f"groups run on into the next row in {len(undivided)} layers, such as {undivided[0]}"] if undivided else []
    common.write_result(
        task,
        PEER,
        version("hqq"),
        timing
        | {"options": options, "notes": notes}
        | common.compare_logits(dense_model, peer_model, common.read_windows(task.calibration)[0])
        | common.count_files(task.native)
        | common.count_tensors(stored, original, task.bits + 32 / task.group),
    )


if __name__ == "__main__":
    main()
