"""What is not ours: a user's Python file, a JSON file from anywhere, a library's code on a user's model.

Foreign code may raise anything. What it raises says something about the input, so it becomes the error that names the input, never a traceback.
"""

import json
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from laconic.errors import LaconicError


class Foreign:
    """A block of code in which only others' code runs: whatever it raises becomes an error of the class `kind` that begins with `what`.

    Errors of our own pass, and so do interruptions and a lack of memory, which say nothing about the input.
    """

    def __init__(self, kind: type[LaconicError], what: object, file: Path | None = None) -> None:
        self.kind, self.what, self.file = kind, what, file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | MemoryError | GeneratorExit):
            return
        at = "" if self.file is None else _line(error, self.file)
        if isinstance(error, LaconicError):
            if at and not str(error).startswith(str(self.what)):
                raise type(error)(f"{self.what}{at}: {error}") from error
            return
        raise self.kind(f"{self.what}{at}: {last_line(error)}") from error


def run_file(file: Path, kind: type[LaconicError], what: str) -> dict[str, Any]:
    """The variables that a Python file of the user's defines; the file is run.

    Raises: an error of the class `kind` when there is no such file, or with the line of the file and the last line of its traceback.
    """
    if not file.is_file():
        raise kind(f"{file}: no such {what} file" + (", it is a folder" if file.is_dir() else ""))
    with Foreign(kind, file, file):
        return runpy.run_path(str(file))


def read_object(file: Path, kind: type[LaconicError]) -> dict[str, Any]:
    """The JSON object that a file holds. Raises: an error of the class `kind` when it cannot be read, is not JSON or is not an object."""
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise kind(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise kind(f"{file}: expected a JSON object, got a {type(value).__name__}")
    return value


def last_line(error: BaseException) -> str:
    """The last line of an error's traceback: its type and message. Of one that a worker process sent, the last line of that one's."""
    if isinstance(error, SystemExit):
        return f"it ended the program: sys.exit({error.code!r})"
    message = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    if "Traceback (most recent call last)" in message:
        return message.splitlines()[-1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _line(error: BaseException, file: Path) -> str:
    """The last line of a file that an error came through, as the part of a message; nothing where it never came through it."""
    numbers = [number for name, number in _places(error) if Path(name) == file]
    return f", line {numbers[-1]}" if numbers else ""


def _places(error: BaseException) -> Iterator[tuple[str, int]]:
    for frame, number in traceback.walk_tb(error.__traceback__):
        yield frame.f_code.co_filename, number
    if isinstance(error, SyntaxError) and error.filename is not None and error.lineno is not None:
        yield error.filename, error.lineno
