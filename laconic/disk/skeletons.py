"""Skeletons: a configured model without its weights, and which stored tensors each of its parameters is made of."""

import copy
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from laconic.errors import CheckpointError
from laconic.host.foreign import Foreign, read_object
from laconic.model.sites import tied_names

_CONFIG = 1 << 24  # bytes of a config.json; labels of 20,000 classes take one of them in sixteen


class _MetaParameters(TorchFunctionMode):
    """Uninitialised tensors are made on the meta device, everything else (rotary tables, masks) for real: a skeleton
    without weights.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises: CheckpointError when there is none, or when it wants code that came with the
    checkpoint.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: expected a model directory with config.json")
    raw = read_object(file, CheckpointError, _CONFIG)
    if raw.get("auto_map") and not trust_remote_code:
        code = (
            sorted(map(str, raw["auto_map"].values())) if isinstance(raw["auto_map"], dict) else [str(raw["auto_map"])]
        )
        raise CheckpointError(
            f"{file}: the model wants to run code that came with it ({code[0]}); pass --trust-remote-code to allow that"
        )
    if (told := raw.get("transformers_weights")) not in (None, "model.safetensors"):
        raise CheckpointError(
            f"{file}: says that the weights are in {told!r} (transformers_weights); model.safetensors or its index are "
            "read: rename the file to that "
            "and take the field out"
        )
    with Foreign(CheckpointError, file):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights  # it is about these files, not about what is made of them
    return config


def build_skeleton(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model class the config names, built without allocating its weights. Raises: CheckpointError for an unknown
    class.
    """
    config = copy.deepcopy(config)  # building notes things in it, its float type among them
    names = getattr(config, "architectures", None) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"config.json: architectures should be a list of names, got {names!r}")
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    with Foreign(CheckpointError, f"cannot build {names or config.model_type} from its config"), _MetaParameters():
        if model_class is not None:
            model = model_class._from_config(config, dtype=torch.float32)
        else:
            auto = transformers.AutoModelForCausalLM if any("CausalLM" in n for n in names) else transformers.AutoModel
            model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = (
            "eager"  # one matrix product per expert, so that every expert's inputs can be seen
        )
    return model.eval().requires_grad_(False)


def settle_architecture(config: Any, tensors: Collection[str]) -> str | None:
    """Let a config that names no class name the one whose parameters the stored tensors are; returns the name, None if
    nothing was to do.

    Of the classes that transformers has for the config's type: the one that lacks fewest parameters, leaves fewest
    tensors over, and needs fewest renamed; among equals a language model, then others with a head. Raises:
    CheckpointError where there is none.
    """
    if getattr(config, "architectures", None) or getattr(config, "auto_map", None):
        return None
    best: tuple[tuple[int, int, int, int], str] | None = None
    for order, name in enumerate(_classes_of(config.model_type, masked=not getattr(config, "is_decoder", False))):
        config.architectures = [name]
        try:
            model = build_skeleton(config)
        except CheckpointError:
            continue
        made = routes(model, tensors)
        used = {stored for _, sources in made.values() for _, stored in sources}
        missing = sum(not any(one in made for one in names) for names in tied_names(model))
        renamed = len(used - set(model.state_dict()))
        score = (missing, len(tensors) - len(used), renamed, order)
        best = min(best, (score, name)) if best is not None else (score, name)
    config.architectures = [best[1]] if best is not None else None
    if best is None:
        raise CheckpointError(
            f"the config names no architecture, and transformers has no model of type {config.model_type!r}; name one "
            "in it"
        )
    return best[1]


def _classes_of(model_type: str, masked: bool) -> list[str]:
    """The model classes that transformers has for a type, those with the likeliest heads first; of two alike the masked
    one if `masked`.
    """
    from transformers.models.auto import modeling_auto

    tables = {
        name: table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    }
    kinds = ("MASKED_LM", "CAUSAL_LM") if masked else ("CAUSAL_LM", "MASKED_LM")
    first = (*kinds, "SEQ_TO_SEQ", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
    names = [name for kind in first for name in tables if kind in name] + sorted(tables)
    found: dict[str, None] = {}
    for name in names:
        classes = tables[name].get(model_type, ())
        found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
    return [name for name in found if hasattr(transformers, name)]


Routes = dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]


def routes(model: nn.Module, tensors: Iterable[str]) -> Routes:
    """For every parameter of a model its converter, if it has one, and the (pattern, stored name) it is made of, as
    transformers names them.
    """
    wanted = dict(model.state_dict(keep_vars=True))
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    found: Routes = {}
    for stored in sorted(tensors, key=_natural):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = stored, None
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [name]
        if converter is not None:
            first = converter.target_patterns[0]
            targets = [name.replace(first, target) for target in converter.target_patterns]
        for target in targets:
            if target in wanted:
                found.setdefault(target, (converter, []))[1].append((pattern or stored, stored))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
