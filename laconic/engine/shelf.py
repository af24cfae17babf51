"""Hidden states between parts of a walk, in memory or on the disk, so that a run that was interrupted goes on where it
was.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from laconic.disk.files import disk_errors, seal, write_tensors


class Shelf:
    """Hidden states by key, in memory or, with a folder, one file per key (written whole or not at all)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[str, list[Tensor]] = {}

    def put(self, key: str, tensors: list[Tensor]) -> None:
        if self.folder is None:
            self._kept[key] = tensors
            return
        temporary = self.folder / f"{key}.tmp"
        with disk_errors(self.folder):  # what a kill destroys is made again, so nothing waits for the disk here
            named = {str(i): t for i, t in enumerate(tensors)}
            write_tensors(temporary, named, seal(named))
            temporary.replace(self.folder / f"{key}.safetensors")

    def get(self, key: str) -> list[Tensor]:
        if self.folder is None:
            return self._kept[key]
        stored = load_file(self.folder / f"{key}.safetensors")
        return [stored[str(i)] for i in range(len(stored))]

    def __contains__(self, key: str) -> bool:
        return key in self._kept if self.folder is None else (self.folder / f"{key}.safetensors").is_file()

    def drop(self, key: str) -> None:
        self._kept.pop(key, None)
        if self.folder is not None:
            (self.folder / f"{key}.safetensors").unlink(missing_ok=True)
