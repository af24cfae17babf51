"""What the runners share: the command line, the calibration windows, counting of stored bytes, the dense export and its check.

Runs inside the environment of a peer and needs only torch, safetensors and numpy there. It holds nothing of any peer.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")
NOT_COMPRESSED = ("embed_tokens", "lm_head")  # the embedding and the head tied to it
LOGIT_TOLERANCE = (
    1e-2  # of the largest logit: fp32 noise is 1e-5, a wrong zero point or group order moves it by 0.1 and more
)


@dataclass(frozen=True)
class Task:
    """One run: which model, which calibration windows, which method, where to."""

    model: Path
    calibration: Path
    method: str
    bits: int
    group: int
    out: Path

    @property
    def native(self) -> Path:
        """The folder that receives the peer's own file format; the size is counted on it."""
        return self.out / "native"


def parse_task(description: str, methods: Sequence[str], bits: Sequence[int]) -> Task:
    """Reads the command line that all runners have, and empties the output folder of an earlier run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama-like model in Hugging Face layout")
    parser.add_argument("--calibration", type=Path, required=True, help="int64 token ids [samples, length], .npy")
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--bits", type=int, choices=bits, required=True)
    parser.add_argument("--group", type=int, default=64, help="input columns that share a scale and a zero point")
    parser.add_argument("--out", type=Path, required=True, help="receives native/, dense.safetensors and result.json")
    task = Task(**vars(parser.parse_args()))
    if task.native.exists():
        shutil.rmtree(task.native)
    for name in ("dense.safetensors", "result.json"):
        (task.out / name).unlink(missing_ok=True)
    task.native.mkdir(parents=True)
    return task


def go_offline() -> None:
    """Keeps every Hugging Face library off the network and fixes the seed; call it before importing a peer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)


def read_windows(path: Path) -> Tensor:
    """The calibration windows, int64 [samples, length]; raises ValueError when the file holds anything else."""
    windows = np.load(path)
    if windows.dtype != np.int64 or windows.ndim != 2:
        raise ValueError(f"{path.name}: expected int64 [samples, length], got {windows.dtype} {list(windows.shape)}")
    return torch.from_numpy(windows)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def linear_names(original: Mapping[str, Tensor]) -> list[str]:
    """The modules to compress: every 2-D weight except the embedding and the head."""
    return [
        name.removesuffix(".weight")
        for name, tensor in original.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not any(part in NOT_COMPRESSED for part in name.split("."))
    ]


def undivided(original: Mapping[str, Tensor], group: int) -> list[str]:
    """The modules to compress whose number of input columns the group does not divide."""
    return [name for name in linear_names(original) if original[f"{name}.weight"].shape[1] % group]


def read_config(task: Task) -> dict[str, Any]:
    """What the peer wrote about its own options into the `quantization_config` of config.json."""
    return json.loads((task.native / "config.json").read_text())["quantization_config"]


def count_files(folder: Path) -> dict[str, int]:
    """Bytes of the stored files: weights, json (configuration), and the rest (tokenizer files count as json)."""
    counts = {"native_weight_bytes": 0, "native_json_bytes": 0, "native_other_bytes": 0}
    for path in filter(Path.is_file, folder.rglob("*")):
        kind = "weight" if path.suffix in WEIGHT_SUFFIXES else "json" if path.suffix == ".json" else "other"
        counts[f"native_{kind}_bytes"] += path.stat().st_size
    return counts


def ideal_bits(original: Mapping[str, Tensor], bits: int, overhead: int, groups: int | Mapping[str, int]) -> float:
    """Bits per weight when a code takes `bits` and each group of input columns `overhead` bits for its scale and zero point.

    The group is one number for all modules, or one for each; the last group of a row may be shorter.
    """
    matrices = {module: original[f"{module}.weight"].shape for module in linear_names(original)}
    sizes = dict.fromkeys(matrices, groups) if isinstance(groups, int) else groups
    count = sum(rows * math.ceil(columns / sizes[module]) for module, (rows, columns) in matrices.items())
    return bits + overhead * count / sum(rows * columns for rows, columns in matrices.values())


