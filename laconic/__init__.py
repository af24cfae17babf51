"""laconic compresses trained neural networks: schemes in, smaller verified models out, with numbers that can be believed.

Besides the names below, every method of `laconic.methods` is an attribute of the package: `laconic.GPTQ`, `laconic.KMeans`, ...
"""

from typing import Any

from laconic import hf as _hf  # noqa: F401 - importing it registers compressed directories with transformers
from laconic.clustering import dkm_decode
from laconic.errors import (
    CheckpointError,
    DataError,
    LaconicError,
    OutputError,
    RecoveryError,
    SchemeError,
    SearchError,
    SurgeryError,
    VerificationError,
)  # fmt: skip
from laconic.evaluate import evaluate_source
from laconic.goals import Maximize, Minimize, at_least, within
from laconic.load import load
from laconic.memory import load_into, save
from laconic.methods.base import Keep, Method
from laconic.methods.free import Free
from laconic.offload import offload_saved
from laconic.pipeline import Options, compress
from laconic.recover import LC, Direct, FineTune, Steps, Task, advance, convert, prepare, recover
from laconic.report import Report
from laconic.scheme import known_methods, parse
from laconic.search import search
from laconic.surgery import fold
from laconic.version import __version__

__all__ = [
    "LC",
    "CheckpointError",
    "DataError",
    "Direct",
    "FineTune",
    "Free",
    "Keep",
    "LaconicError",
    "Maximize",
    "Method",
    "Minimize",
    "Options",
    "OutputError",
    "RecoveryError",
    "Report",
    "SchemeError",
    "SearchError",
    "Steps",
    "SurgeryError",
    "Task",
    "VerificationError",
    "__version__",
    "advance",
    "at_least",
    "compress",
    "convert",
    "dkm_decode",
    "evaluate_source",
    "fold",
    "load",
    "load_into",
    "offload_saved",
    "parse",
    "prepare",
    "recover",
    "save",
    "search",
    "within",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Methods by name, found where they are: adding one edits no list."""
    found = known_methods().get(name) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *known_methods()})
