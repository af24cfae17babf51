"""What comes after the weights cannot lose them; a directory has one writer; what was damaged is made again; nothing is left lying about."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic as lc
from laconic.disk.companions import NOT_FETCHED, companions, is_weights
from laconic.disk.files import read_seal, read_sealed_json, seal, write_sealed_json, write_tensors
from laconic.disk.lock import LOCK, locked
from laconic.disk.store import MANIFEST
from laconic.errors import CheckpointError, DataError, OutputError, ReportError
from laconic.pipeline import Options, compress_directory
from laconic.scheme.text import parse

SMALL = dict(samples=8, length=32, test_tokens=128)
RTN = "RTN(bits=8, group='channel')"


def run(source: Path, scheme: str, out: Path, **options: Any) -> lc.Report:
    return compress_directory(source, parse(scheme), out, Options(**(SMALL | options)))


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of a model directory but for the report, which holds times."""
    return {name: (folder / name).read_bytes() for name in names(folder) if not name.startswith("report.")}


# --- one writer


HOLDER = """
import sys, time
from pathlib import Path
from laconic.disk.lock import locked
with locked(Path(sys.argv[1]), shared=len(sys.argv) > 2):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A process that holds a folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_writer_until_it_dies(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    process = holder(out)
    try:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=rf"in use by process {process.pid} on .* since 20"):
                run(tiny, RTN, out, evaluate=False, **options)
        with pytest.raises(OutputError, match="in use by process"), locked(out, shared=True):
            pass
        assert names(out) == {LOCK}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(tiny, RTN, out, evaluate=False)  # what a killed process leaves keeps nobody out
    assert not (out / LOCK).exists()


def test_a_lock_is_shared_taken_again_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "b" / "c"
    with locked(out), locked(out), locked(out, shared=True):
        assert (out / LOCK).exists()
    assert not (tmp_path / "b").exists(), "folders made for a lock go with it"
    process = holder(out, "shared")
    try:
        with locked(out, shared=True), pytest.raises(OutputError, match="in use by"), locked(out):
            pass
        assert (out / LOCK).exists(), "it is the other one's too"
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
    finally:
        process.kill()
        process.wait()
    with locked(out, shared=True), locked(out):
        pass
    assert names(out) == set()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    out, (read, write) = tmp_path / "out", os.pipe()
    with locked(out):
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)  # lives until the parent closes its end
            os._exit(0)
    try:
        with locked(out):
            pass
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, message in (
        ("file", "found a file"),
        ("file/below/it", "found a file"),
        ("link", "is a link to .*nowhere"),
        ("link/x", "is a link to"),
    ):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=message):
                run(tiny, "no work is done, so this is never read" and RTN, tmp_path / out, **options)
    with pytest.raises(OutputError), locked(Path("/proc/laconic")):
        pass
    (tmp_path / "real").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "real")
    run(tiny, RTN, tmp_path / "good", evaluate=False, resume=True)
    assert (tmp_path / "real" / MANIFEST).exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_too_small_a_disk_is_said_before_the_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = run(tiny, RTN, tmp_path / "a", evaluate=False)["expected_bytes"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, size - 1))
    with pytest.raises(OutputError, match="are free on that disk, the model takes"):
        run(tiny, RTN, tmp_path / "b", evaluate=False)
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, size + 1))
    assert any("for a while" in note for note in run(tiny, RTN, tmp_path / "b", evaluate=False).notes)


# --- work is not lost at the end


def test_resuming_a_complete_run_prints_its_report(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(tiny, RTN, out, data=str(text), resume=True)  # an absent folder is begun
    before = {name: (out / name).read_bytes() for name in names(out)}
    again = run(tiny, RTN, out, data=str(text), resume=True)
    assert again.as_dict() == json.loads(json.dumps(first.as_dict()))
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert run(tiny, RTN, out, data=str(text), resume=True, evaluate=False).metrics == again.metrics
    with pytest.raises(OutputError, match="complete result of a run of another kind .*seed: 0 then, 1 now"):
        run(tiny, RTN, out, data=str(text), resume=True, seed=1)
    more = run(tiny, RTN, out, data=str(text), resume=True, test_tokens=256)
    assert more.metrics["tokens"] > again.metrics["tokens"]
    assert json.loads((out / MANIFEST).read_text())["metrics"] == json.loads(json.dumps(more.metrics))
    assert before["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert not (out / ".laconic").exists()
    (out / "report.json").unlink()
    with pytest.raises(OutputError, match=r"report.json is gone.*--overwrite"):
        run(tiny, RTN, out, data=str(text), resume=True)
    (out / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        run(tiny, RTN, out, data=str(text), resume=True)


@pytest.fixture(scope="module")
def whole(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lc.Report]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(tiny, RTN, out, data=str(text))


FAILS = [(what, RuntimeError("not enough memory")) for what in ("quality_of", "generation_samples", "write_report")]


@pytest.mark.parametrize(("what", "error"), [*FAILS, ("quality_of", KeyboardInterrupt())])
def test_what_fails_after_the_weights_is_repeated_alone(
    what: str,
    error: BaseException,
    tiny: Path,
    text: Path,
    whole: tuple[Path, lc.Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import laconic.conclude as conclude
    import laconic.pipeline as pipeline

    out = tmp_path / "out"

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(conclude if what == "write_report" else pipeline, what, failing)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ReportError
        with pytest.raises(expected, match=r"the model is complete and verified.*--resume"):
            run(tiny, RTN, out, data=str(text))
    assert lc.load(out) is not None
    if what != "write_report" and expected is ReportError:
        assert any(
            "not enough memory; the model is complete" in note
            for note in json.loads((out / "report.json").read_text())["notes"]
        )
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "stored_model", failing)  # which would be the work again
        if what != "quality_of":
            patch.setattr(pipeline, "quality_of", failing)
        report = run(tiny, RTN, out, data=str(text), resume=True)
    assert report.metrics["kl"] >= 0
    assert not any("complete" in note for note in report.notes)
    assert bytes_of(out) == bytes_of(whole[0])
    assert json.dumps(whole[1].metrics) == json.dumps(report.metrics)
    assert len(json.loads((out / "report.json").read_text())["samples"]) == 3


def test_a_model_without_a_tokenizer_gets_a_report_without_samples(tiny: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    report = run(source, RTN, tmp_path / "out")
    assert any("no samples of text" in note for note in report.notes)
    assert report.metrics["kl"] >= 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == []
    with pytest.raises((CheckpointError, DataError)):
        run(source, RTN, tmp_path / "other", data=str(text))
    assert not (tmp_path / "other").exists()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mymodel"
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_that_is_trusted_is_trusted_to_the_end(tiny: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "modeling_my.py").write_text(CODE)
    config = json.loads((source / "config.json").read_text())
    auto = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "mymodel", "architectures": ["MyForCausalLM"], "auto_map": auto})
    )
    out = tmp_path / "out"
    report = run(source, RTN, out, data=str(text), trust_remote_code=True)
    assert report.metrics["kl"] >= 0
    assert len(json.loads((out / "report.json").read_text())["samples"]) == 3
    assert (out / "modeling_my.py").exists()
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        run(source, RTN, tmp_path / "other", data=str(text))


# --- companions


def model_folder(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    for name in (
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "source.spm", "qwen.tiktoken", "bpe.codes",
        "tokenizer.model.v3", "LICENSE", "preprocessor_config.json", "onnx/config.json",
        "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "flax.msgpack",
        "original/consolidated.00.pth", "model.gguf", "convert.py", ".git/config", "__pycache__/x.json", "checkpoint-500/trainer_state.json",
        "compressed/laconic.json", "compressed/x.json", "pytorch_model.bin.index.json",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


CARRIED = {
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "source.spm", "qwen.tiktoken", "bpe.codes",
    "tokenizer.model.v3", "LICENSE", "preprocessor_config.json", "onnx/config.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json",
}  # fmt: skip


def test_everything_that_is_not_weights_goes_with_the_model(tiny: Path, tmp_path: Path) -> None:
    source, out = model_folder(tiny, tmp_path / "source"), tmp_path / "out"
    report = run(source, RTN, out, evaluate=False)
    assert names(out) == CARRIED | {"config.json", "model.safetensors", MANIFEST, "report.json", "report.html"}
    told = " ".join(report.notes)
    for name in (
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "convert.py",
    ):
        assert name in told, name
    assert "compressed" not in told
    assert "convert.py" in companions(source, trusted=True).files
    run(source, RTN, out, evaluate=False, overwrite=True)
    (out / "1_Pooling" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"1_Pooling/mine.txt"):
        run(source, RTN, out, evaluate=False, overwrite=True)
    (out / "1_Pooling" / "mine.txt").unlink()
    run(tiny, RTN, out, evaluate=False, overwrite=True)
    assert not (out / "1_Pooling").exists()


def test_links_are_resolved_and_an_output_inside_is_passed_over(tiny: Path, tmp_path: Path) -> None:
    blobs, snapshot = model_folder(tiny, tmp_path / "blobs"), tmp_path / "snapshot"
    for name in names(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    (snapshot / "again").symlink_to(snapshot)
    (snapshot / "gone.json").symlink_to(tmp_path / "nowhere")
    found = companions(snapshot, trusted=False, model=[snapshot / "model.safetensors"])
    assert set(found.files) == CARRIED
    assert any("gone.json" in note for note in found.notes)
    found.copy_to(tmp_path / "copy")
    assert names(tmp_path / "copy") == CARRIED
    assert not any(file.is_symlink() for file in (tmp_path / "copy").rglob("*"))
    run(snapshot, RTN, snapshot / "out", evaluate=False)
    run(snapshot, RTN, snapshot / "out", evaluate=False, overwrite=True)
    assert not (snapshot / "out" / "out").exists()


def test_a_hub_repository_is_fetched_by_the_same_rule(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from laconic.disk.load import fetch

    source, asked = model_folder(tiny, tmp_path / "source"), dict[str, Any]()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(source)
    )
    fetch("owner/name")
    fetched = set(filter_repo_objects(sorted(names(source)), **asked))
    assert fetched >= CARRIED | {"model.safetensors", "config.json"}
    assert {name for name in fetched if is_weights(name)} - {"pytorch_model.bin.index.json"} == {
        "model.safetensors",
        "adapter_model.safetensors",
    }
    assert "*.bin" in NOT_FETCHED


# --- damage


def test_a_seal_shows_every_change(tmp_path: Path) -> None:
    file, tensors = (
        tmp_path / "a.safetensors",
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int8), "none": torch.empty(0)},
    )
    write_tensors(file, tensors, seal(tensors, {"told": "x"}))
    assert read_seal(file) == {"told": "x"}
    data = file.read_bytes()
    for position in range(0, len(data), 3):
        for changed in (data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], data[:position]):
            file.write_bytes(changed)
            if changed[8:].rstrip() == data[8:].rstrip():
                continue
            try:
                told = read_seal(file)
            except CheckpointError:
                continue
            assert told == {"told": "x"}  # only spaces of the header, or what stands for the same JSON
            assert position < len(data) - sum(t.nbytes for t in tensors.values())
    write_sealed_json(tmp_path / "a.json", {"a": [1, 2.5, None]})
    assert read_sealed_json(tmp_path / "a.json") == {"a": [1, 2.5, None]}
    for text in ("", "{", "[]", '{"value": {"a": [1, 2.5, 1]}, "crc": 0}', "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            read_sealed_json(tmp_path / "a.json")


SCHEME = "[('*.q_proj', KMeans(bits=3, weights='fisher')), ('model.embed_tokens', Keep()), ('lm_head', Keep()), ('*', GPTQ(rate=3.0))]"


@pytest.fixture(scope="module")
def cut(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was interrupted before its last block, and the same undisturbed."""
    import laconic.disk.output as run_module

    folder, commits = tmp_path_factory.mktemp("cut"), []
    atomically = run_module.atomically

    def dying(*arguments: Any) -> None:
        commits.append(arguments[0])
        if len(commits) == 3:
            raise KeyboardInterrupt
        atomically(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "atomically", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, SCHEME, folder / "cut", data=str(text), evaluate=False)
    run(tiny, SCHEME, folder / "whole", data=str(text), evaluate=False)
    return folder / "cut", folder / "whole"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED = [
    ("part-*.safetensors", flip, "damaged"), ("part-*.safetensors", truncate, "damaged"), ("hidden-*.safetensors", flip, "damaged"),
    ("hidden-*.safetensors", Path.unlink, None), ("extra-*.safetensors", flip, "the survey is made again"), ("notes.json", truncate, "damaged"),
    ("notes.json", flip, "damaged"), ("run.json", truncate, "only the parts that say that they are this run's are kept"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "damage", "told"), DAMAGED)
