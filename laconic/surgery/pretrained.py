"""Thinned transformers models as stock checkpoints: the configuration is changed, the code is not."""

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from laconic.errors import SurgeryError
from laconic.model.batches import Batch
from laconic.surgery.verify import answers, apart, few, laboratory
from laconic.weights.install import baked

Sizes = tuple[int, ...]
MODELS = 64  # configurations tried before giving up; each builds a skeleton without memory


def save_pretrained(thinned: nn.Module, path: str | Path, example: Batch, *, tolerance: float = 1e-5) -> Any:
    """Write a thinned transformers model so that stock transformers loads it; returns the configuration.

    Fields of the configuration (heads, key and value heads, intermediate size) are found by their values: of those that
    equal a size that was cut, the set whose model has exactly the thinned shapes is used. Written: config.json,
    safetensors. The directory is loaded again with the model's own `from_pretrained`, and its output on `example`
    compared.
    Raises: SurgeryError when it is no transformers model, when layers of one kind differ in shape (naming them), when
    no configuration describes the shapes, or when the reloaded model answers differently. Cost: skeletons on the meta
    device, one reload, two passes.
    """
    from transformers import PreTrainedModel

    if not isinstance(thinned, PreTrainedModel):
        raise SurgeryError(
            f"expected a transformers model, got {type(thinned).__name__}; save other modules with laconic.save(..., "
            "shapes=...)"
        )
    dense: Any = baked(thinned)
    wanted = {name: tuple(p.shape) for name, p in dense.named_parameters()}
    changed = _changes(_skeleton(dense, dense.config), wanted)
    config = _config(dense, wanted, changed)
    with torch.device("meta"):
        stock = type(dense)(config)
    stock.load_state_dict(dense.state_dict(), assign=True, strict=False)
    stock.tie_weights()
    stock.save_pretrained(Path(path))
    again = type(dense).from_pretrained(Path(path), dtype=next(dense.parameters()).dtype)
    batch = few(example)
    distance = apart(answers(laboratory(dense), batch), answers(laboratory(again), batch))
    if distance > tolerance:
        raise SurgeryError(
            f"{path}: loaded with stock transformers it answers differently, by {distance:.1e} of its output"
        )
    return config


def _config(model: Any, wanted: dict[str, Sizes], changed: dict[str, tuple[int, int]]) -> Any:
    """The configuration whose model has the wanted shapes."""
    refusals: dict[str, None] = {}
    for changes in _candidates(model.config, changed):
        try:
            config = type(model.config).from_dict({**model.config.to_dict(), **changes})
            if _shapes(_skeleton(model, config)) == wanted:
                return config
        except (
            ValueError,
            TypeError,
            ZeroDivisionError,
            RuntimeError,
            StrictDataclassError,
        ) as error:  # refused by transformers itself
            refusals[str(error).splitlines()[-1].strip()] = None
    sizes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in list(changed.items())[:3])
    said = f"; transformers says: {next(iter(refusals))}" if refusals else ""
    raise SurgeryError(
        f"no configuration of {type(model).__name__} has the thinned shapes ({sizes}){said}; save it with "
        "laconic.save(..., shapes=...)"
    )


def _skeleton(model: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _shapes(model: nn.Module) -> dict[str, Sizes]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _changes(original: nn.Module, wanted: dict[str, Sizes]) -> dict[str, tuple[int, int]]:
    """Kind of parameter and dimension -> its old and new size. Raises: SurgeryError when blocks differ."""
    found: dict[str, tuple[int, int]] = {}
    first: dict[str, str] = {}
    for name, old in _shapes(original).items():
        kind = re.sub(r"\.\d+\.", ".*.", name)
        for dimension, (before, after) in enumerate(zip(old, wanted[name], strict=True)):
            key = f"{kind}[{dimension}]"
            if key in first and found[key] != (before, after):
                raise SurgeryError(
                    f"layers of one kind differ in shape, which a configuration cannot say: {first[key]} has "
                    f"{found[key][1]}, {name} {after} "
                    f"in dimension {dimension}; cut equally in every layer, or save with laconic.save(..., shapes=...)"
                )
            found[key], first[key] = (before, after), first.get(key, name)
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def _candidates(config: Any, changed: dict[str, tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Changes by which fields that equal an old size, or an old number of heads, get the new one: likeliest first."""
    values = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    entries = values.get("head_dim") or values.get("hidden_size", 0) // max(1, values.get("num_attention_heads", 1))
    options: list[list[tuple[str, int]]] = []
    for before, after in sorted(set(changed.values())):
        names = [(name, after) for name, value in values.items() if value == before and name != "hidden_size"]
        if entries and before % entries == 0 and after % entries == 0:
            names += [
                (name, after // entries)
                for name, value in values.items()
                if value == before // entries and name != "head_dim"
            ]
        options.append(
            sorted(names, key=lambda item: not any(word in item[0] for word in ("head", "inter", "ffn", "inner")))
        )
    pools = [[list(c) for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)] for names in options]
    for choice in itertools.islice(itertools.product(*pools), MODELS):
        changes = dict(pair for pairs in choice for pair in pairs)
        if any("head" in name for name in changes) and "head_dim" in config.to_dict():
            changes.setdefault("head_dim", entries)
        yield changes
