"""What a run says before it works: room on the disk."""

import shutil
from pathlib import Path

import pytest

from laconic.disk.lock import LOCK
from laconic.engine.preflight import room_for
from laconic.errors import OutputError


def test_room_is_what_is_free_and_what_will_be_replaced(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert room_for(tmp_path, free // 8) == []
    (note,) = room_for(tmp_path, free // 4 * 3)
    assert note.startswith(f"{tmp_path}: finished parts and the model made of them take ")
    with pytest.raises(OutputError, match="are free on that disk, the model takes .*; choose another place"):
        room_for(tmp_path, 4 * free)


def test_files_that_are_there_count_as_room_and_the_lock_does_not(tmp_path: Path) -> None:
    size = 1 << 36
    for name in ("model.safetensors", LOCK):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no blocks on the disk
    free = shutil.disk_usage(tmp_path).free
    assert len(room_for(tmp_path, free + size // 2)) == 1
    with pytest.raises(OutputError):
        room_for(tmp_path, free + size + size // 2)
