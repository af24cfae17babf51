"""A folder that is being written belongs to whoever writes it: a lock that the system takes back when the process ends,
however it ends.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from laconic.disk.files import disk_errors
from laconic.errors import OutputError
from laconic.host.progress import logger

LOCK = ".laconic.lock"
_WITHOUT = (
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
    errno.ENOSYS,
)  # what a file system without locks answers
_PATIENCE = 60.0  # seconds to wait for somebody who shares a lock and is alone for a moment
_held: ContextVar[Mapping[tuple[int, Path], "_Lock"]] = ContextVar("_held", default=MappingProxyType({}))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """The folder, made if need be, is this call's to write for as long as the body runs; `shared` with others that say
    so too.

    The lock (flock of a file in the folder) is released by the end of the process, whatever ends it; the file is
    removed when the body ends, and so are folders that were made here and are still empty. Within the body the same
    folder can be locked again by the same thread. A process that is forked inside does not hold the lock. Where the
    file system has no locks, a warning is logged and nothing is kept from anybody.
    Raises: OutputError, at once, when another process holds it, and when nothing can be written there.
    """
    check_place(folder)
    key = os.getpid(), folder.resolve()
    outer = _held.get().get(key)
    if outer is not None:
        with outer.exclusively() if outer.shared and not shared else outer.again():
            yield
        return
    made = _make(folder)
    try:
        lock = _Lock(folder, shared)
        token = _held.set({**_held.get(), key: lock})
        try:
            yield
        finally:
            _held.reset(token)
            lock.release()
    finally:
        for path in made:  # the innermost first
            with suppress(OSError):
                path.rmdir()


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Within `locked(folder, shared=True)`: whether nobody else shares the lock. If so, others wait until the body has
    ended.

    False too where the file system has no locks, and nobody can tell. Raises: OutputError when somebody took the folder
    in between.
    """
    lock = _held.get()[os.getpid(), folder.resolve()]
    if not lock.shared:
        yield not lock.without
        return
    only = lock._try(shared=False) and not lock.without
    try:
        yield only
    finally:
        lock._take(shared=True)


def check_place(folder: Path) -> None:
    """Raises OutputError unless a folder can be written at a path: files and links to nowhere in its way, no
    permission, a read-only disk.
    """
    place = folder.absolute()
    for part in (place, *place.parents):
        if part.is_dir():
            if not os.access(part, os.W_OK | os.X_OK):
                raise OutputError(
                    f"{folder}: {part} cannot be written (no permission, or a read-only disk); choose another place"
                )
            return
        if part.is_symlink():
            raise OutputError(
                f"{folder}: {part} is a link to {os.readlink(part)}, which is not there; remove the link or choose "
                "another place"
            )
        if os.path.lexists(part) and not part.is_dir():  # another process may have made it by now
            raise OutputError(f"{folder}: expected a directory, found a file at {part}; choose another place")


def _make(folder: Path) -> list[Path]:
    """Make a folder and those it lies in; returns what had to be made, the innermost first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


class _Lock:
    """An open, locked file. Its name is that of the file in the folder for as long as it is held."""

    def __init__(self, folder: Path, shared: bool) -> None:
        self.folder, self.file, self.shared, self.owner, self.without = (
            folder,
            folder / LOCK,
            shared,
            os.getpid(),
            False,
        )
        while True:
            with disk_errors(folder):
                self.handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            self._take(shared)
            if self._is_named():
                break
            os.close(self.handle)  # whoever held it removed it between the two calls
        myself = weakref.ref(self)

        def forget() -> None:
            lock = myself()
            if lock is not None and lock.handle >= 0:
                os.close(lock.handle)
                lock.handle = -1

        os.register_at_fork(after_in_child=forget)  # a child that outlives its parent would keep the folder locked
        self._tell()

    def _take(self, shared: bool) -> None:
        """Lock the open file. Raises: OutputError when others hold it, and lets go of it."""
        until = time.monotonic() + (_PATIENCE if shared else 0)
        while not self._try(shared):
            told = _told(self.file)
            if told.get("shared") is not True or time.monotonic() > until:
                os.close(self.handle)
                self.handle = -1
                raise OutputError(
                    f"{self.folder}: in use by {_holder(told)}; wait until it has ended, or choose another directory"
                )
            time.sleep(0.05)  # one of those who share it is alone for a moment

    def _try(self, shared: bool) -> bool:
        try:
            fcntl.flock(self.handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno not in _WITHOUT:
                raise OutputError(f"{self.file}: cannot be locked: {error}") from error
            if not self.without:
                logger.warning(
                    "%s: its file system has no locks (%s); make sure that nothing else writes there",
                    self.folder,
                    error.strerror,
                )
            self.without = True
        return True

    def _is_named(self) -> bool:
        """Whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.file, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _tell(self) -> None:
        about = {
            "process": self.owner,
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "shared": self.shared,
        }
        with suppress(OSError):  # a full disk keeps nobody from locking
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, json.dumps(about).encode(), 0)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Held already."""
        yield

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Alone for a while. Raises: OutputError when others share the lock; then it is not held any more."""
        self._take(shared=False)
        self.shared = False
        try:
            yield
        finally:
            self._take(shared=True)
            self.shared = True

    def release(self) -> None:
        """Remove the file, unless others hold it, and let it go. In a forked child: nothing, the lock is its
        parent's.
        """
        if self.handle < 0 or self.owner != os.getpid():
            return
        with suppress(OSError):
            if self._try(shared=False) and self._is_named():  # of several that share it, the last one succeeds
                self.file.unlink()
        os.close(self.handle)
        self.handle = -1


def _told(file: Path) -> dict[str, Any]:
    """What a lock's file says of its holder; nothing where it cannot be read."""
    try:
        with file.open("rb") as stream:
            told = json.loads(stream.read(4096)) if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else None
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _holder(told: dict[str, Any]) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        return f"process {int(told['process'])} on {str(told['host'])[:100]} since {str(told['since'])[:40]}"
    except (ValueError, KeyError, TypeError):
        return "another process"
