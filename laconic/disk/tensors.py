"""Safetensors directories: headers that are checked before anything is read, tensors read by name through memory
maps.
"""

import math
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
from laconic.host.foreign import parse_object, read_object

INDEX = "model.safetensors.index.json"
WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
"""Bytes of an entry by the type's name in safetensors files."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type as safetensors names it, its shape, its bytes, and where in the file they begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int


def read_header(file: Path) -> tuple[dict[str, Stored], int]:
    """The tensors a safetensors file announces and the bytes its header takes, after checking that the file holds them
    all, side by side.

    Raises: CheckpointError when the file is missing, truncated or not a safetensors file.
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; the checkpoint is incomplete")
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise CheckpointError(f"{file}: not a safetensors file, or cut off within its header ({size} bytes)")
            header = parse_object(stream.read(length), CheckpointError, f"{file}: the header")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if stored.start != position:
            raise CheckpointError(f"{file}: damaged: {name} begins at byte {stored.start}, expected {position}")
        position += stored.bytes
    if position != size:
        raise CheckpointError(
            f"{file}: truncated or damaged: its header announces {position} bytes, the file has {size}"
        )
    return tensors, 8 + length


def _entry(file: Path, name: str, entry: Any, first: int) -> Stored:
    """A tensor as a header describes it. Raises: CheckpointError when type, shape and bytes do not belong together."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = (
            isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and stop >= start
        )
        width = WIDTHS.get(dtype)
        if not sound or (width is not None and width * math.prod(shape) != stop - start):
            raise ValueError(f"type {dtype!r}, shape {list(shape)}, bytes {start} to {stop}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header is damaged: {name[:200]}: {str(error)[:200]}") from error
    return Stored(file, dtype, shape, stop - start, first + start)


class TensorFiles:
    """The tensors of a directory's safetensors files by name; files are mapped only while `open` is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Stored] = {}
        self.index: dict[str, str] | None = None
        try:
            self.files = self._files()
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be read: {error}") from error
        for file in self.files:
            found = read_header(file)[0]
            if twice := found.keys() & self.tensors.keys():
                raise CheckpointError(
                    f"{file}: stores {min(twice)}, which {self.tensors[min(twice)].file.name} stores too"
                )
            self.tensors |= found

    @property
    def bytes(self) -> int:
        """Bytes of the files, and of their index where they have one."""
        used = [*self.files, *([self.directory / INDEX] if self.index is not None else [])]
        return sum(file.stat().st_size for file in used)

    def _files(self) -> list[Path]:
        """As transformers chooses: one `model.safetensors` before an index, which may have been left behind."""
        single, index = self.directory / "model.safetensors", self.directory / INDEX
        if single.is_file():
            return [single]
        if index.is_file():
            places = read_object(index, CheckpointError).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise CheckpointError(f"{index}: damaged index: it does not say which file each tensor is in")
            names = sorted(set(places.values()))
            for name in names:
                if Path(name).name != name or "\0" in name:
                    raise CheckpointError(
                        f"{index}: names the file {name!r}, which is outside the checkpoint's directory"
                    )
            self.index = places
            return [self.directory / name for name in names]
        others = sorted(p.name for p in self.directory.glob("*.bin")) if self.directory.is_dir() else []
        hint = f"; {others[0]} is a pickle, which is never read: convert it to safetensors first" if others else ""
        raise CheckpointError(f"{self.directory}: expected model.safetensors or {INDEX}{hint}")

    def on_disk(self, name: str) -> int:
        """Bytes that a tensor takes in the files, scales included."""
        return self.tensors[name].bytes

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
    """Whether no entry of a tensor of any shape is NaN or infinite, checked in parts that bound the working memory."""
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
    """The bytes of a tensor of any shape, row by row, as files hold them; copied only where they do not lie so."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # of a single number it can be anything, and then it has no bytes to look at
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
