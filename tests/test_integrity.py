"""What is stored is what was written, or a clear word: checksums, a digest of the manifest, names that account for each other, sizes in sum."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.disk.store import MANIFEST, Compressed, amend_manifest, read_manifest, write_manifest
from laconic.disk.tensors import INDEX, TensorFiles
from laconic.errors import CheckpointError
from laconic.measure.quality import evaluate_source
from laconic.show.inspect import inspect_directory
from laconic.weights.layout import DEPTH, check_spec, stored_names
from tests.weights.laws_weights import EXAMPLES


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("integrity") / "model"
    lc.compress(tiny, "RTN(4, 32)", str(text), out=out, evaluate=False)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def damage(folder: Path, name: str, bit: int = 0) -> None:
    """Flip a bit of a stored tensor."""
    stored = Compressed(folder).files.tensors[name]
    data = bytearray(stored.file.read_bytes())
    data[stored.start + stored.bytes // 2] ^= 1 << bit
    stored.file.write_bytes(data)


def readers(folder: Path) -> dict[str, Any]:
    return {
        "load": lambda: lc.load(folder), "installed": lambda: lc.load(folder, dense=False),
        "transformers": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder), "inspect": lambda: inspect_directory(folder, verify=True),
        "into": lambda: lc.load_into(transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)), folder),
        "evaluate": lambda: evaluate_source(folder, data="self"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight.codes", "model.layers.0.mlp.up_proj.weight.scale.values", "model.norm.weight"],
)
def test_a_flipped_bit_is_found_by_every_reader(name: str, copy: Path) -> None:
    expected = name.removesuffix(".codes").removesuffix(".scale.values")
    damage(copy, name, bit=3)
    for read in readers(copy).values():
        with pytest.raises(CheckpointError, match=f"{expected} is damaged"):
            read()
    result = CliRunner().invoke(app, ["inspect", str(copy), "--verify"])
    assert result.exit_code == 3
    assert lc.load(copy, verify=False) is not None
    assert CliRunner().invoke(app, ["inspect", str(copy)]).exit_code == 0


def test_what_is_sound_is_said_to_be(made: Path) -> None:
    found = inspect_directory(made, verify=True)
    assert found["verified"] == sum(stored.bytes for stored in Compressed(made).files.tensors.values())
    assert inspect_directory(made)["verified"] is None
    assert "verified" in CliRunner().invoke(app, ["inspect", str(made), "--verify"]).stdout
    manifest = read_manifest(made)
    assert set(manifest["checksums"]) == Compressed(made).names
    assert {"config", "digest"} <= set(manifest)


def test_the_config_may_change_where_it_says_nothing_of_the_tensors(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"use_cache": False, "transformers_version": "0"}))
    assert lc.load(copy) is not None
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    for name, read in readers(copy).items():
        if name != "into":
            with pytest.raises(CheckpointError, match=r"config.json: damaged, or changed"):
                read()
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | {"verify": False}})
    )
    damage(copy, "model.norm.weight")
    transformers.AutoModelForCausalLM.from_pretrained(copy)


def test_directories_of_earlier_versions_are_read_with_a_word(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = {
        key: value for key, value in read_manifest(copy).items() if key not in ("checksums", "config", "digest")
    }
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING, "laconic"):
        lc.load(copy)
    assert sum("earlier version" in record.message for record in caplog.records) == 1
    amend_manifest(copy, {"metrics": {"perplexity": 2.0}})  # which makes no seal for what has none
    assert read_manifest(copy)["metrics"] == {"perplexity": 2.0}
    assert inspect_directory(copy, verify=True)["verified"] == 0
    assert "not verified" in CliRunner().invoke(app, ["inspect", str(copy), "--verify"]).stdout


@pytest.mark.parametrize("key", ["digest", "checksums"])
def test_a_seal_cannot_be_lost(key: str, copy: Path) -> None:
    manifest = read_manifest(copy)
    del manifest[key]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="digest"):
        lc.load(copy)


def resaved(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(
        {name: value for name, value in tensors.items() if value is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def test_spec_and_tensors_account_for_each_other(copy: Path) -> None:
    """Also where nothing has a checksum."""
    name = "model.layers.0.mlp.up_proj.weight"
    whole = shutil.copytree(copy, copy.with_name("whole"))
    for changes, message in (
        ({f"{name}.codes": None}, f"{name} lacks {name}.codes"), ({f"{name}.extra": torch.zeros(2)}, f"{name} has a tensor {name}.extra too many"),
        ({f"{name}.codes": torch.zeros(5, dtype=torch.uint8)}, "codes of 4 bits need"), ({f"{name}.scale.values": torch.zeros(3)}, "should be"),
    ):  # fmt: skip
        shutil.copy(whole / "model.safetensors", copy)
        resaved(copy, changes)
        with pytest.raises(CheckpointError, match=message):
            lc.load(copy, verify=False)


def test_an_index_says_where_everything_is(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, copy / file, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (copy / INDEX).write_text(json.dumps({"weight_map": places}))
    assert lc.load(copy) is not None
    (copy / INDEX).write_text(json.dumps({"weight_map": places | {names[0]: places[names[-1]]}}))
    with pytest.raises(CheckpointError, match="does not name the files"):
        lc.load(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}))
    with pytest.raises(CheckpointError):
        lc.load(copy)
    save_file(tensors, copy / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    (copy / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="stores too"):
        lc.load(copy)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_spec_names_its_tensors(name: str) -> None:
    weight, _ = EXAMPLES[name]
    spec, tensors = weight.pack()
    if spec["kind"] == "shared":
        return
    check_spec(json.loads(json.dumps(spec)), name)
    assert stored_names(spec) == set(tensors)


def dense(rows: int, columns: int) -> dict[str, Any]:
    return {"kind": "dense", "shape": [rows, columns], "dtype": "float32"}


def low_rank(rank: int) -> dict[str, Any]:
    return {"kind": "lowrank", "shape": [64, 64], "left": dense(64, rank), "right": dense(rank, 64)}


def deep(levels: int) -> dict[str, Any]:
    return {"kind": "rotated", "shape": [64, 64], "sides": [], "weight": deep(levels - 1)} if levels else dense(64, 64)


BOMBS = {
    "many terms": {"kind": "sum", "shape": [64, 64], "terms": [low_rank(8000)] * 20},
    "more terms": {"kind": "sum", "shape": [64, 64], "terms": [low_rank(1)] * 5000},
    "wide factors": low_rank(2**20),
    "product of factors": {"kind": "lowrank", "shape": [64, 64], "right": dense(1, 64),
                           "left": {"kind": "lowrank", "shape": [64, 2**25], "left": dense(64, 1), "right": dense(1, 2**25)}},
    "nesting": deep(40),
    "table": {"kind": "codebook", "shape": [64, 64], "bits": 16, "dimension": 64, "rows_per_table": 1, "codec": "dense",
              "table": dense(64 * 2**16, 64)},
    "dimensions": {"kind": "sparse", "shape": [64, 64], "pattern": {"dims": [64, 64, *[1] * 99999], "block": [1] * 100001}, "values": dense(64, 64)},
    "no shape": {"kind": "sum", "shape": [64, 64], "terms": [{"kind": "dense"}]}, "true": dense(True, 64), "huge": dense(10**30, 64),
    "kind": {"kind": ["dense"], "shape": [64, 64]},
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_take_more_memory_than_the_model_is_refused_before(bomb: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bomb"):
        check_spec(BOMBS[bomb], "bomb")
    lc.save(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    manifest = read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"specs": [BOMBS[bomb]], "weights": {"0.weight": 0}}))
    with pytest.raises(CheckpointError):
        lc.load_into(nn.Sequential(nn.Linear(64, 64)), tmp_path, verify=False)


def test_what_is_honest_is_not_refused() -> None:
    check_spec(deep(DEPTH), "deep")
    check_spec({"kind": "sum", "shape": [4096, 4096], "terms": [low_rank_of(4096, 64)] * 16}, "sixteen terms")
    table = {
        "kind": "codebook",
        "shape": [16, 64],
        "bits": 16,
        "dimension": 8,
        "rows_per_table": 16,
        "codec": "dense",
        "table": dense(2**16, 8),
    }
    check_spec(table, "a table larger than its matrix")


def low_rank_of(size: int, rank: int) -> dict[str, Any]:
    return {"kind": "lowrank", "shape": [size, size], "left": dense(size, rank), "right": dense(rank, size)}


def test_json_bombs(copy: Path) -> None:
    for file in (MANIFEST, "config.json"):
        good = (copy / file).read_text()
        for text in (
            "[" * 10**6,
            '{"a":' * 10**5 + "1" + "}" * 10**5,
            '{"n": ' + "9" * 10**5 + "}",
            good.rstrip()[:-1] + ', "specs": [], "specs": []}',
        ):
            (copy / file).write_text(text)
            with pytest.raises(CheckpointError):
                lc.load(copy)
        with (copy / file).open("wb") as stream:
            stream.truncate(1 << 28)
        with pytest.raises(CheckpointError, match="at most"):
            lc.load(copy)
        (copy / file).write_text(good)


def test_every_writer_seals(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    lc.compress(net, "RTN(4, 'channel')")
    lc.save(net, tmp_path)
    manifest = read_manifest(tmp_path)
    assert set(manifest["checksums"]) == Compressed(tmp_path).names
    before = (tmp_path / MANIFEST).read_bytes()
    write_manifest(tmp_path, manifest)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_what_the_system_does_not_read_is_named(tiny: Path, tmp_path: Path) -> None:
    """An error of the system while a model is read is one of the model, with the file's name."""
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a file whose reading fails
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        TensorFiles(tmp_path / "model")
    file.unlink()
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(CheckpointError, match="cannot be read: .*name too long"):
        TensorFiles(tmp_path / "model")


@pytest.mark.parametrize(
    "report", ["[" * 100_000, "{}", '{"sites": [{"parameter": "a", "error": "much"}]}', '{"sites": 3}', "\ud800"]
)
def test_a_damaged_report_hides_no_bytes(report: str, copy: Path) -> None:
    (copy / "report.json").write_text(report, errors="surrogatepass")
    assert inspect_directory(copy)["weights"]
    assert CliRunner().invoke(app, ["inspect", str(copy)]).exit_code == 0


def test_weights_that_the_config_says_are_elsewhere_are_refused(tiny: Path, tmp_path: Path) -> None:
    """transformers would read that other file."""
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name, taken in (("other.safetensors", False), (["a"], False), ("model.safetensors", True)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        if taken:
            lc.compress(tmp_path / "model", "RTN(4, 32)", out=tmp_path / "out", evaluate=False)
            assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
            continue
        with pytest.raises(CheckpointError, match="transformers_weights.*rename"):
            lc.compress(tmp_path / "model", "RTN(4, 32)", out=tmp_path / "out", evaluate=False)
