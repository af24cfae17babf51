"""Runs llm-compressor (methods gptq and rtn) on one model; start it with the interpreter of the llmcompressor environment."""

import time
from importlib.metadata import version
from typing import Any

import common

import torch
from torch import Tensor, nn

PEER = "llm-compressor"


def build_recipe(task: common.Task) -> Any:
    """The modifier with an asymmetric grouped scheme of `task.bits` bits; everything else is the peer's default."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(num_bits=task.bits, type="int", symmetric=False, strategy="group", group_size=task.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier if task.method == "gptq" else QuantizationModifier
    return modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def compress(task: common.Task, model: nn.Module, recipe: Any) -> float:
    """Calls `oneshot` (in place) and returns its seconds; round-to-nearest takes no data."""
    from datasets import Dataset
    from llmcompressor import oneshot

    arguments: dict[str, Any] = {"model": model, "recipe": recipe}
    if task.method == "gptq":
        windows = common.read_windows(task.calibration)
        columns = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        arguments |= {"dataset": Dataset.from_dict(columns), "num_calibration_samples": len(windows)}
        arguments |= {"max_seq_length": windows.shape[1], "shuffle_calibration_samples": False}
    start = time.perf_counter()
    oneshot(**arguments)
    return time.perf_counter() - start


def decode(stored: dict[str, Tensor], modules: list[str], task: common.Task) -> dict[str, Tensor]:
    """Decodes the stored int32 words in float32 with the peer's own unpacking: `(code - zero) * scale`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    dense = {name: tensor for name, tensor in stored.items() if name.endswith(".weight")}
    for module in modules:
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        scale = stored[f"{module}.weight_scale"].float()
        codes = unpack_from_int32(stored[f"{module}.weight_packed"], task.bits, shape).float()
        zeros = unpack_from_int32(stored[f"{module}.weight_zero_point"], task.bits, scale.shape, packed_dim=0).float()
        grouped = codes.unflatten(1, (-1, task.group))
        dense[f"{module}.weight"] = ((grouped - zeros[..., None]) * scale[..., None]).flatten(1)
    return dense


def main() -> None:
    """Compresses, stores, decodes, checks, and writes result.json."""
    task = common.parse_task(__doc__, methods=("gptq", "rtn"), bits=(2, 3, 4, 8))
    common.go_offline()
    from transformers import AutoModelForCausalLM

    release = version("llmcompressor")
    original = common.read_tensors(task.model)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    recipe = build_recipe(task)
    try:
        seconds = compress(task, model, recipe)
    except ValueError as error:
        if not common.undivided(original, task.group):
            raise
        common.write_unsupported(task, PEER, release, str(error))
        return
    start = time.perf_counter()
    model.save_pretrained(task.native, save_compressed=True)
    timing = {"seconds": seconds, "seconds_save": time.perf_counter() - start}
    stored = common.read_tensors(task.native)
    dense = common.save_dense(
        task.out / "dense.safetensors", decode(stored, common.linear_names(original), task), original
    )
    dense_model = common.load_dense(AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), dense)
    peer_model = AutoModelForCausalLM.from_pretrained(task.native, dtype=torch.float32).eval()
    common.write_result(
        task,
        PEER,
        release,
        timing
        | {
            "options": recipe.model_dump(mode="json", exclude_none=True, exclude={"config_groups"}),
            "config": common.read_config(task),
        }
        | common.compare_logits(dense_model, peer_model, common.read_windows(task.calibration)[0])
        | common.count_files(task.native)
        | common.count_tensors(stored, original, common.ideal_bits(original, task.bits, 16 + task.bits, task.group)),
    )


if __name__ == "__main__":
    main()
