"""Files that are there whole or not at all: text, JSON and safetensors under a temporary name, renamed when they are on
the disk.
"""

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.disk.tensors import WIDTHS, bytes_of
from laconic.errors import CheckpointError, LaconicError, OutputError

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
_CHUNK = 1 << 24  # bytes copied at a time
_SEAL = "crc"

Entry = tuple[str, str, list[int], int]
"""Of a tensor: its name, its type as safetensors names it, its shape, its bytes."""


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full disk, and whatever else the system has against a file, into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LaconicError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{out}: the disk is full ({error}); finished parts are kept: free some space and run again with "
                "--resume"
            ) from error
        raise OutputError(
            f"{out}: cannot be written ({error}); what is finished is kept: see to that and run again with --resume"
        ) from error


def write_json(file: Path, value: Any, indent: int | None = None, suffix: str = ".tmp") -> None:
    """Write a JSON file under a temporary name and rename it."""
    write_text(file, json.dumps(value, indent=indent, separators=(",", ":") if indent is None else None) + "\n", suffix)


def write_text(file: Path, text: str, suffix: str = ".tmp") -> None:
    """Write a text file under a temporary name, the file's with a suffix, and rename it."""
    temporary = file.with_name(file.name + suffix)
    temporary.write_text(text, encoding="utf-8")
    settle(temporary, file)


def atomically(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, suffix: str = ".tmp"
) -> None:
    """Write a safetensors file under a temporary name, the file's with a suffix, and rename it."""
    temporary = file.with_name(file.name + suffix)
    write_tensors(temporary, tensors, metadata)
    settle(temporary, file)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, a tensor at a time, as any file is written.

    The safetensors library writes under a name of its own choosing, which a kill leaves behind, readable by its owner
    only, and tells a full disk as an error of its own.
    """
    given = {name: (name, TYPES[t.dtype], list(t.shape), t.nbytes) for name, t in tensors.items()}
    with file.open("wb") as target:
        for name, *_ in write_header(target, given.values(), metadata):
            target.write(bytes_of(tensors[name]))


def write_header(target: Any, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> list[Entry]:
    """Write a safetensors header to an open file; returns the tensors in the order in which their bytes have to follow.

    The widest types first, so that every tensor is aligned to its own width, as the format advises.
    """
    ordered = sorted(entries, key=lambda entry: (-WIDTHS.get(entry[1], 1), entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, dtype, shape, nbytes in ordered:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    target.write(struct.pack("<Q", len(text)) + text)
    return ordered


def copy_bytes(source: Path, start: int, count: int, target: Any) -> None:
    """Copy a part of a file to an open one, a few MB in memory."""
    with source.open("rb") as stream:
        stream.seek(start)
        while count:
            chunk = stream.read(min(count, _CHUNK))
            target.write(chunk)
            count -= len(chunk)


def settle(temporary: Path, file: Path) -> None:
    """Give a file its name, once its bytes are on the disk."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(file)


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata with a checksum of it and of the tensors, by which `read_seal` finds the file that holds them
    damaged.
    """
    told = dict(metadata or {"format": "pt"})
    return told | {_SEAL: str(_checksum(tensors.items(), told))}


def read_seal(file: Path) -> dict[str, str]:
    """The metadata of a file that was written with a `seal`. Raises: CheckpointError unless it is as it was then. Cost:
    it is read once.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            told = dict(reader.metadata() or {})
            seal = told.pop(_SEAL, None)
            names = reader.keys()
            found = _checksum(((name, reader.get_tensor(name)) for name in names), told)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if seal != str(found):
        raise CheckpointError(f"{file}: damaged: it does not hold what was written")
    return told


def write_sealed_json(file: Path, value: Any) -> None:
    """`write_json`, with a checksum by which `read_sealed_json` finds the file damaged."""
    write_json(file, {"value": value, _SEAL: zlib.crc32(json.dumps(value).encode())})


def read_sealed_json(file: Path) -> Any:
    """What `write_sealed_json` wrote. Raises: CheckpointError unless it is that."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        value, seal = told["value"], told[_SEAL]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    if seal != zlib.crc32(json.dumps(value).encode()):
        raise CheckpointError(f"{file}: damaged: it does not hold what was written")
    return value


def _checksum(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> int:
    """CRC-32 of names, types, shapes and bytes, in any order, and of the metadata."""
    crc = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in tensors:
        own = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        crc ^= zlib.crc32(bytes_of(tensor), own) if tensor.numel() else own
    return crc