def test_damaged_work_is_said_and_done_again(
    pattern: str, damage: Any, told: str | None, tiny: Path, text: Path, cut: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut[0], out)
    found = sorted((out / ".laconic").glob(pattern))
    assert found
    damage(found[0])
    (out / ".laconic" / "part-half.safetensors.tmp").write_bytes(b"half of one")
    (out / "config.json.tmp").write_text("half")
    report = run(tiny, SCHEME, out, data=str(text), evaluate=False, resume=True)
    assert bytes_of(out) == bytes_of(cut[1])
    assert (
        any(told in note for note in report.notes)
        if told is not None
        else not any("again" in note for note in report.notes)
    )


def test_many_logits_are_taken_in_parts_to_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is softmax - label, whichever labels were drawn, and the loss is that of these labels."""
    import laconic.engine.losses as calibrate

    logits = (3 * torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))).requires_grad_()
    monkeypatch.setattr(calibrate, "MANY", 100)
    monkeypatch.setattr(calibrate, "PART", 160)
    loss = calibrate.sampled_labels(logits, torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    labels = gradient.argmin(-1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert torch.allclose(gradient, 2 * torch.autograd.grad(expected, logits)[0], atol=1e-6)
    assert len(labels.unique()) > 5
    with pytest.raises(DataError, match="NaN or infinity"):
        calibrate.sampled_labels(logits / 0, torch.Generator())


class Heard:
    """A progress that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def plan(self, preflight: dict[str, Any]) -> None: ...
    def start(self, task: str, total: float) -> None: ...
    def site(self, record: dict[str, Any]) -> None: ...
    def say(self, message: str) -> None: ...

    def advance(self, units: float, note: str = "") -> None:
        self.notes.append(note)


def test_the_time_that_is_left_follows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import laconic.host.clock as clock_module

    now = 100.0
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now)
    heard = Heard()
    clock = clock_module.Clock(heard, {"survey": 10.0, "compression": 20.0, "evaluation": 5.0})
    assert clock.left() == 35
    clock.start("surveying the original model", 4)
    now += 30  # three times as long as expected
    clock.advance(4, "a block")
    assert clock.left() == pytest.approx(75)
    clock.start("compressing", 10)
    now += 4
    clock.advance(2)  # twice as fast as expected: 20 s in all
    assert clock.left() == pytest.approx(16 + 5 * 34 / 14)
    assert clock.early == pytest.approx(34 + clock.left())
    now += 16
    clock.advance(8)
    clock.start("evaluating what was stored", 1)
    clock.finish()
    assert clock.told()["survey"] == {"expected": 10.0, "actual": 30.0}
    assert heard.notes[0] == "a block, 75 seconds left in all"
