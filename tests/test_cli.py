"""The command line: what goes to stdout and what does not, exit codes, refusals, and Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from laconic import errors
from laconic.command.cli import app
from laconic.disk.store import MANIFEST, stored_bytes
from laconic.scheme.text import vocabulary
from tests.processes import PATIENCE, THREADS

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": str(THREADS)}


def laconic(*words: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def small(text: Path, *more: object) -> list[object]:
    return ["--data", text, "--samples", 8, "--length", 32, "--test-tokens", 512, *more]


def only_json(stdout: str) -> Any:
    """The one JSON value on stdout; nothing may stand before or after it."""
    assert stdout.count("\n") == 1
    return json.loads(stdout)


@pytest.fixture(scope="module")
def compressed(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory made by the command in a process of its own, and the JSON that it printed."""
    out = tmp_path_factory.mktemp("cli") / "model"
    command = ["compress", tiny, "--scheme", "GPTQ(rate=4.0)", "--out", out, *small(text, "--json")]
    result = subprocess.run(
        [sys.executable, "-m", "laconic", *map(str, command)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out, only_json(result.stdout)


def test_compress_prints_the_report_it_wrote(compressed: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    out, printed = compressed
    written = json.loads((out / "report.json").read_text())
    del written["samples"]
    assert printed == written
    assert printed["stored_bytes"] == stored_bytes(out)
    assert shlex.split(printed["command"])[:3] == ["laconic", "compress", str(tiny)]


def test_evaluate_measures_what_compress_reported(
    compressed: tuple[Path, dict[str, Any]], tiny: Path, text: Path, tmp_path: Path
) -> None:
    """On the text that was kept for the report, the command finds the report's figures again."""
    out, printed = compressed
    lines = text.read_text()
    rest = tmp_path / "rest.txt"
    rest.write_text(lines[lines.find("\n", int(len(lines) * 0.9)) + 1 :])
    result = laconic("evaluate", out, "--reference", tiny, "--data", rest, "--length", 32, "--tokens", 512, "--json")
    assert result.exit_code == 0, result.stderr
    found = only_json(result.stdout)
    metrics = printed["metrics"]
    assert {name: found[name] for name in metrics if name != "data"} == {
        name: value for name, value in metrics.items() if name != "data"
    }
    assert found["bits_per_weight"] == printed["bits_per_weight"]
    assert found["stored_bytes"] == printed["stored_bytes"]


def test_the_rows_of_inspect_add_up_to_the_files(compressed: tuple[Path, dict[str, Any]]) -> None:
    out, printed = compressed
    result = laconic("inspect", out, "--json")
    assert result.exit_code == 0
    found = only_json(result.stdout)
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    assert sum(row["bytes"] for row in found["weights"] + found["plain"]) + found["container_bytes"] == found["bytes"]
    assert found["bytes"] == files["model.safetensors"] + files[MANIFEST] == printed["stored_bytes"]
    assert found["bytes"] + sum(found["other_files"].values()) == sum(files.values())
    assert all(sum(row["tensors"].values()) == row["bytes"] == row["bits"] / 8 for row in found["weights"])
    assert {row["name"]: row["error"] for row in found["weights"]} == {
        site["parameter"]: site["error"] for site in printed["sites"]
    }


def test_tables_go_to_stdout_and_progress_to_stderr(
    compressed: tuple[Path, dict[str, Any]], tiny: Path, text: Path, tmp_path: Path
) -> None:
    run = laconic("compress", tiny, "--scheme", "RTN(bits=4, group=32)", "--out", tmp_path / "out", *small(text))
    assert run.exit_code == 0, run.stderr
    assert run.stdout == ""
    assert "model.layers.*.mlp.down_proj" in run.stderr
    assert "bits per weight" in run.stderr
    table = laconic("inspect", compressed[0])
    assert table.stderr == ""
    assert f"{compressed[1]['stored_bytes']:,}" in table.stdout
    assert all(site["parameter"] in table.stdout for site in compressed[1]["sites"])


def test_every_method_is_listed_with_one_line() -> None:
    listed = only_json(laconic("methods", "--json").stdout)
    assert list(listed) == list(vocabulary())
    table = laconic("methods").stdout
    for name, entry in listed.items():
        assert 10 < len(entry["does"]) < 160, name
        assert "\n" not in entry["does"]
        assert entry["does"].endswith("."), name
        assert f"│ {name} " in table
        assert entry["does"] in table, "the whole line, brackets included"


def failing_with(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("kind", [c for c in vars(errors).values() if isinstance(c, type)], ids=lambda c: c.__name__)
def test_every_error_class_has_its_exit_code(
    kind: type[errors.LaconicError], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes documented at the top of cli.py, and the message whole, whatever brackets it has."""
    documented = {
        "LaconicError": 1, "SchemeError": 2, "CheckpointError": 3, "DataError": 4, "OutputError": 5, "VerificationError": 6, "SurgeryError": 7,
        "SearchError": 8, "RecoveryError": 9, "ReportError": 10,
    }  # fmt: skip
    monkeypatch.setattr(
        "laconic.pipeline.compress_directory", failing_with(kind("/some/[where]: expected [/this], came [out, in]"))
    )
    result = laconic("compress", tiny)
    assert result.exit_code == documented[kind.__name__] == kind.exit_code
    assert result.stderr.strip() == "error /some/[where]: expected [/this], came [out, in]"
    assert result.stdout == ""


REFUSED: dict[str, tuple[int, str, list[str]]] = {
    "a misspelt method": (2, "did you mean 'GPTQ'?", ["--scheme", "GPTG(bits=3)"]),
    "a call of something else": (
        2,
        "only methods can be called",
        ["--scheme", "__import__('pathlib').Path('{out}').touch()"],
    ),
    "a call in an argument": (2, "unknown method 'open'", ["--scheme", "GPTQ(bits=open('{out}', 'w'))"]),
    "two schemes": (2, "not both", ["--scheme", "RTN(4, 32)", "--plan", "plan.py"]),
    "no such plan": (2, "no such plan file", ["--plan", "{out}/plan.py"]),
    "an unknown type": (2, "float64", ["--scheme", "RTN(4, 32)", "--dtype", "float64"]),
    "an unknown device": (2, "abacus", ["--scheme", "RTN(4, 32)", "--device", "abacus"]),
    "a rule that matches nothing": (2, "matches no site", ["--scheme", "[('*.dwn_proj', RTN(4, 32)), ('*', Keep())]"]),
    "no such data": (4, "no such file", ["--scheme", "RTN(4, 32)", "--data", "{out}.txt"]),
    "too short a text": (4, "tokens are needed", ["--scheme", "GPTQ(4, 32)", "--samples", "100000"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    case: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    code, message, options = REFUSED[case]
    out = tmp_path / "out"
    given = [option.replace("{out}", str(out)) for option in options]
    result = laconic("compress", tiny, *small(text), *given, "--out", out, "--json")
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert result.stderr.count("error ") == 1
    assert "Traceback" not in result.stderr
    error = only_json(result.stdout)["error"]
    assert error["exit_code"] == code
    assert message in error["message"]
    assert not out.exists()


def test_commands_on_what_is_no_model(tmp_path: Path, text: Path) -> None:
    for words in (
        ["compress", tmp_path],
        ["evaluate", tmp_path, "--data", text],
        ["inspect", tmp_path],
        ["inspect", tmp_path / "none"],
    ):
        result = laconic(*words)
        assert result.exit_code == 3, words
        assert str(tmp_path) in result.stderr
    assert laconic("evaluate", tmp_path).exit_code == 2, "neither --data nor --tasks"
    assert laconic("compress").exit_code == 2, "no model named"
    assert list(tmp_path.iterdir()) == []


def test_a_used_directory_is_refused_without_resume_or_overwrite(
    compressed: tuple[Path, dict[str, Any]], tiny: Path, text: Path, tmp_path: Path
) -> None:  # fmt: skip
    out = compressed[0]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    result = laconic("compress", tiny, "--scheme", "RTN(bits=4, group=32)", "--out", out, *small(text, "--json"))
    assert result.exit_code == 5
    assert "--overwrite" in result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert (
        laconic("compress", tiny, "--scheme", "RTN(4, 32)", "--out", tmp_path, "--overwrite", *small(text)).exit_code
        == 5
    )
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_an_earlier_result(tiny: Path, text: Path, tmp_path: Path) -> None:
    for scheme in ("RTN(bits=4, group=32)", "RTN(bits=2, group=32)"):
        result = laconic(
            "compress",
            tiny,
            "--scheme",
            scheme,
            "--out",
            tmp_path / "out",
            "--no-evaluate",
            "--overwrite",
            *small(text),
        )
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "out" / MANIFEST).read_text())["scheme"] == scheme


def test_a_dry_run_writes_nothing_and_names_every_site(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scheme = "[('lm_head', Keep()), (block == 1, GPTQ(bits=3, group=32)), ('*', RTN(bits=4, group=32))]"
    result = laconic("compress", tiny, "--scheme", scheme, "--dry-run", "--json", *small(text))
    assert result.exit_code == 0, result.stderr
    sites = only_json(result.stdout)["sites"]
    assert len(sites) == 22
    for site in sites:
        expected = "Keep" if site["role"] == "embedding" else "GPTQ" if "layers.1." in site["name"] else "RTN"
        assert site["method"].startswith(expected), site["name"]
    table = laconic("compress", tiny, "--scheme", scheme, "--dry-run", *small(text))
    assert "model.layers.*.mlp.down_proj" in table.stderr
    assert table.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_plan_file_is_a_program(tiny: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.py"
    plan.write_text(
        "import laconic as lc\n\ndef scheme(site):\n    return lc.RTN(bits=4, group=32) if site.columns > 64 else lc.Keep()\n"
    )
    result = laconic(
        "compress", tiny, "--plan", plan, "--out", tmp_path / "out", "--no-evaluate", "--json", *small(text)
    )
    assert result.exit_code == 0, result.stderr
    assert {site["name"].split(".")[-1] for site in only_json(result.stdout)["sites"]} == {"down_proj"}


def test_text_in_a_shell_pattern_is_shown_as_it_is(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Brackets of a pattern are no markup of the terminal's."""
    scheme = "[('*.[a-z]_proj', RTN(bits=4, group=32)), ('*', Keep())]"
    out = tmp_path / "out"
    assert laconic("compress", tiny, "--scheme", scheme, "--out", out, "--no-evaluate", *small(text)).exit_code == 0
    assert scheme in " ".join(laconic("inspect", out).stdout.split())


INTERRUPTIBLE = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from laconic import GPTQ, Keep

@dataclass(frozen=True, repr=False)
class Slow(GPTQ):
    def __call__(self, site):
        if site.name == "model.layers.1.mlp.up_proj" and "WITNESS" in os.environ:
            Path(os.environ["WITNESS"]).touch()
            time.sleep(1800)
        return super().__call__(site)

scheme = [("lm_head", Keep()), ("*", Slow(bits=3, group=32))]
"""


def test_ctrl_c_keeps_what_is_finished(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Interrupted in the second block: one line, code 130, nothing on stdout; then --resume ends with an undisturbed run's bytes."""
    plan, out, witness = tmp_path / "plan.py", tmp_path / "out", tmp_path / "witness"
    plan.write_text(INTERRUPTIBLE)
    words = ["compress", tiny, "--plan", plan, *small(text, "--json", "--no-evaluate")]
    command = [sys.executable, "-m", "laconic", *map(str, words), "--out", str(out)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT | {"WITNESS": str(witness)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - what a shell starts in the background ignores it
    )  # fmt: skip
    while not witness.exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, stderr
    assert only_json(stdout)["error"]["kind"] == "KeyboardInterrupt"
    assert "Traceback" not in stderr
    assert "--resume" in stderr.splitlines()[-1]
    finished = {file: file.stat().st_mtime_ns for file in out.glob(".laconic/part-*")}
    assert finished
    assert not (out / MANIFEST).exists(), "an unfinished directory is no model"
    assert laconic("inspect", out).exit_code == 3
    assert laconic(*words, "--out", out).exit_code == 5
    assert {file: file.stat().st_mtime_ns for file in out.glob(".laconic/part-*")} == finished
    resumed = laconic(*words, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert len(only_json(resumed.stdout)["sites"]) == 21
    whole = laconic(*words, "--out", tmp_path / "whole")
    assert whole.exit_code == 0
    for file in ("model.safetensors", MANIFEST):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