def count_tensors(stored: Mapping[str, Tensor], original: Mapping[str, Tensor], ideal: float) -> dict[str, Any]:
    """Splits the stored tensors into those of the compressed matrices and the rest; bits per weight follow from their bytes.

    A stored tensor belongs to a matrix when its name starts with the name of the module and a dot. Tensors that share memory
    (a tied head) count once. `ideal` is passed on as the bits per weight that the codes, scales and zero points need.
    """
    modules = linear_names(original)
    once = {tensor.data_ptr(): name for name, tensor in reversed(stored.items())}
    parts: dict[str, int] = {}
    rest: dict[str, int] = {}
    for name in sorted(once.values()):
        module = next((module for module in modules if name.startswith(module + ".")), None)
        kind = str(stored[name].dtype) if module is None else name.removeprefix(module + ".")
        counts = rest if module is None else parts
        counts[kind] = counts.get(kind, 0) + stored[name].numel() * stored[name].element_size()
    weights = sum(original[f"{module}.weight"].numel() for module in modules)
    return {
        "linear_layers": len(modules),
        "matrix_weights": weights,
        "matrix_bytes": sum(parts.values()),
        "matrix_bytes_by_part": parts,
        "layers_left_alone": [module for module in modules if f"{module}.weight" in stored],
        "rest_bytes": sum(rest.values()),
        "rest_bytes_by_dtype": rest,
        "bits_per_weight": 8 * sum(parts.values()) / weights,
        "ideal_bits_per_weight": ideal,
    }


def save_dense(path: Path, dense: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes the decoded weights as float32 under the original names, and returns what was written.

    Raises: ValueError when a name or shape differs from the original checkpoint.
    """
    tensors = {name: dense[name].detach().to(torch.float32).contiguous().clone() for name in original if name in dense}
    if missing := sorted(set(original) - set(tensors)):
        raise ValueError(f"{path.name}: no decoded weights for {missing[:4]}")
    for name, tensor in tensors.items():
        if tensor.shape != original[name].shape:
            raise ValueError(f"{path.name}: {name} is {list(tensor.shape)}, expected {list(original[name].shape)}")
    save_file(tensors, path)
    return tensors


def load_dense(model: nn.Module, dense: Mapping[str, Tensor]) -> nn.Module:
    """Puts the decoded weights into an uncompressed float32 model of the same architecture; only a tied head may be missing."""
    report = model.load_state_dict(dict(dense), strict=False)
    missing = [name for name in report.missing_keys if not name.startswith("lm_head")]
    if missing or report.unexpected_keys:
        raise ValueError(f"dense model: missing {missing[:4]}, unexpected {report.unexpected_keys[:4]}")
    return model.eval()


def compare_logits(dense_model: nn.Module, peer_model: nn.Module, window: Tensor) -> dict[str, float]:
    """The largest difference of the logits of two models on one window [length], and the largest logit for scale."""
    with torch.no_grad():
        ours = dense_model(window[None]).logits.float()
        theirs = peer_model(window[None]).logits.float()
    return {"max_logit_difference": (ours - theirs).abs().max().item(), "max_logit": ours.abs().max().item()}


def write_result(task: Task, peer: str, version: str, fields: Mapping[str, Any]) -> None:
    """Writes result.json and prints its scalars; the dense model of a finished run must agree with the peer's own.

    Raises: ValueError when the logits differ by more than LOGIT_TOLERANCE of the largest one (or are not numbers).
    """
    head = {"peer": peer, "version": version, "torch": torch.__version__, "threads": torch.get_num_threads()}
    head |= {"method": task.method, "bits": task.bits, "group": task.group, "unsupported": None}
    result = head | dict(fields)
    if "seconds" in result:
        result["seconds_per_layer"] = result["seconds"] / result["linear_layers"]
    (task.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict | list)}))
    if result["unsupported"] is None and not result["max_logit_difference"] <= LOGIT_TOLERANCE * result["max_logit"]:
        raise ValueError(f"{peer}: the dense model differs from the peer's own by {result['max_logit_difference']:.3g}")


def write_unsupported(task: Task, peer: str, version: str, reason: str) -> None:
    """Writes a result.json that says why this peer cannot do this task; no weights are left behind."""
    shutil.rmtree(task.native)
    write_result(task, peer, version, {"unsupported": reason})
