"""The process of a command: what has to be settled before anything heavy is imported. Nothing heavy is imported here.

Signals, so that Ctrl-C within the seconds that PyTorch takes to load is one line; how threads wait, which OpenMP reads once; streams that
can print any name; and what a program error looks like.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import TextIO

from laconic.threads import wait_asleep

_REPORT = "this is an error of laconic's own; please report it with the lines above and the command"


def main() -> None:
    """The entry point of `laconic` and `python -m laconic`."""
    _signals()
    wait_asleep()
    _streams()
    sys.excepthook = _own_error
    from laconic.cli import app

    app(prog_name="laconic")


def leave_at_once(number: int, _: FrameType | None) -> None:
    """Ends the process while it starts: nothing is written yet, and an exception in the midst of an import can become anything."""
    if number == signal.SIGINT:
        os.write(2, b"interrupted; nothing was begun\n")
    os._exit(128 + number)


def stop(number: int, _: FrameType | None) -> None:
    """The system's wish that the process ends, as an exception, so that what was begun is put in order."""
    from laconic.ends import Stopped

    raise Stopped(number)


def _signals() -> None:
    """Take over the signals that nobody has claimed: a shell lets background jobs ignore Ctrl-C, and nohup lets them ignore SIGHUP."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def _streams() -> None:
    """Streams that print every name, whatever their encoding, and that are there: a closed one would hand its number to the next file."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _own_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that is not on the list of `laconic.ends`: its traceback, and what to do with it."""
    if issubclass(kind, KeyboardInterrupt):
        leave_at_once(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)
    sys.stderr.write(_REPORT + "\n")
