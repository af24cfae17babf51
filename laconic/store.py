"""Compressed models on disk: safetensors shards and one JSON that says how each weight decodes; checked before anything is read."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError
from laconic.foreign import read_object
from laconic.tensors import INDEX, TensorFiles
from laconic.weights import Weight, unpack
from laconic.weights.base import Spec, asks_its_layer, input_bits_of, pack
from laconic.weights.dense import DTYPES
from laconic.weights.inputs import Rounding, why_no_bias, why_not

MANIFEST = "laconic.json"
SCHEMA = 1
_SHARD = re.compile(r"model-\d{5}-of-\d{5}[.]safetensors")


class Compressed:
    """A compressed model directory: decodes its weights one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.files = TensorFiles(path)
        self.weights: dict[str, Spec] = {name: self.manifest["specs"][i] for name, i in self.manifest["weights"].items()}
        for name, spec in self.weights.items():
            _check_spec(spec, spec.get("shape"), f"{path / MANIFEST}: {name}")
            _check_inputs(spec, f"{path / MANIFEST}: {name}")

    @cached_property
    def names(self) -> set[str]:
        """The names of the module's state that are stored, packed or plain."""
        packed = {f"{name}.{key}" for name in self.weights for key in self.packed(name)}
        return set(self.files.tensors) - packed | set(self.weights)

    def packed(self, name: str) -> dict[str, Any]:
        """The stored tensors of a weight by their names within it, as (file, dtype, shape, bytes)."""
        return {key[len(name) + 1 :]: t for key, t in self.files.tensors.items() if key.startswith(name + ".")}

    def weight(self, name: str) -> Weight:
        """The weight that stands for a parameter. Raises: CheckpointError when spec and tensors disagree."""
        with self.files.open() as reader:
            tensors = {key: reader.get(f"{name}.{key}").clone() for key in self.packed(name)}
        try:
            return unpack(self.weights[name], tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error

    def rounding(self, name: str) -> Rounding | None:
        """What a parameter's layer does with inputs and outputs, or None; what is not a stored weight asks for nothing."""
        return Rounding.of(self.weight(name)) if asks_its_layer(self.weights.get(name, {})) else None

    def check_layers(self, name: str, layers: Iterable[nn.Module]) -> None:
        """Raises CheckpointError where the layers of a parameter cannot do with inputs and outputs what its weight asks for."""
        for key, why in (("input_bits", why_not), ("bias", why_no_bias)):
            for layer in layers if key in self.weights[name] else ():
                if (reason := why(layer)) is not None:
                    raise CheckpointError(f"{self.path}: {name} is stored with {'an output bias' if key == 'bias' else key}: {reason}")

    def nbytes(self, name: str) -> int:
        if name in self.weights:
            return sum(t.bytes for t in self.packed(name).values())
        return self.files.tensors[name].bytes if name in self.files.tensors else 0


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a compressed directory. Raises: CheckpointError when it is missing, damaged, or of a newer kind."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: expected a compressed model with {MANIFEST}")
    try:
        manifest = read_object(file, CheckpointError)
        specs, weights = manifest["specs"], manifest["weights"]
        sound = manifest["format"] == "laconic" and isinstance(specs, list) and isinstance(weights, dict)
        sound = sound and all(isinstance(i, int) and 0 <= i < len(specs) and isinstance(specs[i], dict) for i in weights.values())
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    if not sound:
        raise CheckpointError(f"{file}: damaged: its weights do not refer to its specs")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: schema {manifest.get('schema')!r}; this version reads schema {SCHEMA}")
    return manifest


def _check_spec(spec: Any, shape: Any, where: str) -> None:
    """Refuses a spec that could make its reader allocate more than the matrix it stands for, before anything is read."""
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in shape)):
        raise CheckpointError(f"{where}: shape must be two positive integers, got {shape!r}")
    limit = max(4 * shape[0] * shape[1], 1 << 21)
    if isinstance(spec, dict):
        inner = spec.get("shape", [1, 1])
        plain = isinstance(inner, list) and all(isinstance(n, int) and n > 0 for n in inner)
        if not plain or inner[0] * inner[-1] > limit or spec.get("dtype", "float32") not in DTYPES:
            raise CheckpointError(f"{where}: a part of shape {inner!r} in a matrix of {shape}; the manifest is damaged")
        for value in spec.values():
            _check_spec(value, shape, where)
    elif isinstance(spec, list):
        for value in spec:
            _check_spec(value, shape, where)


def _check_inputs(spec: Spec, where: str) -> None:
    """Raises CheckpointError unless `input_bits` and `bias` are absent, or stand at the outermost spec."""
    try:
        input_bits_of(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    todo: list[Any] = list(spec.values())
    while todo:
        value = todo.pop()
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict) and asks_its_layer(value):
            raise CheckpointError(f"{where}: {'input_bits' if 'input_bits' in value else 'bias'} in a part of a weight; the manifest is damaged")


def pack_weights(weights: dict[str, Weight]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """Stored tensors (`parameter.name within the weight`) and specs of some weights by parameter name. Raises: SchemeError as `pack` does."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    for name, weight in weights.items():
        spec, packed = pack(weight)
        tensors |= {f"{name}.{key}": value.cpu() for key, value in packed.items()}
        specs[name] = spec
    return tensors, specs


def manifest_of(records: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The manifest: every distinct spec once, and which weight has which."""
    specs: list[Spec] = []
    weights: dict[str, int] = {}
    for record in records:
        for name, spec in record["specs"].items():
            if spec not in specs:
                specs.append(spec)
            weights[name] = specs.index(spec)
    return {"format": "laconic", "schema": SCHEMA, **fields, "weights": dict(sorted(weights.items())), "specs": specs}


def stored_bytes(path: Path) -> int:
    """Bytes of the files a model is made of: its safetensors, their index, and the manifest (not config, tokenizer or report)."""
    files = [p for p in path.iterdir() if p.suffix == ".safetensors" or p.name in (INDEX, MANIFEST)]
    return sum(p.stat().st_size for p in files)


def remove_shards(folder: Path) -> None:
    """Remove the shards and the index of an earlier model of ours, over which a single `model.safetensors` was just written."""
    for file in [folder / INDEX, *folder.glob("*.safetensors")]:
        if file.name == INDEX or _SHARD.fullmatch(file.name):
            file.unlink(missing_ok=True)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaNs included."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and (torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
