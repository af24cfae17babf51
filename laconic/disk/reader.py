"""How transformers' loader is told of a compressed directory: which parameters it will not find, and what they decode
to.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file

from laconic.disk.places import slots_of
from laconic.disk.store import MANIFEST, Compressed
from laconic.disk.ties import differing
from laconic.errors import CheckpointError
from laconic.host.ambient import undisturbed
from laconic.weights.demands import set_demands


class Filling:
    """A model without values that transformers is about to load from a compressed directory; `finish` puts in what it
    could not.
    """

    def __init__(self, model: Any, files: list[str] | None, *, verify: bool = True) -> None:
        self.model, self.stored = model, Compressed(_directory(model, files), verify=verify)
        if verify:
            self.stored.verify()
        self.places = _places(model, self.stored)
        for slot in slots_of(model, self.stored, self.places).values():
            for layer in slot.layers(model):  # no random values, which would also move the user's generator
                if next(layer.buffers(recurse=False), None) is None:  # one not stored (Gemma's scale) is made only then
                    layer._is_hf_initialized = True  # type: ignore[assignment]
        self._settle_ties()
        self._ignore({*self.places.values(), *self.stored.weights})

    def _settle_ties(self) -> None:
        """A tie is stored once: what is stored under two of its names is none. What is decoded later is not missing."""
        sources: dict[str, str] = self.model.all_tied_weights_keys
        groups = [
            [source, *(name for name in sources if sources[name] == source)]
            for source in dict.fromkeys(sources.values())
        ]
        present = set(_in_model(self.model, self.stored.names).values())
        for _, name in differing(groups, sources, present, lambda one, other: False):
            del sources[name]
        model, places = self.model, set(self.places.values())

        def tie_weights(missing_keys: set[str] | None = None, **options: Any) -> Any:
            if missing_keys is not None:
                missing_keys.difference_update(places)  # else a tie of which no end is stored as it is counts as damage
            return type(model).tie_weights(model, missing_keys=missing_keys, **options)

        model.tie_weights = tie_weights

    def _ignore(self, names: set[str]) -> None:
        """Packed tensors are not unexpected, and parameters that decode from them are not missing."""
        patterns = [f"^{name.replace('.', '[.]')}" for name in sorted(names)]
        for kind, end in (("unexpected", "[.]"), ("missing", "$")):
            known = getattr(self.model, f"_keys_to_ignore_on_load_{kind}") or ()
            setattr(self.model, f"_keys_to_ignore_on_load_{kind}", {*known, *(pattern + end for pattern in patterns)})

    @undisturbed()
    @torch.no_grad()
    def finish(self) -> None:
        """Decode every stored weight that the model has a place for. Raises: CheckpointError where one does not fit its
        place.
        """
        del self.model.tie_weights
        for name, slot in slots_of(self.model, self.stored, self.places).items():
            path, parameter = slot.users[0]
            target = getattr(self.model.get_submodule(path), parameter)
            target.copy_(slot.view.restore(self.stored.weight(name).forward()))
            for layer in slot.layers(self.model):
                if (demands := self.stored.demands(name)) is not None:
                    set_demands(layer, demands.to(target.device))


def _places(model: nn.Module, stored: Compressed) -> dict[str, str]:
    """Where in a model each stored weight belongs: the stored name -> the parameter's name in the model.

    A model of another class than the one that was stored (the base model, another head) has other prefixes, and does
    not have every weight.
    Raises: CheckpointError where a model of the stored class does not have one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {}
    for name, place in _in_model(model, stored.weights).items():
        if place in parameters:
            places[name] = place
        elif type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
            shape = stored.weights[name]["shape"]
            raise CheckpointError(f"{stored.path}: stores {name} as {shape}, which the configured model does not have")
    if stored.weights and not places:
        raise CheckpointError(f"{stored.path}: none of its weights has a place in {type(model).__name__}")
    return places


def _in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Stored names as the model has them, its base model's prefix added or taken away as transformers does for plain
    tensors.
    """
    wanted = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix
    return {
        name: name if name in wanted else str(rename_source_key(name, renamings, [], prefix, wanted)[0])
        for name in names
    }


def _directory(model: Any, files: list[str] | None) -> Path:
    """The directory of the loaded files; for a hub snapshot, with its manifest fetched."""
    if files and (Path(files[0]).parent / MANIFEST).is_file():
        return Path(files[0]).parent
    found = cached_file(model.config.name_or_path, MANIFEST)
    if found is None:
        raise CheckpointError(f"{model.config.name_or_path}: config.json says laconic, but there is no {MANIFEST}")
    return Path(found).parent
