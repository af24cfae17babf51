"""How a command ends when it does not end well: one line and an exit code for all that a user, a file or a machine can
cause.

`end_of` holds the list, and it is deliberate: an error that is not on it is laconic's own, and surfaces with its
traceback.
"""

import errno
import signal
import sys
from dataclasses import dataclass

from laconic.errors import LaconicError, OutputError
from laconic.host.foreign import is_ours, last_line, place_of

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 141
"""What a shell reports of a program that nobody reads any more (128 + SIGPIPE)."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "std::bad_alloc")
_ROOM = "take fewer or shorter windows (--samples, --length, --batch), end other programs, or use a machine with more"


class Stopped(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM, SIGHUP); like Ctrl-C for all that cleans up behind itself."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(frozen=True)
class End:
    """What is told of an end: the error's class, one line (empty where nobody is there to read it), the exit code."""

    kind: str
    message: str
    code: int


class Ended(Exception):  # noqa: N818 - the news of an error
    """Carries the end of a command from where it happened to where it is told."""

    def __init__(self, end: End) -> None:
        super().__init__(end.message)
        self.end = end


def end_of(error: BaseException, interrupted: str = "") -> End | None:
    """The end that an error means, or None for one of laconic's own; `interrupted` says what is left after Ctrl-C,
    unless a note of it does.
    """
    kind = type(error).__name__
    interrupted = "".join(f"; {note}" for note in getattr(error, "__notes__", [])) or interrupted
    if isinstance(error, Ended):
        return error.end
    if isinstance(error, Stopped):
        return End(
            signal.Signals(error.number).name,
            f"told to end ({signal.Signals(error.number).name}){interrupted}",
            128 + error.number,
        )
    if isinstance(error, KeyboardInterrupt):
        return End(kind, f"interrupted{interrupted}", INTERRUPTED)
    if isinstance(error, LaconicError):
        return End(kind, str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        return End(kind, "", BROKEN_PIPE)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    ):
        return End(kind, f"not enough memory: {str(error) or 'an allocation failed'}; {_ROOM}", 1)
    if isinstance(error, OSError):
        return End(kind, _system(error), OutputError.exit_code if error.errno in _FULL else 1)
    if isinstance(error, UnicodeError):
        return End(kind, f"text that cannot be read or written: {error}", 1)
    if isinstance(error, RecursionError):
        return End(
            kind, "something is nested too deeply for Python; if nothing that you gave is, please report this", 1
        )
    if _is_of_a_device(error):
        return End(kind, f"the device failed: {error}", 1)
    place = None if is_ours(error) else place_of(error)
    return None if place is None else End(kind, f"{place}: {last_line(error)}", 1)


def _system(error: OSError) -> str:
    """What the system refused and of which file; of errors that libraries raise, their own words."""
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{files}: {reason}" if files else reason


def _is_of_a_device(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, getattr(torch, "AcceleratorError", ()))
