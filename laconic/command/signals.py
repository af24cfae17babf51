"""Signals of a command: held while it starts, exceptions while it works, and let go at the end. Nothing heavy is
imported here.
"""

import os
import signal

TYPE_CHECKING = False  # as typing has it; its import alone is a moment in which Ctrl-C is a traceback
if TYPE_CHECKING:
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def hold_signals() -> None:
    """Take over the signals that nobody has claimed: a shell lets background jobs ignore Ctrl-C, and nohup lets them
    ignore SIGHUP.
    """
    for number in (signal.SIGINT, *_SIGNALS):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave_at_once)
    os.register_at_fork(after_in_child=let_go)  # a worker is ended, and spoken for, by the process that started it


def leave_at_once(number: int, _: "FrameType | None") -> None:
    """Ends the process while it starts: nothing is written yet, and an exception in the midst of an import can become
    anything.

    PyTorch swallows one that is raised while it imports numpy, and half a numpy fails in other places.
    """
    os.write(2, b"interrupted; nothing was begun\n" if number == signal.SIGINT else b"told to end; nothing was begun\n")
    os._exit(128 + number)


def held_signals() -> bool:
    """Whether the process is one that `main` began, and still starting."""
    return any(signal.getsignal(number) is leave_at_once for number in (signal.SIGINT, *_SIGNALS))


def release_signals() -> None:
    """From here on signals are exceptions, so that what was begun is put in order."""
    for number in (signal.SIGINT, *_SIGNALS):
        if signal.getsignal(number) is leave_at_once:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _stop)


def let_go() -> None:
    """Nothing is left to put in order: another signal ends the process without a word."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), *((number, _stop) for number in _SIGNALS)):
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: "FrameType | None") -> None:
    """The system's wish that the process ends, as an exception."""
    from laconic.command.ends import Stopped

    raise Stopped(number)
