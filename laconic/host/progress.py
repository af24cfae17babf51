"""What a run tells while it works; the library logs it, the command line draws it."""

import logging
import resource
import sys
from typing import Protocol

from laconic.host.told import Preflight, SiteRecord

logger = logging.getLogger("laconic")


class Progress(Protocol):
    """Listens to a run."""

    def plan(self, preflight: Preflight) -> None:
        """The resolved plan and the predicted size, memory and time, before the work starts."""

    def start(self, task: str, total: float) -> None:
        """A task begins that will report `total` units of work."""

    def advance(self, units: float, note: str = "") -> None:
        """Some of the present task is done."""

    def site(self, record: SiteRecord) -> None:
        """A site is compressed: its name, method, bits, error and what the user must hear."""

    def say(self, message: str) -> None:
        """Something the user should know."""


class Log:
    """Progress as log records of the logger "laconic"."""

    def plan(self, preflight: Preflight) -> None:
        logger.info("%d sites, %d bytes expected", len(preflight.sites), preflight.bytes)

    def start(self, task: str, total: float) -> None:
        logger.info("%s", task)

    def advance(self, units: float, note: str = "") -> None:
        """Nothing: a log has no bar."""

    def site(self, record: SiteRecord) -> None:
        logger.info("%s: %.3f bits, relative output error %.3g", record.name, record.bits_per_weight, record.error)
        for note in record.notes:
            logger.warning("%s", note)

    def say(self, message: str) -> None:
        logger.info("%s", message)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """The present resident set of this process in bytes (its peak where /proc is not there to tell)."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory()
