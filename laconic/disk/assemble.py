"""From parts to shards: the tensors of many safetensors files in a few, copied a few MB at a time."""

import json
import struct
from pathlib import Path
from typing import Any

from laconic.disk.files import copy_bytes, settle, write_header, write_json
from laconic.disk.tensors import INDEX, read_header

_SHARD = 4 << 30  # bytes per file of weights


def assemble(parts: list[Path], out: Path) -> None:
    """Copy the parts' tensors into shards of at most 4 GiB (one tensor at least), in the order of their names, with an
    index.
    """
    shards: list[list[tuple[str, Path]]] = [[]]
    size = 0
    headers = {part: read_header(part) for part in parts}
    entries = sorted((name, part) for part, (tensors, _) in headers.items() for name in tensors)
    for name, part in entries:
        nbytes = headers[part][0][name].bytes
        if shards[-1] and size + nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, part))
        size += nbytes
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for file, shard in zip(names, shards, strict=True):
        _write_shard(out / file, shard)
    if count > 1:
        total = sum(t.bytes for tensors, _ in headers.values() for t in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _write_shard(file: Path, shard: list[tuple[str, Path]]) -> None:
    raw: dict[Path, tuple[dict[str, Any], int]] = {}
    for part in {part for _, part in shard}:
        with part.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            raw[part] = json.loads(stream.read(length)), 8 + length
    parts, offsets, entries = dict(shard), {}, []
    for name, part in shard:
        entry = raw[part][0][name]
        start, stop = entry["data_offsets"]
        offsets[name] = raw[part][1] + start
        entries.append((name, entry["dtype"], entry["shape"], stop - start))
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as target:
        for name, _, _, nbytes in write_header(target, entries):
            copy_bytes(parts[name], offsets[name], nbytes, target)
    settle(temporary, file)
