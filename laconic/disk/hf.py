"""transformers loads compressed directories: `AutoModelForCausalLM.from_pretrained(dir)` works once `laconic` is
imported.

`laconic.disk.registration` imports this module while transformers is being imported: what else is needed of either is
imported on use.
"""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from laconic.errors import CheckpointError

if TYPE_CHECKING:
    from laconic.disk.reader import Filling


@register_quantization_config("laconic")
class LaconicConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Marks a config.json as that of a compressed directory; `"verify": false` in it skips the checksums."""

    def __init__(self, schema: int | None = None, verify: bool = True, **_: Any) -> None:
        from laconic.disk.store import SCHEMA

        self.quant_method, self.schema = "laconic", SCHEMA if schema is None else schema
        self.verify = verify


@register_quantizer("laconic")
class LaconicQuantizer(HfQuantizer):  # type: ignore[misc]
    """Decodes the stored weights into the model's dense parameters after the plain tensors are loaded; layers round
    inputs that are to be.
    """

    requires_calibration = True  # transformers' word for: only models that were compressed before can be loaded

    def __init__(self, quantization_config: LaconicConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._filling: Filling | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from laconic.disk.reader import Filling

        self._filling = Filling(model, kwargs.get("checkpoint_files"), verify=self.quantization_config.verify)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._filling is None:
            raise CheckpointError("laconic: the model was not prepared before its weights were loaded")
        self._filling.finish()
        self._filling = None
        return model

    def is_serializable(self, **_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
