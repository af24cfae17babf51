"""The result of a search where others read it: a file of its values, and a page that somebody draws of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laconic.disk.files import write_json
from laconic.disk.ours import SEARCH_HTML, SEARCH_JSON
from laconic.disk.store import stored_bytes

Draw = Callable[[Path, dict[str, Any]], None]
"""Writes a page of a result into a file that another worker may be writing too."""


def publish(out: Path, result: dict[str, Any], draw: Draw) -> None:
    """Write search.json and search.html into a directory that exists; another worker may be doing the same."""
    write_json(out / SEARCH_JSON, result, indent=1, suffix=f".{os.getpid()}.tmp")
    draw(out / SEARCH_HTML, result)


def with_sizes(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A result whose best trial's size is that of the folder it was delivered in, which a config may have joined."""
    size = stored_bytes(folder)
    ratio = result["reference"]["stored_bytes"] / size
    return {**result, "best": {**result["best"], "stored_bytes": size, "ratio": ratio}}
