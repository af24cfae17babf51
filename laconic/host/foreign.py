"""What is not ours: a user's Python file, a JSON file from anywhere, a library's code on a user's model.

Foreign code may raise anything. What it raises says something about the input, so it becomes the error that names the
input, never a traceback.
"""

import json
import runpy
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from laconic.errors import LaconicError


class Foreign:
    """A block of code in which only others' code runs: whatever it raises becomes an error of the class `kind`.

    It says `what` failed, the last line of the user's own code that it came through, and the last line of its
    traceback. Errors of our own keep their class. Interruptions and a lack of memory pass: they say nothing about the
    input.
    """

    def __init__(self, kind: type[LaconicError], what: object) -> None:
        self.kind, self.what = kind, str(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | MemoryError | GeneratorExit):
            return
        place = place_of(error)
        where = self.what
        if place is not None:
            where = place if place.startswith(self.what) else f"{self.what}: {place}"
        if isinstance(error, LaconicError):
            raise type(error)(f"{where}: {error}") from error
        raise self.kind(f"{where}: {last_line(error)}") from error


def run_file(file: Path, kind: type[LaconicError], what: str) -> dict[str, Any]:
    """The variables that a Python file of the user's defines; the file is run.

    Raises: an error of the class `kind` when there is no such file, or with the line of the file and the last line of
    its traceback.
    """
    if not file.is_file():
        raise kind(f"{file}: no such {what} file" + (", it is a folder" if file.is_dir() else ""))
    with Foreign(kind, file):
        return runpy.run_path(str(file))


def read_object(file: Path, kind: type[LaconicError], limit: int = 1 << 26) -> dict[str, Any]:
    """The JSON object that a file of at most `limit` bytes (64 MiB) holds.

    Raises: an error of the class `kind` when it cannot be read, is not JSON, is not an object, or has a key twice.
    """
    try:
        if not file.is_file():
            raise kind(f"{file}: expected a file" + (", it is a folder" if file.is_dir() else ""))
        if (size := file.stat().st_size) > limit:
            raise kind(f"{file}: {size:,} bytes of JSON; at most {limit:,} are read")
        text = file.read_bytes()
    except OSError as error:
        if isinstance(error, LaconicError):
            raise
        raise kind(f"{file}: cannot be read: {error.strerror or error}") from error
    return parse_object(text, kind, str(file))


def parse_object(text: bytes, kind: type[LaconicError], where: str) -> dict[str, Any]:
    """The object that JSON text holds. Raises: an error of the class `kind`, which begins with `where`, as
    `read_object` does.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise kind(f"{where}: damaged, not JSON: {error}") from error
    if not isinstance(value, dict):
        raise kind(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def last_line(error: BaseException) -> str:
    """The last line of an error's traceback: its type and message. Of one that a worker process sent, the last line of
    that one's.
    """
    if isinstance(error, SystemExit):
        return f"it ended the program: sys.exit({error.code!r})"
    message = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    if "Traceback (most recent call last)" in message:
        return message.splitlines()[-1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def place_of(error: BaseException) -> str | None:
    """The innermost line of the user's own code (a plan, a task, the code of a model) that an error came through, if it
    came through any.
    """
    if isinstance(error, SyntaxError) and error.filename is not None and _owner(error.filename) == "user":
        return f"{error.filename}, line {error.lineno}"
    users = [f"{name}, line {number}" for name, number in _frames(error) if _owner(name) == "user"]
    return users[-1] if users else None


def is_ours(error: BaseException) -> bool:
    """Whether the innermost frame of an error that belongs to no library is one of this package's."""
    owners = [owner for name, _ in _frames(error) if (owner := _owner(name)) != "library"]
    return bool(owners) and owners[-1] == "laconic"


def _frames(error: BaseException) -> list[tuple[str, int]]:
    return [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]


def _owner(name: str) -> str:
    """Whose a source file is: ours, a library's (the standard one, installed ones, what has no file), or the user's."""
    if Path(name).is_relative_to(Path(__file__).parents[1]):
        return "laconic"
    folders = (sysconfig.get_paths()[folder] for folder in ("stdlib", "platstdlib", "purelib", "platlib"))
    return "library" if name.startswith("<") or any(Path(name).is_relative_to(folder) for folder in folders) else "user"
