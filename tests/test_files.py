"""Files that are there whole or not at all, on a disk that really is full too."""

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from laconic.disk.files import atomically, disk_errors, write_json, write_tensors
from laconic.disk.tensors import read_header
from laconic.errors import OutputError

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip


def test_what_is_written_is_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t.{i}": torch.randint(0, 2, (3, i)).to(dtype) for i, dtype in enumerate(TYPES)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "slanted": torch.randn(4, 6).t()[::2],
        "größe": torch.ones(1),
        "one": torch.ones(1).expand(3)[:1],
    }
    atomically(tmp_path / "a.safetensors", tensors, {"told": 'a "word" é'})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(
        torch.equal(back[name].view(torch.uint8), t.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        for name, t in tensors.items()
        if t.dim()
    )
    assert all(back[name].dtype == t.dtype and back[name].shape == t.shape for name, t in tensors.items())
    read_header(tmp_path / "a.safetensors")
    usual = {
        "x.0.codes": torch.arange(7).to(torch.uint8),
        "x.0.scale": torch.ones(3).bfloat16(),
        "norm": torch.ones(5),
        "bias": torch.ones(2),
    }
    atomically(tmp_path / "b.safetensors", usual)
    assert (tmp_path / "b.safetensors").read_bytes() == save(usual, {"format": "pt"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomically(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


@pytest.fixture
def full() -> Iterator[None]:
    """No file can grow beyond 50 kB, which the system tells as it tells a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full: None) -> None:
    file = tmp_path / "a.safetensors"
    atomically(file, {"a": torch.ones(2)})
    before = file.read_bytes()
    with (
        pytest.raises(OutputError, match="the disk is full.*free some space and run again with --resume"),
        disk_errors(tmp_path),
    ):
        atomically(file, {"a": torch.ones(100_000)})
    with pytest.raises(OutputError, match="the disk is full"), disk_errors(tmp_path):
        write_json(tmp_path / "a.json", list(range(50_000)))
    assert file.read_bytes() == before
    assert {part.name for part in tmp_path.iterdir()} == {"a.safetensors", "a.safetensors.tmp", "a.json.tmp"}
    with pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path / "b", {"a": torch.ones(100_000)})


def test_the_library_would_not_say_so(tmp_path: Path, full: None) -> None:
    """Why files are written here: should this fail one day, `write_tensors` may be left to the library."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which it is, is the point
        save_file({"a": torch.ones(100_000)}, tmp_path / "a.safetensors")
    assert not isinstance(caught.value, OSError)
