"""Whether a compressed directory is what was written: a checksum for every weight and plain tensor, one of the config,
one of the manifest.
"""

import hashlib
import json
import logging
import mmap
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from laconic.disk.files import write_json
from laconic.disk.tensors import Stored, TensorFiles
from laconic.errors import CheckpointError
from laconic.host.foreign import read_object

_log = logging.getLogger("laconic")
_CHUNK = 1 << 24  # bytes summed at a time
SEALS = ("checksums", "config", "digest")
"""What the manifest says of itself and of what lies beside it."""
_FREE = ("architectures", "transformers_version", "_name_or_path", "name_or_path", "use_cache", "quantization_config")
"""What may change in a config.json without changing what the stored tensors mean."""


def write_checked(folder: Path, name: str, manifest: Mapping[str, Any], *, config: bool = False) -> None:
    """Write the manifest of a folder whose tensors are there already, with the checksums of what they are; with
    `config`, of its config too.

    Every writer of compressed directories ends here. Cost: one read of the tensors, about a second per GB.
    """
    sealed = {key: value for key, value in manifest.items() if key not in SEALS}
    files = TensorFiles(folder)
    sealed["checksums"] = {
        key: f"{crc:08x}" for key, crc in checksums(files, units(files.tensors, sealed["weights"])).items()
    }
    if config:
        sealed["config"] = config_digest(folder)
    sealed["digest"] = digest(sealed)
    write_json(folder / name, sealed)


def amend_checked(file: Path, fields: Mapping[str, Any]) -> None:
    """Add fields to a manifest that was written so. The tensors have not changed since, so they need not be read.
    Raises: CheckpointError.
    """
    manifest = read_object(file, CheckpointError)
    checked = check_manifest(file, manifest)
    manifest |= {key: value for key, value in fields.items() if key not in SEALS}
    write_json(file, manifest | {"digest": digest(manifest)} if checked else manifest)


def units(tensors: Mapping[str, Stored], weights: Iterable[str]) -> dict[str, list[str]]:
    """What has a checksum of its own: every weight with the names of its tensors, and every other tensor."""
    weights = dict.fromkeys(sorted(weights))  # in an order that every process has
    found: dict[str, list[str]] = {name: [] for name in weights}
    for name in sorted(tensors):
        parts = name.split(".")
        owner = next((part for i in range(1, len(parts)) if (part := ".".join(parts[:i])) in weights), name)
        found.setdefault(owner, []).append(name)
    return found


def checksums(files: TensorFiles, units: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """CRC-32 of names, types, shapes and bytes of the tensors of every unit, in the order of the names. Reads through
    memory maps.
    """
    found = {}
    with ExitStack() as stack:
        maps: dict[Path, memoryview] = {}
        for unit, names in units.items():
            crc = 0
            for name in names:
                stored = files.tensors[name]
                if stored.file not in maps:
                    maps[stored.file] = _mapped(stored.file, stack)
                crc = zlib.crc32(f"{name} {stored.dtype} {list(stored.shape)}".encode(), crc)
                stop = stored.start + stored.bytes
                for start in range(stored.start, stop, _CHUNK):
                    with maps[stored.file][start : min(start + _CHUNK, stop)] as part:
                        crc = zlib.crc32(part, crc)
            found[unit] = crc
    return found


def _mapped(file: Path, stack: ExitStack) -> memoryview:
    try:
        stream = stack.enter_context(file.open("rb"))
        mapped = stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return stack.enter_context(memoryview(mapped))


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (the first 64 bits, hex) of a manifest's canonical JSON, its own `digest` left out."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def config_digest(folder: Path) -> str:
    """The same of what a folder's config.json says of the model."""
    return digest(
        {key: value for key, value in read_object(folder / "config.json", CheckpointError).items() if key not in _FREE}
    )


def check_manifest(file: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has checksums (those of earlier versions have none, which is logged). Raises: CheckpointError
    if it was changed.
    """
    sealed = [key for key in ("checksums", "digest") if key in manifest]
    if not sealed:
        _log.warning(
            "%s: written by an earlier version, without checksums: damage to the tensors would not be seen", file
        )
        return False
    if len(sealed) < 2 or manifest["digest"] != digest(manifest):
        raise CheckpointError(f"{file}: damaged, or changed by hand: its content is not what its digest says; {_WAY}")
    return True


def check_config(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises CheckpointError where config.json no longer says what it said when the model was written."""
    if "config" in manifest and config_digest(folder) != manifest["config"]:
        raise CheckpointError(f"{folder / 'config.json'}: damaged, or changed since the model was written; {_WAY}")


def check_tensors(path: Path, files: TensorFiles, manifest: Mapping[str, Any]) -> int:
    """Read every stored tensor once and compare its checksum; returns the bytes read. Raises: CheckpointError naming
    the first that differs.
    """
    expected = manifest["checksums"]
    found = units(files.tensors, manifest["weights"])
    if not isinstance(expected, dict) or set(expected) != set(found):
        odd = sorted(set(expected) ^ set(found)) if isinstance(expected, dict) else ["the checksums"]
        raise CheckpointError(f"{path}: {odd[0]} is stored and not in the manifest, or the other way round; {_WAY}")
    for name, crc in checksums(files, found).items():
        if expected[name] != f"{crc:08x}":
            raise CheckpointError(f"{path}: {name} is damaged: its bytes are not those that were written; {_WAY}")
    return sum(stored.bytes for stored in files.tensors.values())


_WAY = "copy it anew, or compress again (verify=False reads it as it is)"
