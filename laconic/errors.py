"""The errors a user can cause or meet, one class per exit code of the command line."""


class LaconicError(Exception):
    """Base of every error raised on purpose; the message says what was expected, what came and where."""

    exit_code = 1


class SchemeError(LaconicError, ValueError):
    """A scheme, plan or hyper-parameter that cannot be carried out."""

    exit_code = 2


class CheckpointError(LaconicError, ValueError):
    """A model that cannot be read: missing, truncated, inconsistent, not finite, or of an unsupported kind."""

    exit_code = 3


class DataError(LaconicError, ValueError):
    """Calibration or evaluation data that is missing, empty or too short."""

    exit_code = 4


class OutputError(LaconicError, OSError):
    """An output directory that cannot be used: it holds another run, or the disk is full."""

    exit_code = 5


class SurgeryError(LaconicError, ValueError):
    """A network that cannot be cut: no graph can be traced through it, or cutting would change what it computes."""

    exit_code = 7


class SearchError(LaconicError, ValueError):
    """A search that cannot be carried out: nothing to search, a floor that nothing reaches, a storage that does not
    answer."""

    exit_code = 8


class RecoveryError(LaconicError):
    """Training that diverged, or a recovery that cannot be carried out."""

    exit_code = 9


class VerificationError(LaconicError):
    """What was read back from the disk is not what was computed."""

    exit_code = 6


class ReportError(LaconicError):
    """The model is complete and verified; something that follows failed: its evaluation, the samples of text, the
    report."""

    exit_code = 10
