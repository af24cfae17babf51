"""The public names, brought together: `laconic.NAME` loads this module when the first of them is used."""

from laconic.clustering import dkm_decode
from laconic.disk import hf as _hf  # noqa: F401 - registers with transformers, whatever became of `registration`
from laconic.disk.load import load
from laconic.engine.report import Report
from laconic.engine.saved import load_into, save
from laconic.errors import (
    CheckpointError,
    DataError,
    LaconicError,
    OutputError,
    RecoveryError,
    ReportError,
    SchemeError,
    SearchError,
    SurgeryError,
    VerificationError,
)  # fmt: skip
from laconic.measure.goals import Maximize, Minimize, at_least, within
from laconic.measure.quality import evaluate_source
from laconic.methods.base import Method
from laconic.methods.free import Free
from laconic.offload import offload_saved
from laconic.pipeline import Options, compress
from laconic.recover import LC, AdaRound, Blockwise, Direct, FineTune, Steps, Task, advance, convert, prepare, recover
from laconic.scheme.keep import Keep
from laconic.scheme.text import parse
from laconic.search import search
from laconic.surgery import fold
from laconic.weights.inputs import Inputs

__all__ = [
    "LC",
    "AdaRound",
    "Blockwise",
    "CheckpointError",
    "DataError",
    "Direct",
    "FineTune",
    "Free",
    "Inputs",
    "Keep",
    "LaconicError",
    "Maximize",
    "Method",
    "Minimize",
    "Options",
    "OutputError",
    "RecoveryError",
    "Report",
    "ReportError",
    "SchemeError",
    "SearchError",
    "Steps",
    "SurgeryError",
    "Task",
    "VerificationError",
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
