"""The process of a command: what has to be settled before anything heavy is imported. Nothing heavy is imported here.

Signals, so that Ctrl-C within the seconds that PyTorch takes to load is one line; how threads wait, which OpenMP reads
once; streams that can print any name; and what a program error looks like.
"""

import os
import signal
import sys

from laconic.command.signals import hold_signals, leave_at_once

TYPE_CHECKING = False  # as typing has it; its import alone is a moment in which Ctrl-C is a traceback
if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

_REPORT = "this is an error of laconic's own; please report it with the lines above and the command"


def main() -> None:
    """The entry point of `laconic` and `python -m laconic`."""
    hold_signals()
    sys.excepthook, sys.unraisablehook = _own_error, _swallowed
    _check_place()
    _streams()
    from laconic.host.threads import wait_asleep

    wait_asleep()
    from laconic.command.cli import app

    app(prog_name="laconic")


def _check_place() -> None:
    """A working directory that was deleted is no error of Python's, but libraries end the process without a word of
    ours.
    """
    try:
        os.getcwd()
    except OSError as error:
        os.write(2, f"error the working directory is gone: {error.strerror}\n".encode())
        os._exit(1)


def _streams() -> None:
    """Streams that print every name, whatever their encoding, and that are there: a closed one would hand its number to
    the next file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _own_error(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
    """An error that is not on the list of `command.ends`: its traceback, and what to do with it."""
    if issubclass(kind, KeyboardInterrupt):
        leave_at_once(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)
    sys.stderr.write(_REPORT + "\n")


def _swallowed(lost: "sys.UnraisableHookArgs") -> None:
    """An exception where Python cannot raise one (a callback of its garbage collection). Ctrl-C is not to be lost
    there: it comes again.
    """
    if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
        import threading

        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)
