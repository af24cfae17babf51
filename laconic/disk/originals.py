"""Models that have not been compressed: config, tensors, and which of them make up each parameter, whatever they are
stored in.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from laconic.disk.dequantize import METHODS, Dequantized, block_of, pairs_in, way
from laconic.disk.skeletons import build_skeleton, read_config, routes, settle_architecture
from laconic.disk.tensors import TensorFiles, is_finite
from laconic.disk.ties import apart, separate, untie_config
from laconic.errors import CheckpointError
from laconic.model.sites import tied_names
from laconic.weights.demands import Demands

FLOATS = {"F64", "F32", "F16", "BF16"}
_HALVES = (torch.bfloat16, torch.float16, torch.float32)


class Checkpoint:
    """A Hugging Face model directory that has not been compressed: config, tensors, and which of them make up each
    parameter.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path, self.trust_remote_code = path, trust_remote_code
        self.config = read_config(path, trust_remote_code)
        method = _quantized_by(self.config)
        self.files = TensorFiles(path)
        quantized = pairs_in(self.files.tensors)
        if method is not None and (method not in METHODS or not quantized):
            raise CheckpointError(f"{path}: the checkpoint is already quantized by {method!r}; {way(path)}")
        if quantized:
            dtype = getattr(self.config.get_text_config(), "dtype", None)
            self.files = Dequantized(
                path, dtype if dtype in _HALVES else torch.bfloat16, block_of(_quantization(self.config))
            )
        if method is not None:
            _as_plain(self.config)

    @cached_property
    def _configured(self) -> nn.Module:
        """The model with the ties that its config says."""
        self._settled = settle_architecture(self.config, self.files.tensors)
        return build_skeleton(self.config, self.trust_remote_code)

    @cached_property
    def untied(self) -> list[str]:
        """The parameters that the config ties to others, and that are stored with values of their own: as in
        transformers, those hold.
        """
        return apart(self._configured, set(self._routes), self._same)

    def _same(self, one: str, other: str) -> bool:
        values = self.read([one, other])
        return values[one].shape == values[other].shape and torch.equal(
            values[one], values[other].to(values[one].dtype)
        )

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without its weights: parameters on the meta device, small computed buffers for real, ties in place.

        Where `untied` has names, the config is brought to say so too.
        """
        model, untied = self._configured, self.untied
        if untied:
            separate(model, untied)
            untie_config(self.config, tied_names(model), lambda config: build_skeleton(config, self.trust_remote_code))
        return model

    @cached_property
    def notes(self) -> list[str]:
        """What a user must hear of the checkpoint."""
        self.skeleton  # noqa: B018 # which finds out
        lines = [
            f"{name}: the config ties it to another tensor, but it is stored with values of its own; they are kept"
            for name in self.untied
        ]
        if self._settled is not None:
            lines.append(f"config.json names no architecture; by its tensors it is a {self._settled}")
        if isinstance(self.files, Dequantized):
            kinds = sorted({pair.kind for pair in self.files.pairs.values()})
            name = str(self.files.dtype).removeprefix("torch.")
            lines.append(
                f"{len(self.files.pairs)} tensors are stored as {' and '.join(kinds)}; they were taken by their "
                f"scales, as {name}"
            )
        return lines

    @cached_property
    def _routes(self) -> dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]:
        """For every parameter name: its converter (merging experts, say) if it has one, and the (pattern, stored name)
        it is made of.
        """
        return routes(self._configured, self.files.tensors)

    @cached_property
    def unused(self) -> list[str]:
        """Stored tensors that no parameter of the model is made of (multi-token-prediction layers, say); they are
        carried over.
        """
        used = {stored for _, sources in self._routes.values() for _, stored in sources}
        return [name for name in self.files.tensors if name not in used]

    def check(self) -> None:
        """Raises CheckpointError unless every parameter of the configured model is stored, as floats, in the configured
        shape.
        """
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        for names in tied_names(self.skeleton):
            if not any(name in self._routes for name in names):
                raise CheckpointError(
                    f"{self.path}: the config asks for {names[0]}, which is not stored{self._hint(names[0])}"
                )
            name = next(name for name in names if name in self._routes)
            converter, sources = self._routes[name]
            for _, stored in sources:
                found = self.files.tensors[stored]
                if found.dtype not in FLOATS:
                    raise CheckpointError(
                        f"{found.file}: {stored} is stored as {found.dtype}; expected float32, float16 or bfloat16, "
                        f"or fp8 with its scales beside it; {way(self.path)}"
                    )
            shape, expected = self.files.tensors[sources[0][1]].shape, tuple(parameters[name].shape)
            if converter is None and shape != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is stored with shape {shape}, the config asks for {expected}"
                )

    def _hint(self, missing: str) -> str:
        head = getattr(self._configured, "get_output_embeddings", lambda: None)()
        is_head = head is not None and self._configured.get_submodule(missing.rpartition(".")[0]) is head
        tied = getattr(self.config.get_text_config(), "tie_word_embeddings", False)
        return (
            "; if the head is the embedding, its config.json has to say tie_word_embeddings"
            if is_head and not tied
            else ""
        )

    def read(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with self.files.open() as reader:
            for name in names:
                if name in found or name not in self._routes:
                    continue
                converter, sources = self._routes[name]
                if converter is None:
                    found[name] = reader.get(sources[-1][1])
                    continue
                fresh = WeightConverter(converter.source_patterns, converter.target_patterns, converter.operations)
                for pattern, stored in sources:
                    fresh.add_tensor(name, stored, pattern, reader.get(stored))
                converted = fresh.convert(name, model=self._configured, config=self.config)
                found |= {
                    key: value[0] if isinstance(value, list) else value
                    for key, value in converted.items()
                    if key in names
                }
        return found

    def demands(self, name: str) -> Demands | None:
        return None

    def nbytes(self, name: str) -> int:
        return (
            sum(self.files.tensors[stored].bytes for _, stored in self._routes[name][1]) if name in self._routes else 0
        )

    def on_disk(self, name: str) -> int:
        """Bytes that a parameter takes in the checkpoint's files: fewer than `nbytes` where it is stored in fp8 or
        MXFP4.
        """
        return sum(self.files.on_disk(stored) for _, stored in self._routes[name][1]) if name in self._routes else 0

    def non_finite(self) -> list[str]:
        """The parameters that hold a NaN or an infinity. Cost: one read of the whole checkpoint, a tensor at a time."""
        bad = []
        for name in self._routes:
            tensor = self.read([name]).get(name)
            if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
                bad.append(name)
        return bad


def original_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the original's safetensors files, headers included."""
    return sum(file.stat().st_size for file in {stored.file for stored in checkpoint.files.tensors.values()})


def _quantization(config: Any) -> Any:
    """What a config says of how its checkpoint is quantized: a dictionary, an object, or None."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def _quantized_by(config: Any) -> str | None:
    quantization = _quantization(config)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    return None if method is None else str(getattr(method, "value", method))


def _as_plain(config: Any) -> None:
    """Take from a config what it says of quantization."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
