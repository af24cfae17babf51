"""The main job, end to end, on a real checkpoint: from disk to a verified directory, resumed after kill -9, refused where it must be."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import laconic as lc
from laconic.disk.store import MANIFEST, Compressed
from laconic.errors import CheckpointError, DataError, OutputError, SchemeError, VerificationError
from laconic.measure.quality import evaluate_source
from laconic.pipeline import Options, compress_directory
from laconic.scheme.text import parse
from tests.conftest import tiny_config
from tests.processes import THREADS

SMALL = dict(samples=8, length=32, test_tokens=512)


def run(source: Path, scheme: str, out: Path, **options: Any) -> lc.Report:
    return compress_directory(source, parse(scheme), out, Options(**(SMALL | options)))


@pytest.fixture(scope="module")
def compressed(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lc.Report]:
    out = tmp_path_factory.mktemp("compressed") / "model"
    return out, run(tiny, "GPTQ(rate=4.0)", out, data=str(text))


SCHEMES = [
    "RTN(bits=4, group=32)", "GPTQ(bits=3, group=32)", "GPTQ(rate=2.5, over='matrix')", "SparseGPT(0.5) >> GPTQ(bits=4, group=32)",
    "GPTQ(bits=3, group=32) + EoRA(rank=4)", "Magnitude(0.5, scope='model') >> KMeans(bits=3, weights='fisher')", "SpQR(bits=3)",
    "Hadamard(GPTQ(bits=3, group=32))", "LowRank(16, weighted=True)",
    "[('lm_head', RTN(8, 32)), ('*.down_proj', Keep()), ('*', GPTQ(bits=4, group=32))]",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_is_what_is_reported(scheme: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(tiny, scheme, out, data=str(text))
    # sizes are bytes on disk
    files = [p for p in out.iterdir() if p.suffix == ".safetensors" or p.name == MANIFEST]
    assert report.stored_bytes == sum(p.stat().st_size for p in files)
    stored = Compressed(out)
    assert sum(site["bits"] for site in report.sites) == 8 * sum(stored.nbytes(name) for name in stored.weights)
    # both loaders give the model that was measured
    ours = lc.load(out, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    measured = evaluate_source(out, data=str(text), length=32, tokens=512)
    with torch.no_grad():
        logits = theirs(input_ids=_tokens(out, text, 32, 512)).logits[:, :-1].log_softmax(-1)
    targets = _tokens(out, text, 32, 512)[:, 1:]
    assert measured["nats_per_token"] == pytest.approx(
        float(-logits.gather(-1, targets.unsqueeze(-1)).mean()), abs=1e-4
    )
    # what was not compressed is the original's, bit for bit
    original = load_file(tiny / "model.safetensors")
    for name, tensor in stored.files.tensors.items():
        if name in original:
            assert tensor.bytes == original[name].nbytes
    assert not (out / ".laconic").exists()


def _tokens(model: Path, text: Path, length: int, tokens: int) -> torch.Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)["input_ids"][
        :tokens
    ]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def test_the_report_says_it_all(compressed: tuple[Path, lc.Report]) -> None:
    out, report = compressed
    stored = json.loads((out / "report.json").read_text())
    assert stored["bits_per_weight"] == report.bits_per_weight
    assert report.matrix_bits <= 4.0
    assert report.matrix_bits > 3.9
    assert sum(row["after"] for row in stored["by_class"]) == report.stored_bytes
    m = report.metrics
    assert m["kl"] > 0
    assert m["kl_interval"][0] <= m["kl"] <= m["kl_interval"][1]
    assert 0 < m["top1"] <= 1
    assert m["excess"] == pytest.approx(
        m["nats_per_token"] - float(torch.log(torch.tensor(m["reference_perplexity"]))), abs=1e-5
    )
    assert [s["model"] for s in stored["samples"]] == ["prompt", "original", "compressed"]
    assert stored["versions"]["torch"]
    assert stored["peak_memory"]["actual"] > 0
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 1
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "model.layers.1.mlp.down_proj" in html


def test_the_manifest_names_scheme_data_and_versions(compressed: tuple[Path, lc.Report]) -> None:
    manifest = json.loads((compressed[0] / MANIFEST).read_text())
    assert manifest["scheme"] == "GPTQ(rate=4.0)"
    assert manifest["data"]["windows"] == [8, 32]
    assert len(manifest["data"]["sha256"]) == 64
    assert manifest["versions"]["constriction"]
    assert manifest["metrics"]["kl"] > 0
    assert len(manifest["weights"]) == 22, "seven matrices of three blocks, and the embedding"


def test_one_slope_gives_every_matrix_a_rate_of_its_own(compressed: tuple[Path, lc.Report]) -> None:
    rates = {site["bits_per_weight"] for site in compressed[1].sites}
    assert len(rates) > 10
    assert max(rates) - min(rates) > 0.2


def test_loaded_with_its_weights_it_is_the_same_model_and_can_be_trained(compressed: tuple[Path, lc.Report]) -> None:
    dense, live = lc.load(compressed[0], dtype=torch.float32), lc.load(compressed[0], dense=False, dtype=torch.float32)
    ids = torch.arange(1, 25).unsqueeze(0)
    assert torch.allclose(dense(ids).logits, live(ids).logits, atol=1e-5)
    steps = [p for n, p in live.named_parameters() if "scale" in n]
    for p in steps:
        p.requires_grad_()
    F.cross_entropy(live(ids).logits[0, :-1], ids[0, 1:]).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in steps)


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny, "GPTQ(rate=3.0)", tmp_path / name, evaluate=False)
    for file in ("model.safetensors", MANIFEST, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


KILLED = """
import sys, os, signal
from pathlib import Path
from laconic.disk import assemble, files
from laconic.pipeline import Options, compress_directory
from laconic.scheme.text import parse
out, source, text, at = sys.argv[1:5]
count = 0
settle = files.settle
def dying(temporary, file):
    global count
    count += 1
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    settle(temporary, file)
files.settle = assemble.settle = dying
from laconic.engine.shelf import Shelf
put = Shelf.put
def shelved(self, key, tensors):
    global count
    count += 1
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, tensors)
Shelf.put = shelved
compress_directory(source, parse("GPTQ(rate=3.0)"), out, Options(data=text, samples=8, length=32, test_tokens=256, resume=True))
print("writes", count)
"""


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    """kill -9 before every single write of the run, resuming each time: the result is byte for byte that of an undisturbed run."""

    def child(out: Path, at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(out), str(tiny), str(text), str(at)]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)}, check=False
        )

    whole = child(tmp_path / "whole", 10**9)
    assert whole.returncode == 0, whole.stderr
    writes = int(whole.stdout.split("writes")[1])
    assert writes > 12
    killed = 0
    for at in (1, 2, 3, 5, 4, 6, 3, 2, 4, 3, 3, 2, 2, 1, 10**9):
        result = child(tmp_path / "killed", at)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        killed += 1
    assert killed >= 8
    for file in ("model.safetensors", MANIFEST, "config.json", "tokenizer.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not (tmp_path / "killed" / ".laconic").exists()


def test_a_killed_process_from_outside(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The command line itself, killed by the clock wherever it happens to be, then run again with --resume."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    base = [
        sys.executable,
        "-m",
        "laconic",
        "compress",
        str(tiny),
        "--scheme",
        "GPTQ(bits=3, group=32)",
        "--data",
        str(text),
        "--samples",
        "8",
    ]
    base += ["--length", "32", "--test-tokens", "256", "--json"]
    subprocess.run([*base, "--out", str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    process = subprocess.Popen(
        [*base, "--out", str(tmp_path / "killed")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((tmp_path / "killed").glob(".laconic/part-*")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run(
        [*base, "--out", str(tmp_path / "killed"), "--resume"], env=environment, check=True, capture_output=True
    )
    for file in ("model.safetensors", MANIFEST):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_a_full_disk_keeps_what_is_finished(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import laconic.disk.output as run_module

    writes = []
    original = run_module.atomically

    def full(file: Path, tensors: Any, metadata: Any = None) -> None:
        writes.append(file)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, tensors, metadata)

    monkeypatch.setattr(run_module, "atomically", full)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="the disk is full.*--resume"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False)
    assert len(list(out.glob(".laconic/part-*.safetensors"))) == 2
    monkeypatch.setattr(run_module, "atomically", original)
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, resume=True)
    run(tiny, "RTN(bits=4, group=32)", tmp_path / "whole", data=str(text), evaluate=False)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_another_runs_directory_is_left_alone(
    compressed: tuple[Path, lc.Report], tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OutputError, match="holds another model; pass --overwrite"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), overwrite=True)
    assert json.loads((out / MANIFEST).read_text())["scheme"] == "RTN(bits=4, group=32)"


def test_somebody_elses_files_are_never_removed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError):
            run(tiny, "RTN(bits=4, group=32)", tmp_path, **options)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    shutil.copytree(tiny, tmp_path / "source")
    with pytest.raises(OutputError):
        run(tiny, "RTN(bits=4, group=32)", tmp_path / "source", overwrite=True)
    assert (tmp_path / "source" / "model.safetensors").stat().st_size == (tiny / "model.safetensors").stat().st_size


def test_an_unfinished_run_is_continued_by_itself_only(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import laconic.engine.directory as directory

    out = tmp_path / "out"
    monkeypatch.setattr(directory, "commit_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="unfinished run; pass --resume"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False)
    with pytest.raises(OutputError, match="unfinished run of another kind .*methods"):
        run(tiny, "RTN(bits=3, group=32)", out, data=str(text), evaluate=False, resume=True)
    with pytest.raises(OutputError, match="seed: 0 then, 1 now"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, resume=True, seed=1)
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, resume=True)
    with pytest.raises(OutputError, match="complete result of a run of another kind .*methods"):
        run(tiny, "RTN(bits=3, group=32)", out, data=str(text), evaluate=False, resume=True)
    assert not (out / ".laconic").exists(), "a refusal leaves nothing behind"


def test_overwriting_removes_only_what_a_run_wrote(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("main.py", "notes.txt", "data.json"):
        (out / name).write_text("mine")
    with pytest.raises(OutputError, match="no run of laconic wrote"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == ["data.json", "main.py", "notes.txt"]
    for file in out.iterdir():
        file.unlink()
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"no run of laconic wrote \(notes.txt\)"):
        run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, overwrite=True)
    assert lc.load(out) is not None, "a refusal loses nothing"
    (out / "notes.txt").unlink()
    run(tiny, "RTN(bits=3, group=32)", out, data=str(text), evaluate=False, overwrite=True)
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, overwrite=True)
    assert lc.load(out) is not None


def test_a_kill_while_the_work_folder_goes_leaves_the_model_whole(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False)
    model = (out / "model.safetensors").read_bytes()
    (out / ".laconic-done").mkdir()  # what a kill inside Run.close leaves
    (out / ".laconic-done" / "part-0.safetensors").write_bytes(b"half of one")
    again = run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, resume=True)
    assert len(again.sites) == len(first.sites)
    assert not (out / ".laconic-done").exists()
    assert (out / "model.safetensors").read_bytes() == model
    (out / ".laconic-done").mkdir()
    run(tiny, "RTN(bits=4, group=32)", out, data=str(text), evaluate=False, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == model
    assert not (out / ".laconic-done").exists()


def broken(tiny: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(tiny, copy)
    return copy


def test_missing_and_truncated_files(tiny: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    data = (copy / "model.safetensors").read_bytes()
    for cut, message in ((len(data) - 100, "truncated"), (100, "cut off within its header"), (4, "cut off")):
        (copy / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=message):
            run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle, which is never read"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: no such file"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written before the model is known to be sound"


def test_a_config_of_other_shapes(tiny: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(
        CheckpointError, match=r"mlp.gate_proj.weight is stored with shape \(96, 64\), the config asks for \(128, 64\)"
    ):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"asks for model.layers.3.* not stored"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")


def test_weights_that_are_not_finite_are_named_or_left_alone(tiny: Path, text: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"NaN or infinity in model.layers.1.mlp.up_proj.weight; pass --skip-nonfinite"
    ):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out", data=str(text))
    report = run(copy, "RTN(bits=4, group=32)", tmp_path / "out", data=str(text), skip_nonfinite=True, evaluate=False)
    assert "model.layers.1.mlp.up_proj" not in {site["name"] for site in report.sites}
    again = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(again.view(torch.uint8), tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_stored_in_8_bits_are_refused_by_name(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.up_proj.weight is stored as (I8|F8_E4M3); expected float32"
    ):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")


def test_remote_code_is_never_run_unasked(tiny: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    witness = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}))
    with pytest.raises(CheckpointError, match="wants to run code that came with it .*--trust-remote-code"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")
    assert not witness.exists()


def test_what_is_compressed_or_quantized_already_is_refused(
    compressed: tuple[Path, lc.Report], tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="already compressed by laconic"):
        run(compressed[0], "RTN(bits=4, group=32)", tmp_path / "out")
    copy = broken(tiny, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CheckpointError, match="already quantized by 'gptq'"):
        run(copy, "RTN(bits=4, group=32)", tmp_path / "out")


def test_a_model_without_a_matrix_is_refused(tiny: Path, tmp_path: Path) -> None:
    from laconic.engine.resolve import resolve
    from laconic.model.sites import find_slots

    with pytest.raises(SchemeError, match="no linear, convolution or embedding layer"):
        resolve(parse("RTN()"), find_slots(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.ReLU())))
    with pytest.raises(CheckpointError, match="model directory or a hub id"):
        run(tmp_path / "nowhere" / "at" / "all", "RTN()", tmp_path / "out")


def test_short_data_fails_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The old fox.")
    with pytest.raises(DataError, match="tokens are needed"):
        run(tiny, "GPTQ(bits=3, group=32)", tmp_path / "out", data=str(short))
    short.write_text("")
    with pytest.raises(DataError, match="empty"):
        run(tiny, "GPTQ(bits=3, group=32)", tmp_path / "out", data=str(short))


LIES: dict[str, tuple[Any, str]] = {
    "another shape": (
        lambda m: m["specs"][0].update(shape=[64, 128]),
        "asks for|should be|does not describe|damaged|need|the model has",
    ),
    "absurd shape": (
        lambda m: m["specs"][0].update(shape=[2**30, 2**30]),
        "asks for|positive|damaged|does not|the model has",
    ),
    "negative shape": (lambda m: m["specs"][0].update(shape=[-1, 64]), "two positive integers"),
    "huge inner part": (
        lambda m: m["specs"][0].update(scale={"kind": "dense", "shape": [2**20, 2**20], "dtype": "float32"}),
        "damaged",
    ),
    "unknown kind": (lambda m: m["specs"][0].update(kind="pickle"), "unknown kind"),
    "spec that is not there": (lambda m: m["weights"].update({next(iter(m["weights"])): 99}), "do not refer"),
    "weight that is not there": (
        lambda m: m["weights"].update({"model.layers.9.mlp.up_proj.weight": 0}),
        "does not have|lacks",
    ),
    "newer schema": (lambda m: m.update(schema=99), "schema 99"),
    "another format": (lambda m: m.update(format="gguf"), "damaged"),
    "no specs": (lambda m: m.pop("specs"), "damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(lie: str, compressed: tuple[Path, lc.Report], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    manifest = json.loads((out / MANIFEST).read_text())
    LIES[lie][0](manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"digest|{LIES[lie][1]}"):
        lc.load(out)
    with pytest.raises(CheckpointError, match=LIES[lie][1]):
        lc.load(out, verify=False)


def test_damaged_weights_are_found_when_they_are_read(compressed: tuple[Path, lc.Report], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(compressed[0], out)
    data = bytearray((out / "model.safetensors").read_bytes())
    (out / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        lc.load(out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        lc.load(out)


def test_verification_notices_a_wrong_byte(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault between computing and writing is caught by reading back, not by a user."""
    import laconic.engine.directory as passes

    original = passes.pack_weights

    def corrupting(weights: Any) -> Any:
        tensors, specs = original(weights)
        name = next(key for key in tensors if key.endswith("codes"))
        tensors[name] = tensors[name].clone()
        tensors[name][0] ^= 1
        return tensors, specs

    monkeypatch.setattr(passes, "pack_weights", corrupting)
    with pytest.raises(VerificationError, match="does not decode to what was computed"):
        run(tiny, "RTN(bits=4, group=32)", tmp_path / "out", data=str(text), evaluate=False)


