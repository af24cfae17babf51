"""Checkpoints that store matrices as fp8 or MXFP4 beside their scales, read as the values these stand for, a tensor at
a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.disk.files import TYPES
from laconic.disk.tensors import Reader, Stored, TensorFiles
from laconic.errors import CheckpointError

_FP8 = {"F8_E4M3", "F8_E5M2"}
_SCALES = (
    "_scale_inv",
    "_scale",
)  # of DeepSeek, Qwen and transformers; of compressed-tensors, fbgemm and modelopt. Both multiply
_BESIDE = ("input_scale", "activation_scale", "k_scale", "v_scale")  # of inputs, which are not rounded here
_PACKED = ("weight_packed", "qweight", "weight_shape", "quant_state")  # forms that are not read
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4")


@dataclass(frozen=True)
class Pair:
    """A stored tensor and the one with its scales; `kind` is "fp8" or "mxfp4"."""

    kind: str
    values: str
    scales: str


def pairs_in(tensors: dict[str, Stored]) -> dict[str, Pair]:
    """The tensors that stand for others, by the name of what they stand for."""
    found = {}
    for name, stored in tensors.items():
        if stored.dtype in _FP8:
            scales = next((name + end for end in _SCALES if name + end in tensors), None)
            if scales is not None:
                found[name] = Pair("fp8", name, scales)
        elif name.endswith("_blocks") and stored.dtype == "U8" and len(stored.shape) == 4:
            whole = name.removesuffix("_blocks")
            if tensors.get(f"{whole}_scales") is not None:
                found[whole] = Pair("mxfp4", name, f"{whole}_scales")
    return found


class Dequantized(TensorFiles):
    """The tensors of a directory, those of its pairs in `dtype`, by the name and with the bytes of what they stand for.

    `block` [rows, columns]: how many entries a scale of a two-dimensional grid is for, where the config says it.
    Raises: CheckpointError for matrices packed in other forms, and for scales that do not fit their values.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, block: tuple[int, int] | None = None) -> None:
        super().__init__(directory)
        self.stored, self.pairs, self.dtype, self.block = self.tensors, pairs_in(self.tensors), dtype, block
        odd = next((name for name in self.stored if name.rpartition(".")[2].startswith(_PACKED)), None)
        if odd is not None:
            raise CheckpointError(f"{directory}: stores {odd}, a packed form that is not read; {way(directory)}")
        used = {name for pair in self.pairs.values() for name in (pair.values, pair.scales)}
        owners = {name.rpartition(".")[0] for name in used}
        beside = {f"{owner}.{name}" for owner in owners for name in _BESIDE}
        self.tensors = {name: stored for name, stored in self.stored.items() if name not in used | beside}
        self.tensors |= {name: self._described(name, pair) for name, pair in self.pairs.items()}

    def _described(self, name: str, pair: Pair) -> Stored:
        values, scales = self.stored[pair.values], self.stored[pair.scales]
        shape = values.shape
        if pair.kind == "mxfp4":
            experts, rows, groups, half = values.shape
            shape = (experts, groups * half * 2, rows)
            sound = scales.dtype == "U8" and scales.shape == values.shape[:-1]
        else:
            sound = len(shape) >= 2 and (
                math.prod(scales.shape) == 1 or _spans(shape, scales.shape, self.block) is not None
            )
        if not sound:
            shapes = f"{list(values.shape)} with scales {list(scales.shape)}"
            raise CheckpointError(
                f"{values.file}: {name} is stored as {pair.kind} {shapes}, which do not belong together; "
                f"{way(self.directory)}"
            )
        return Stored(values.file, TYPES[self.dtype], shape, self.dtype.itemsize * math.prod(shape), values.start)

    def on_disk(self, name: str) -> int:
        pair = self.pairs.get(name)
        return (
            self.stored[name].bytes if pair is None else self.stored[pair.values].bytes + self.stored[pair.scales].bytes
        )

    @contextmanager
    def open(self) -> Iterator[Reader]:
        reader = _Dequantizing(self)
        try:
            yield reader
        finally:
            reader.close()


class _Dequantizing(Reader):
    def __init__(self, files: Dequantized) -> None:
        super().__init__(files.stored)
        self.files = files

    def get(self, name: str) -> Tensor:
        pair = self.files.pairs.get(name)
        if pair is None:
            return super().get(name)
        values, scales = super().get(pair.values), super().get(pair.scales)
        found = from_mxfp4(values, scales) if pair.kind == "mxfp4" else from_fp8(values, scales, self.files.block)
        return found.to(self.files.dtype)


def from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """W = values * scales in float32, for values [..., out, in] in fp8 and one scale for all, one per row, or one per
    block of rows and columns.

    Blocks at the far edges may be smaller. Scales in bytes are exponents: 2^(byte - 127).
    Source: DeepSeek-V3 section 3.3.2 (128 x 128 blocks, `weight_scale_inv`); OCP Microscaling Formats 1.0
    (E8M0 scales).
    """
    factor = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    if factor.numel() == 1:
        return values.float() * factor.reshape(())
    spans = _spans(tuple(values.shape), tuple(scales.shape), block)
    if spans is None:
        raise CheckpointError(f"fp8: scales {list(scales.shape)} do not fit values {list(values.shape)}")
    if factor.dim() < values.dim():
        factor = factor.unsqueeze(-1)
    rows, columns = values.shape[-2:]
    factor = factor.repeat_interleave(spans[0], -2)[..., :rows, :].repeat_interleave(spans[1], -1)[..., :columns]
    return values.float() * factor


def _spans(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """How many rows and columns a scale is for; None where the scales do not fit."""
    grid = scales if len(scales) == len(shape) else (*scales, 1)
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    found = []
    for entries, number, span in zip(shape[-2:], grid[-2:], block or (0, 0), strict=True):
        if span and -(-entries // span) == number:
            found.append(span)
        elif number and entries % number == 0:
            found.append(entries // number)
        else:
            return None
    return found[0], found[1]


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """W [experts, in, out] in float32 of blocks [experts, out, in / 32, 16] (two E2M1 values a byte, the lower half
    first) and a byte of scale for each: value * 2^(scale - 127).

    Source: OCP Microscaling Formats 1.0; gpt-oss stores its experts so, the other way round than it multiplies with
    them.
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    return (values * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2).transpose(-1, -2).contiguous()


def block_of(quantization: Any) -> tuple[int, int] | None:
    """The block size that a quantization config names."""
    get = quantization.get if isinstance(quantization, dict) else lambda name: getattr(quantization, name, None)
    block = get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return None
    return block[0], block[1]


def way(path: Path) -> str:
    """The command that makes a plain checkpoint of one that is quantized in another form, where transformers can."""
    code = (
        "from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained('{path}').dequantize().save_pretrained('dense')"
    )
    return f'start from the original weights, or from: python -c "{code}"'
