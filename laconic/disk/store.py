"""Compressed models on disk: safetensors shards and one JSON that says how each weight decodes; checked before anything
is read.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.integrity import amend_checked, check_config, check_manifest, check_tensors, units, write_checked
from laconic.disk.tensors import INDEX, TensorFiles
from laconic.errors import CheckpointError
from laconic.host.foreign import read_object
from laconic.weights import Weight, unpack
from laconic.weights.base import BIAS, COLUMN_SCALE, asks_its_layer, class_of, pack
from laconic.weights.demands import Demands, why_no_bias, why_not
from laconic.weights.inputs import inputs_of
from laconic.weights.layout import check_spec, stored_names
from laconic.weights.spec import Spec

MANIFEST = "laconic.json"
SCHEMA = 1


class Compressed:
    """A compressed model directory: decodes its weights one at a time."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = path
        self.manifest = read_manifest(path, verify=verify)
        self.files = TensorFiles(path)
        self.weights: dict[str, Spec] = {
            name: self.manifest["specs"][i] for name, i in self.manifest["weights"].items()
        }
        for i in sorted(set(self.manifest["weights"].values())):
            check_spec(self.manifest["specs"][i], f"{path / MANIFEST}: spec {i}")
        self._account()

    def _account(self) -> None:
        """Raises CheckpointError unless every weight has exactly the tensors that its spec asks for, and the index is
        true.
        """
        self.parts = units(self.files.tensors, self.weights)
        for name, spec in self.weights.items():
            expected, found = {f"{name}.{key}" for key in stored_names(spec)}, set(self.parts[name])
            if found != expected:
                what = (
                    f"lacks {min(expected - found)}"
                    if expected - found
                    else f"has a tensor {min(found - expected)} too many"
                )
                raise CheckpointError(f"{self.path}: {name} {what}; the directory is damaged")
        index = self.files.index
        if index is not None and {name: stored.file.name for name, stored in self.files.tensors.items()} != index:
            raise CheckpointError(f"{self.path / INDEX}: damaged: it does not name the files that hold the tensors")

    def verify(self) -> int:
        """Compare every stored tensor and the config with what was written; returns the bytes read (0 where there are
        no checksums).

        Raises: CheckpointError naming the first that differs. Cost: about a second per GB.
        """
        if "checksums" not in self.manifest:
            return 0
        check_config(self.path, self.manifest)
        return check_tensors(self.path, self.files, self.manifest)

    @cached_property
    def names(self) -> set[str]:
        """The names of the module's state that are stored, packed or plain."""
        return set(self.parts)

    def packed(self, name: str) -> dict[str, Any]:
        """The stored tensors of a weight by their names within it, as (file, dtype, shape, bytes)."""
        return {key[len(name) + 1 :]: self.files.tensors[key] for key in self.parts[name]}

    def weight(self, name: str) -> Weight:
        """The weight that stands for a parameter. Raises: CheckpointError when spec and tensors disagree."""
        with self.files.open() as reader:
            tensors = {key: reader.get(f"{name}.{key}").clone() for key in self.packed(name)}
        try:
            return unpack(self.weights[name], tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {name}: {error}") from error

    def demands(self, name: str) -> Demands | None:
        """What a parameter's layer does with inputs and outputs, or None; what is not a stored weight asks for
        nothing.
        """
        return Demands.of(self.weight(name)) if asks_its_layer(self.weights.get(name, {})) else None

    def check_layers(self, name: str, layers: Iterable[nn.Module]) -> None:
        """Raises CheckpointError where the layers of a parameter cannot do with inputs and outputs what its weight asks
        for.
        """
        spec = self.weights[name]
        inputs, scaled = inputs_of(spec), COLUMN_SCALE in class_of(spec).parts_in(spec)
        for layer in layers:
            if inputs is not None and (reason := why_not(layer, inputs, scaled)) is not None:
                key = next(iter(inputs.to_spec()))
                raise CheckpointError(f"{self.path}: {name} is stored with {key}: {reason}")
            if BIAS in spec and (reason := why_no_bias(layer)) is not None:
                raise CheckpointError(f"{self.path}: {name} is stored with an output bias: {reason}")

    def nbytes(self, name: str) -> int:
        if name in self.weights:
            return sum(t.bytes for t in self.packed(name).values())
        return self.files.tensors[name].bytes if name in self.files.tensors else 0


def read_manifest(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a compressed directory. Raises: CheckpointError when it is missing, damaged, or of a newer kind.

    What it says of tensors and config is compared by `Compressed.verify` only; `verify=False` takes a manifest that was
    changed by hand.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: expected a compressed model with {MANIFEST}")
    manifest = read_object(file, CheckpointError)
    if manifest.get("format") == "laconic" and manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: schema {str(manifest.get('schema'))[:40]}; this version reads schema {SCHEMA}")
    specs, weights = manifest.get("specs"), manifest.get("weights")
    sound = manifest.get("format") == "laconic"
    if not (sound and isinstance(specs, list) and isinstance(weights, dict)) or not all(
        type(i) is int and 0 <= i < len(specs) and isinstance(specs[i], dict) for i in weights.values()
    ):
        raise CheckpointError(f"{file}: damaged: its weights do not refer to its specs")
    if verify:
        check_manifest(file, manifest)
    return manifest


def pack_weights(weights: dict[str, Weight]) -> tuple[dict[str, Tensor], dict[str, Spec]]:
    """Stored tensors (`parameter.name within the weight`) and specs of some weights by parameter name. Raises:
    SchemeError as `pack` does.
    """
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
    """Bytes of the files a model is made of: the safetensors it is read from, their index, and the manifest (not
    config, tokenizer or report).

    What lies beside them (another format's weights, an index left behind) is no part of it.
    """
    manifest = path / MANIFEST
    return TensorFiles(path).bytes + (manifest.stat().st_size if manifest.is_file() else 0)


def write_manifest(folder: Path, manifest: dict[str, Any], *, config: bool = False) -> None:
    """Write the manifest of a folder whose tensors (and, with `config`, config.json) are there: the last step of every
    writer.

    It gets the checksums of what lies there. Cost: one read of the tensors, about a second per GB.
    """
    write_checked(folder, MANIFEST, manifest, config=config)


def amend_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """Add to the manifest of a folder whose tensors stay as they are."""
    amend_checked(folder / MANIFEST, fields)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of any shape are equal bit for bit, NaNs included."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and (
        torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
