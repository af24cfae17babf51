"""Runs optimum-quanto (weights only, no calibration) on one model; start it with the interpreter of the quanto environment."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import common

import torch
from torch import Tensor, nn

PEER = "optimum-quanto"
BITS_WITH_GROUPS = (2, 4)  # 8 bits are symmetric with one scale per output row, and there is no 3-bit type


def quantize_linears(model: nn.Module, task: common.Task) -> dict[str, int]:
    """Replaces the linear layers (the head excluded) by the peer's and returns the group of each (its columns if it has none).

    The peer chooses groups itself (128, or less where that does not divide the columns); the group of the task is put in its
    place wherever it divides the columns.
    """
    from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize
    from optimum.quanto.nn import QModuleMixin

    optimizer = None if task.bits not in BITS_WITH_GROUPS else {"max": MaxOptimizer, "hqq": HqqOptimizer}[task.method]()
    quantize(model, weights={2: qint2, 4: qint4, 8: qint8}[task.bits], optimizer=optimizer, exclude="lm_head")
    groups: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin):
            if task.bits in BITS_WITH_GROUPS and module.weight.shape[1] % task.group == 0:
                module.weight_group_size = task.group
            groups[name] = module.weight_group_size or module.weight.shape[1]
    return groups


def compress(task: common.Task, model: nn.Module) -> tuple[dict[str, int], float]:
    """Quantizes and freezes the model in place and returns the groups and the seconds."""
    from optimum.quanto import freeze

    start = time.perf_counter()
    groups = quantize_linears(model, task)
    freeze(model)
    return groups, time.perf_counter() - start


def reload(task: common.Task, model: nn.Module, stored: Mapping[str, Tensor]) -> nn.Module:
    """The stored tensors in quantized modules with the same groups; scales widened to float32.

    The peer's own loader cannot do it: the file does not say which group was used, and the loader assumes the peer's choice.
    """
    quantize_linears(model, task)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()},
        strict=False,
    )
    return model.eval()


def decode(model: nn.Module) -> dict[str, Tensor]:
    """Decodes the weights of the reloaded quantized modules with the peer's own `dequantize`."""
    from optimum.quanto import QTensor

    return {
        name: weight.dequantize() if isinstance(weight, QTensor) else weight
        for name, weight in model.named_parameters()
    }


def options(task: common.Task, groups: Mapping[str, int]) -> dict[str, Any]:
    """What was used: the peer's optimizer, its symmetry, and the groups as `size: number of layers`."""
    sizes = list(groups.values())
    grouped = task.bits in BITS_WITH_GROUPS
    return {
        "optimizer": task.method if grouped else "absmax",
        "symmetric": not grouped,
        "groups": {str(size): sizes.count(size) for size in set(sizes)},
    }


def main() -> None:
    """Compresses, stores, decodes, checks, and writes result.json."""
    task = common.parse_task(__doc__, methods=("max", "hqq"), bits=(2, 3, 4, 8))
    common.go_offline()
    from optimum.quanto import QuantizedModelForCausalLM
    from transformers import AutoModelForCausalLM

    release = version("optimum-quanto")
    if task.bits == 3:
        common.write_unsupported(task, PEER, release, "no 3-bit type: the peer has qint2, qint4 and qint8")
        return
    original = common.read_tensors(task.model)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    groups, seconds = compress(task, model)
    start = time.perf_counter()
    QuantizedModelForCausalLM(model).save_pretrained(str(task.native))
    timing = {"seconds": seconds, "seconds_save": time.perf_counter() - start}
    stored = common.read_tensors(task.native)
    peer_model = reload(task, AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), stored)
    dense = common.save_dense(task.out / "dense.safetensors", decode(peer_model), original)
    dense_model = common.load_dense(AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32), dense)
    ideal = common.ideal_bits(original, task.bits, 32 if task.bits in BITS_WITH_GROUPS else 16, groups)
    common.write_result(
        task,
        PEER,
        release,
        timing
        | {"options": options(task, groups)}
        | common.compare_logits(dense_model, peer_model, common.read_windows(task.calibration)[0])
        | common.count_files(task.native)
        | common.count_tensors(stored, original, ideal),
    )


if __name__ == "__main__":
    main()
