"""The process of a command: what has to be settled before anything heavy is imported. Nothing heavy is imported here.

Signals, so that Ctrl-C within the seconds that PyTorch takes to load is one line; how threads wait, which OpenMP reads once; streams that
can print any name; and what a program error looks like.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # as typing has it; its import alone is a moment in which Ctrl-C is a traceback
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import TextIO

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_REPORT = "this is an error of laconic's own; please report it with the lines above and the command"


def main() -> None:
    """The entry point of `laconic` and `python -m laconic`."""
    _hold_signals()
    sys.excepthook, sys.unraisablehook = _own_error, _swallowed
    _check_place()
    _streams()
    from laconic.host.threads import wait_asleep

    wait_asleep()
    from laconic.command.cli import app

    app(prog_name="laconic")


def leave_at_once(number: int, _: "FrameType | None") -> None:
    """Ends the process while it starts: nothing is written yet, and an exception in the midst of an import can become anything.

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


def _hold_signals() -> None:
    """Take over the signals that nobody has claimed: a shell lets background jobs ignore Ctrl-C, and nohup lets them ignore SIGHUP."""
    for number in (signal.SIGINT, *_SIGNALS):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave_at_once)
    os.register_at_fork(after_in_child=let_go)  # a worker is ended, and spoken for, by the process that started it


def _stop(number: int, _: "FrameType | None") -> None:
    """The system's wish that the process ends, as an exception."""
    from laconic.command.ends import Stopped

    raise Stopped(number)


def _check_place() -> None:
    """A working directory that was deleted is no error of Python's, but libraries end the process without a word of ours."""
    try:
        os.getcwd()
    except OSError as error:
        os.write(2, f"error the working directory is gone: {error.strerror}\n".encode())
        os._exit(1)


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


def _own_error(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
    """An error that is not on the list of `laconic.command.ends`: its traceback, and what to do with it."""
    if issubclass(kind, KeyboardInterrupt):
        leave_at_once(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)
    sys.stderr.write(_REPORT + "\n")


def _swallowed(lost: "sys.UnraisableHookArgs") -> None:
    """An exception where Python cannot raise one (a callback of its garbage collection). Ctrl-C is not to be lost there: it comes again."""
    if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
        import threading

        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)
