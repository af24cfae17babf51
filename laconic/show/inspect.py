"""What a compressed directory holds, byte for byte, without decoding it."""

from pathlib import Path
from typing import Any

from laconic.disk.ours import REPORT_JSON
from laconic.disk.store import MANIFEST, Compressed
from laconic.disk.tensors import INDEX, read_header
from laconic.engine.plan import plan_of
from laconic.errors import CheckpointError
from laconic.host.foreign import read_object
from laconic.weights.layout import words_of


def inspect_directory(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """A row per weight (kind, shape, bits, bytes, error), a row per plain tensor, and the rest of the files; rows add
    up to `bytes`.

    `plan` is what each site got, as expressions of schemes by name (`Plan.to_json`).

    `bytes` counts the files a model is made of: the safetensors it is read from, their index, the manifest. Config,
    tokenizer, reports and what else lies there are listed apart. With `verify` every tensor is read and compared with
    its checksum; `verified` are the bytes that were.
    Raises: CheckpointError when the directory is not a sound compressed model.
    """
    folder = Path(path)
    stored = Compressed(folder)
    verified = stored.verify() if verify else None
    errors = _errors(folder)
    rows = []
    packed: set[str] = set()
    for name, spec in stored.weights.items():
        parts = stored.packed(name)
        packed |= {f"{name}.{key}" for key in parts}
        size = sum(t.bytes for t in parts.values())
        entries = spec["shape"][0] * spec["shape"][1]
        rows.append(
            {
                "name": name,
                "kind": words_of(spec),
                "shape": spec["shape"],
                "bits": 8 * size,
                "bits_per_weight": 8 * size / entries,
                "bytes": size,
                "error": errors.get(name),
                "tensors": {key: t.bytes for key, t in parts.items()},
            }
        )
    plain = [
        {"name": name, "kind": t.dtype.lower(), "shape": list(t.shape), "bytes": t.bytes}
        for name, t in sorted(stored.files.tensors.items())
        if name not in packed
    ]
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    ours = (
        {file.name for file in stored.files.files} | {MANIFEST} | ({INDEX} if stored.files.index is not None else set())
    )
    model = {name: size for name, size in files.items() if name in ours}
    headers = sum(read_header(folder / name)[1] for name in model if name.endswith(".safetensors"))
    container = headers + sum(size for name, size in model.items() if not name.endswith(".safetensors"))
    source = stored.manifest.get("source")
    return {
        "path": str(folder),
        "scheme": stored.manifest.get("scheme"),
        "plan": plan_of(stored.manifest),
        "metrics": stored.manifest.get("metrics", {}),
        "weights": rows,
        "plain": plain,
        "container_bytes": container,
        "bytes": sum(model.values()),
        "other_files": {name: size for name, size in files.items() if name not in model},
        "verified": verified,
        "parameters": source.get("parameters") if isinstance(source, dict) else None,
    }


def _errors(folder: Path) -> dict[str, float]:
    file = folder / REPORT_JSON
    if not file.is_file():
        return {}
    try:
        return {site["parameter"]: float(site["error"]) for site in read_object(file, CheckpointError)["sites"]}
    except (CheckpointError, ValueError, KeyError, TypeError):  # the report is for people; a damaged one hides no bytes
        return {}
