"""Safetensors directories: headers that are checked before anything is read, tensors read by name through memory maps."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors names it, its shape, and its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_header(file: Path) -> tuple[dict[str, Stored], int]:
    """The tensors a safetensors file announces and the bytes its header takes, after checking that the file holds them all.

    Raises: CheckpointError when the file is missing, truncated or not a safetensors file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; the checkpoint is incomplete")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(f"{file}: not a safetensors file, or cut off within its header ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Stored(file, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
                for name, entry in header.items()
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file}: the header is damaged: {error}") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: truncated or damaged: its header announces {8 + length + end} bytes, the file has {size}")
    return tensors, 8 + length


class TensorFiles:
    """The tensors of a directory's safetensors files by name; files are mapped only while `open` is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            self.tensors |= read_header(file)[0]

    def _files(self) -> list[Path]:
        """As transformers chooses: one `model.safetensors` before an index, which may have been left behind."""
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if single.is_file():
            return [single]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index}: damaged index: {error}") from error
            for name in names:
                if Path(name).name != name:
                    raise CheckpointError(f"{index}: names the file {name!r}, which is outside the checkpoint's directory")
            return [self.directory / name for name in names]
        others = sorted(p.name for p in self.directory.glob("*.bin")) if self.directory.is_dir() else []
        hint = f"; {others[0]} is a pickle, which is never read: convert it to safetensors first" if others else ""
        raise CheckpointError(f"{self.directory}: expected model.safetensors or {INDEX}{hint}")

    @contextmanager
    def open(self) -> Iterator["Reader"]:
        reader = Reader(self.tensors)
        try:
            yield reader
        finally:
            reader.close()


class Reader:
    """Reads tensors while it is open. What it returns is a view of the map: copy it to keep it."""

    def __init__(self, tensors: dict[str, Stored]) -> None:
        self.tensors = tensors
        self._handles: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        file = self.tensors[name].file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name}: {error}") from error

    def close(self) -> None:
        self._handles.clear()


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, checked in parts that bound the working memory."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 24))


def checksum_of(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():
            crc = zlib.crc32(bytes_of(tensors[name]), crc)
    return crc


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row, as files hold them; copied only where they do not lie so."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # of a single number it can be anything, and then it has no bytes to look at
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
