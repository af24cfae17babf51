"""The group of all commands, and the one place where every command ends."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from laconic.command.ends import End, Ended, end_of
from laconic.command.listing import takers
from laconic.command.output import emit, err
from laconic.command.shown import shown
from laconic.command.signals import held_signals, let_go, release_signals
from laconic.errors import SchemeError

# click's own, or the copy of click that typer carries: typer exports neither
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Ending:
    """A block in which errors that are not ours end the command; see `ends.end_of`."""

    def __init__(self, interrupted: str = "") -> None:
        self.interrupted = interrupted

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = None if error is None else end_of(error, self.interrupted)
        if end is not None:
            raise Ended(end) from error


def guard(work: Callable[[], None], interrupted: str = "") -> None:
    """Does a command's work; `interrupted` says what is left of it after Ctrl-C."""
    starting = held_signals()
    if starting:
        import_module("laconic.api")  # all that takes seconds to import, while Ctrl-C still ends the process at once
        release_signals()
    try:
        with _Ending(interrupted):
            work()
    finally:
        if starting:
            let_go()


class Commands(TyperGroup):
    """The group of all commands. Whatever ends one, a mistake in the words included, is told here, once, and becomes
    the exit code.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in words
        try:
            with _Ending():
                _check(words)
                code = super().main(words or ["--help"], prog_name, complete_var, False, windows_expand_args, **extra)
                sys.stdout.flush()
        except Ended as error:
            code = say_end(error.end, as_json)
        except UsageError as error:
            code = say_end(End("UsageError", self._mistake(error, words), 2), as_json)
        if not standalone_mode:
            return code
        return sys.exit(code if isinstance(code, int) else 0)

    def _mistake(self, error: Any, words: Sequence[str]) -> str:
        """What is wrong with the words of a command, what was meant perhaps, and where to read more."""
        command = self.commands.get(words[0]) if words else None
        message, option = error.format_message().rstrip("."), getattr(error, "option_name", None)
        if option is not None and hasattr(error, "possibilities"):  # an option that there is not
            known = [
                name for parameter in (command or self).params for name in (*parameter.opts, *parameter.secondary_opts)
            ]
            message = f"no option {option!r}{_meant(option, known, words)}"
        elif command is None and words and not words[0].startswith("-"):
            known = list(self.commands)
            close = difflib.get_close_matches(words[0], known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            message = f"no command {words[0]!r}; {hint}"
        return f"{message}; see {'laconic' if command is None else f'laconic {words[0]}'} --help"


def _check(words: Sequence[str]) -> None:
    """Raises: SchemeError for a word that no file can be called, or that libraries cannot open: they want names in
    UTF-8.
    """
    for word in words:
        if "\0" in word:
            raise SchemeError(f"argument {word!r}: holds a NUL character")
        try:
            os.fsencode(word).decode("utf-8")
        except UnicodeError as error:
            raise SchemeError(f"argument {word!r}: not valid UTF-8; rename the file or the folder") from error


def _meant(option: str, known: Sequence[str], words: Sequence[str]) -> str:
    """The option meant by one that does not exist, or, where its name is that of a method's argument, how that is
    written.
    """
    name = option.lstrip("-").replace("-", "_")
    methods = takers(name)
    if methods and "--scheme" in known:
        rest = list(words[words.index(option) + 1 :]) if option in words else []
        value = rest[0] if rest and not rest[0].startswith("-") else "..."
        return f"; {name} is an argument of {', '.join(methods)}: --scheme '{methods[0]}({name}={value})'"
    close = difflib.get_close_matches(option, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def say_end(end: End, as_json: bool) -> int:
    """Say how a command ended, where anybody listens: a line on stderr, and with --json an object on stdout. Returns
    the exit code.
    """
    with suppress(OSError, ValueError):  # a stream that is full, closed or gone: the exit code is what is left to say
        if as_json and end.message:
            emit({"error": {"kind": end.kind, "message": end.message, "exit_code": end.code}})
            sys.stdout.flush()
    with suppress(OSError, ValueError):
        if end.message:
            err.print(Text.assemble(("error ", "red") if end.code < 128 else "", shown(end.message)), soft_wrap=True)
    return end.code
