"""What a run says before it works: what every site gets and takes, memory and time, room on the disk."""

import shutil
from pathlib import Path

import pytest

import laconic as lc
from laconic.disk.lock import LOCK
from laconic.engine.preflight import room_for
from laconic.errors import CheckpointError, OutputError
from laconic.host.progress import Log
from laconic.methods.rtn import RTN
from laconic.pipeline import Options, plan_directory
from laconic.scheme.text import parse


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


def test_every_site_is_told_with_what_it_gets_and_takes(tiny: Path) -> None:
    scheme = parse("[('*q_proj*', Keep()), ('*', RTN(bits=4, group=32))]")
    checkpoint, plan, told = plan_directory(tiny, scheme, Options(evaluate=False), Log())
    assert [site.name for site in told.sites] == [slot.name for slot in plan.slots]
    for site, slot in zip(told.sites, plan.slots, strict=True):
        assert site.kept == ("q_proj" in site.name)
        assert site.original_bytes == 2 * slot.entries
        expected = site.original_bytes if site.kept else RTN(bits=4, group=32).expected_bits(slot.shape) / 8
        assert site.bytes == expected
        assert site.bits_per_weight == pytest.approx(8 * expected / slot.entries)
    saved = sum(site.original_bytes - site.bytes for site in told.sites)
    assert told.original_bytes == sum(tensor.bytes for tensor in checkpoint.files.tensors.values())
    assert told.bytes == round(told.original_bytes - saved)


def test_the_whole_takes_the_largest_stage_and_the_time_of_all(tiny: Path) -> None:
    told = plan_directory(tiny, parse("GPTQ(bits=4, group=32)"), Options(data="text.txt", samples=8, length=32), Log())[
        2
    ]
    assert told.seconds == pytest.approx(sum(cost.seconds for cost in told.stages.values()))
    assert told.peak_memory > max(cost.bytes for cost in told.stages.values()) > 0


def test_a_compressed_directory_is_no_source(tiny: Path, tmp_path: Path) -> None:
    lc.compress(tiny, lc.RTN(4, 32), out=tmp_path / "small", evaluate=False)
    with pytest.raises(CheckpointError, match="already compressed by laconic; start from the original weights"):
        plan_directory(tmp_path / "small", lc.RTN(4, 32), Options(), Log())
