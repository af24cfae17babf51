"""How a model directory is compressed, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from laconic.engine.checks import Prefix
from laconic.engine.resolve import Fit


@dataclass(frozen=True)
class Options:
    """How a model directory is compressed; what to do to it is the scheme's.

    `data`: "self" (text sampled from the model), a file or directory of what the model reads, "hub:name", or an
    iterable of batches that it can be called with; `test`: data for the report's figures, by default the last tenth of
    `data`, which calibration never sees. `samples` windows of `length` tokens (or examples) calibrate; `test_tokens`
    are evaluated. `statistics`: what the inputs that methods look at have passed through, "compressed" (whatever is
    compressed before a site, so that errors are made up for) or "original" (the model as it was); gradients, and what
    is spread over the model, are the original's either way. `keep`: patterns of sites that stay as they are; `group`:
    "fit" or "strict", where a group does not divide a matrix (`engine.resolve`).
    """

    data: Any = "self"
    test: Any = None
    samples: int = 128
    length: int = 256
    test_tokens: int = 32768
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    true_sequential: bool = False
    statistics: Prefix = "compressed"
    resume: bool = False
    overwrite: bool = False
    skip_nonfinite: bool = False
    trust_remote_code: bool = False
    evaluate: bool = True
    keep: str | Sequence[str] = ()
    group: Fit = "fit"
    command: str = field(default="", compare=False)
