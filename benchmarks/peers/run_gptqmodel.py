"""Runs GPTQModel on one model; start it with the interpreter of the gptqmodel environment."""

import os
import time
from importlib.metadata import version
from typing import Any

import common

import torch
from torch import Tensor, nn

PEER = "GPTQModel"
WORKERS = (
    "GPTQMODEL_CPU_WORKERS"  # 7.6 takes one worker on two cores, and its pool of model loaders then refuses to start
)


def compress(task: common.Task, peer: Any) -> float:
    """Quantizes and packs every linear layer (the head excluded by the peer itself) and returns the seconds."""
    windows = common.read_windows(task.calibration).tolist()
    calibration = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    start = time.perf_counter()
    peer.quantize(calibration, batch_size=1)
    return time.perf_counter() - start


def decode(stored: dict[str, Tensor], peer_model: nn.Module) -> dict[str, Tensor]:
    """Decodes the reloaded native modules with the peer's own `dequantize_weight` (not its compiled copy), scales widened to float32."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    dense = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for name, module in peer_model.named_modules():
        if isinstance(module, BaseQuantLinear):
            dense[f"{name}.weight"] = type(module).dequantize_weight(module).t()
    return dense


def main() -> None:
    """Compresses, stores, decodes, checks, and writes result.json."""
    task = common.parse_task(__doc__, methods=("gptq",), bits=(2, 3, 4, 8))
    common.go_offline()
    os.environ.setdefault(WORKERS, "2")
    from gptqmodel import BACKEND, GPTQConfig, GPTQModel
    from transformers import AutoModelForCausalLM

    original = common.read_tensors(task.model)
    peer = GPTQModel.load(str(task.model), GPTQConfig(bits=task.bits, group_size=task.group, sym=False), device="cpu")
    seconds = compress(task, peer)
    start = time.perf_counter()
    peer.save(str(task.native))
    timing = {"seconds": seconds, "seconds_save": time.perf_counter() - start}
    stored = common.read_tensors(task.native)
    reloaded = GPTQModel.load(str(task.native), device="cpu", backend=BACKEND.GPTQ_TORCH).model.float().eval()
    dense = common.save_dense(task.out / "dense.safetensors", decode(stored, reloaded), original)
    undivided = common.undivided(original, task.group)
    notes = (
        [f"the last group of a row is shorter in {len(undivided)} layers, such as {undivided[0]}"] if undivided else []
    )
    dense_model = common.load_dense(AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), dense)
    common.write_result(
        task,
        PEER,
        version("gptqmodel"),
        timing
        | {"config": common.read_config(task), "notes": notes, "options": {WORKERS: os.environ[WORKERS]}}
        | common.compare_logits(dense_model, reloaded, common.read_windows(task.calibration)[0])
        | common.count_files(task.native)
        | common.count_tensors(stored, original, common.ideal_bits(original, task.bits, 16 + task.bits, task.group)),
    )


if __name__ == "__main__":
    main()
