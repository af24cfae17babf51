"""transformers loads compressed directories: `AutoModelForCausalLM.from_pretrained(dir)` works once `laconic` is imported.

`laconic.registration` imports this module while transformers is being imported: what else is needed of either is imported on use.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from laconic.errors import CheckpointError

if TYPE_CHECKING:
    from laconic.store import Compressed


@register_quantization_config("laconic")
class LaconicConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Marks a config.json as that of a compressed directory."""

    def __init__(self, schema: int | None = None, **_: Any) -> None:
        from laconic.store import SCHEMA

        self.quant_method, self.schema = "laconic", SCHEMA if schema is None else schema


@register_quantizer("laconic")
class LaconicQuantizer(HfQuantizer):  # type: ignore[misc]
    """Decodes the stored weights into the model's dense parameters after the plain tensors are loaded; layers round inputs that are to be."""

    requires_calibration = True  # transformers' word for: only models that were compressed before can be loaded

    def __init__(self, quantization_config: LaconicConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: Compressed | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Tell the loader which parameters it will not find, and which stored tensors are none of its business."""
        from laconic.sites import find_slots
        from laconic.store import Compressed

        self._stored = Compressed(_directory(model, kwargs.get("checkpoint_files")))
        names = sorted(self._stored.weights)
        for slot in find_slots(model):
            if slot.parameter in self._stored.weights:
                for path, _ in slot.users:
                    model.get_submodule(path)._is_hf_initialized = True  # no random values, which would also move the user's generator

        def tie_weights(missing_keys: set[str] | None = None, **options: Any) -> Any:
            if missing_keys is not None:
                missing_keys.difference_update(names)  # else a tie of which no end is stored as it is counts as damage
            return type(model).tie_weights(model, missing_keys=missing_keys, **options)

        model.tie_weights = tie_weights
        patterns = [f"^{name.replace('.', '[.]')}" for name in names]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *(f"{p}[.]" for p in patterns)}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *(f"{p}$" for p in patterns)}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from laconic.sites import find_slots
        from laconic.weights.inputs import set_rounding

        stored = self._stored
        if stored is None:
            raise CheckpointError("laconic: the model was not prepared before its weights were loaded")
        del model.tie_weights
        slots = {slot.parameter: slot for slot in find_slots(model)}
        with torch.no_grad():
            for name, spec in stored.weights.items():
                if name not in slots or tuple(spec["shape"]) != slots[name].shape:
                    raise CheckpointError(f"{stored.path}: stores {name} as {spec['shape']}, which the configured model does not have")
                path, parameter = slots[name].users[0]
                target = getattr(model.get_submodule(path), parameter)
                target.copy_(slots[name].view.restore(stored.weight(name).forward()))
                layers = slots[name].layers(model)
                stored.check_layers(name, layers)
                for layer in layers:
                    if (rounding := stored.rounding(name)) is not None:
                        set_rounding(layer, rounding.to(target.device))
        return model

    def is_serializable(self, **_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def _directory(model: Any, files: list[str] | None) -> Path:
    """The directory of the loaded files; for a hub snapshot, with its manifest fetched."""
    from transformers.utils import cached_file

    from laconic.store import MANIFEST

    if files and (Path(files[0]).parent / MANIFEST).is_file():
        return Path(files[0]).parent
    found = cached_file(model.config.name_or_path, MANIFEST)
    if found is None:
        raise CheckpointError(f"{model.config.name_or_path}: config.json says laconic, but there is no {MANIFEST}")
    return Path(found).parent