def test_experts_are_all_covered_or_listed(tmp_path: Path, tokenizer: Any, text: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(config)
    for layer in (
        model.model.layers
    ):  # of two opposite rows one has a positive score, so an expert with the score 0 is never among the best two
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[[4, 5]] = -layer.mlp.gate.weight.data[[0, 1]]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    report = run(tmp_path / "moe", "GPTQ(bits=3, group=32)", tmp_path / "out", data=str(text))
    experts = [site for site in report.sites if "expert_tokens" in site]
    assert len(experts) == 4
    for site in experts:
        assert len(site["expert_tokens"]) == 8
        assert sum(site["expert_tokens"]) == 8 * 32 * 2
    for site in experts:
        idle = [i for i, tokens in enumerate(site["expert_tokens"]) if tokens == 0]
        assert 3 in idle
        assert site["unmeasured"] == len(idle) / 8
        assert [note for note in site["notes"] if "saw no token" in note] == site["notes"], site["notes"]
        assert f"of 8 ({len(idle) / 8:.0%} of the site) saw no token" in site["notes"][0]
    assert "rounded without statistics" in report["notes"][0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = lc.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(1, 20).unsqueeze(0)
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


def test_tensors_no_module_uses_are_carried_over(tiny: Path, text: Path, tmp_path: Path) -> None:
    copy = broken(tiny, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors["mtp.layers.0.weight"] = torch.randn(4, 4)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    report = run(copy, "RTN(bits=4, group=32)", tmp_path / "out", data=str(text), evaluate=False)
    assert report["unused"] == ["mtp.layers.0.weight"]
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["mtp.layers.0.weight"], tensors["mtp.layers.0.weight"]
    )


def test_large_models_are_sharded_and_read_back(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.disk.assemble._SHARD", 20_000)
    run(tiny, "RTN(bits=4, group=32)", tmp_path / "out", data=str(text), evaluate=False)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    ours = lc.load(tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_sharded_original_is_read(tiny: Path, text: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    run(tmp_path / "sharded", "RTN(bits=4, group=32)", tmp_path / "a", data=str(text), evaluate=False)
    run(tiny, "RTN(bits=4, group=32)", tmp_path / "b", data=str(text), evaluate=False)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_only_one_block_is_in_memory_at_a_time(tmp_path: Path, tokenizer: Any) -> None:
    """Peak memory is counted in a process of its own: a model of 24 blocks and 190 MB adds a few blocks' worth, not itself."""
    config = tiny_config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    size = (tmp_path / "deep" / "model.safetensors").stat().st_size
    assert size > 300e6
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from laconic.pipeline import compress_directory; from laconic.engine.options import Options\n"
        "from laconic.scheme.text import parse; from laconic.host.progress import peak_memory\n"
        "import laconic.show.page\n"
        "before = peak_memory()\n"
        "compress_directory(sys.argv[1], parse('RTN(bits=4)'), sys.argv[2], Options(evaluate=False))\n"
        "print(peak_memory() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "deep"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout.split()[-1]) < 0.3 * size
