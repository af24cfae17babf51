"""The storage of a search: an address, a database that answers, and workers that say they live."""

import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from laconic.errors import SearchError

_LOCK_SECONDS = 60  # SQLite lets one process write at a time; the others wait
_RACES, _PAUSE = 5, 0.5
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def address(storage: str | Path | None) -> tuple[str | None, str]:
    """(URL, URL without its password); a path is an SQLite file, whose folder is made. Raises: SearchError when it
    cannot be.
    """
    if storage is None:
        return None, "memory"
    text = str(storage)
    if "://" not in text:
        path = Path(text).expanduser().resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(f"{path}: no place for the storage of a search: {error}") from error
        text = sqlalchemy.engine.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    return text, re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", text)


def connect(
    url: str | None, place: str, heartbeat: int, lost: Callable[[optuna.Study, FrozenTrial], None]
) -> BaseStorage:
    """The storage at a URL (None: memory). `lost` is called with every trial whose worker was silent for two heartbeats
    (seconds).

    Raises: SearchError when the database does not answer, is none of Optuna's, or its driver is not installed.
    """
    if url is None:
        return InMemoryStorage()
    arguments = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a version where braces are
    for last in (False,) * _RACES + (True,):
        try:
            with answering(place):
                return RDBStorage(
                    template, engine_kwargs=arguments, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=lost
                )
        except (ImportError, RuntimeError) as error:  # no driver; tables of another Optuna
            raise SearchError(f"{place}: the storage of the search cannot be used: {error}") from error
        except SearchError as error:
            if last or not any(word in str(error) for word in ("UNIQUE", "unique", "already exists")):
                raise
            time.sleep(_PAUSE)  # another worker makes the tables of a new database at this moment
    raise AssertionError("unreachable")


def exists_already(place: str, name: str) -> SearchError:
    """What to say where a study of that name is not to be gone on with."""
    return SearchError(f"{place}: a study {name!r} exists already; resume it, overwrite it, or give another name")


def check_new(storage: str | Path, name: str) -> None:
    """Raises: SearchError when a study of that name is in a storage, which is not made here if it is a file."""
    if "://" not in str(storage) and not Path(storage).expanduser().is_file():
        return
    url, place = address(storage)
    with answering(place), quiet():
        if name in optuna.get_all_study_names(connect(url, place, 60, lambda study, trial: None)):
            raise exists_already(place, name)


def interval_of(storage: BaseStorage) -> int | None:
    """Seconds between two heartbeats; None in memory, where nobody else can look."""
    return storage.get_heartbeat_interval() if isinstance(storage, RDBStorage) else None


def beat(storage: BaseStorage, trial_id: int) -> None:
    """Say once that the worker of a trial lives."""
    if isinstance(storage, RDBStorage):
        storage.record_heartbeat(trial_id)


@contextmanager
def beating(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Say so for as long as the body runs, from a thread."""
    interval, stop = interval_of(storage), threading.Event()
    if interval is None:
        yield
        return

    def keep_on() -> None:
        while not stop.wait(interval / 2):
            try:
                beat(storage, trial_id)
            except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError):
                # a database that is away for a moment must not end an hour's training; the next beat says it again
                continue

    thread = threading.Thread(target=keep_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def answering(place: str) -> Iterator[None]:
    """A storage's failures as a SearchError that names it."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = str(error.__cause__ or error).split("\n")[0]
        raise SearchError(f"{place}: the storage of the search does not answer: {cause}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's notes on creating a study and on its experimental parts stay out of the user's terminal; its settings
    are put back.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def check_fingerprint(study: optuna.Study, mine: dict[str, Any], place: str) -> None:
    """Store what a search is, or compare it with what is stored.

    Raises: SearchError listing what differs, or saying that the study is somebody else's.
    """
    mine = json.loads(json.dumps(mine))
    theirs = study.user_attrs.get("laconic")
    if theirs is None:
        if study.get_trials(deepcopy=False, states=_ENDED):
            raise SearchError(f"{place}: the study {study.study_name!r} was not made by laconic; give another name")
        study.set_user_attr("laconic", mine)
    elif differences := list(_differences(theirs, mine)):
        raise SearchError(
            f"{place}: the study {study.study_name!r} is another search: {'; '.join(differences)}. Give another name"
        )


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*theirs, *mine)):
        stored, now = theirs.get(key), mine.get(key)
        if isinstance(stored, dict) and isinstance(now, dict):
            yield from _differences(stored, now, f"{path}{key}.")
        elif stored != now:
            yield f"{path}{key} was {stored!r} and is {now!r}"
