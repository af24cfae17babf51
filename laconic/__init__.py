"""laconic compresses trained neural networks: schemes in, smaller verified models out, with numbers that can be believed.

Besides the names below, every method of `laconic.methods` is an attribute of the package: `laconic.GPTQ`, `laconic.KMeans`, ...
"""

from typing import Any

from laconic import hf as _hf  # noqa: F401 - importing it registers compressed directories with transformers
from laconic.errors import CheckpointError, DataError, LaconicError, OutputError, SchemeError, VerificationError
from laconic.evaluate import evaluate_source
from laconic.load import load
from laconic.memory import load_into, save
from laconic.methods.base import Keep, Method
from laconic.pipeline import Options, compress
from laconic.report import Report
from laconic.scheme import known_methods, parse
from laconic.version import __version__

__all__ = [
    "CheckpointError", "DataError", "Keep", "LaconicError", "Method", "Options", "OutputError", "Report", "SchemeError",
    "VerificationError", "__version__", "compress", "evaluate_source", "load", "load_into", "parse", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Methods by name, found where they are: adding one edits no list."""
    found = known_methods().get(name) if name[:1].isupper() else None
    if found is None:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *known_methods()})
