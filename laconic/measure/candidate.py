"""What objectives measure: a compressed model beside its original."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from laconic.model.batches import Batch


@dataclass(frozen=True)
class Candidate:
    """A compressed model to be judged. `model` holds installed Weights; `network` is the plain module that would run:
    decoded, and thinned if it could be; `example` a batch it can be called with; `reference` the original; `fields`
    what `save` writes into the manifest.

    `path` is the directory the model is stored in, if it is stored already.
    """

    model: nn.Module
    network: nn.Module
    example: Batch
    reference: nn.Module
    fields: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None


Objective = Callable[[Candidate], float]
