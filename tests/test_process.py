"""The process of a command: streams that are full, gone or poor, and signals at any time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import laconic as lc
from laconic.host.threads import SETTINGS, quota

PLAN = ["compress", "model", "--plan", "plan.py", "--out", "out", "--json"]
PREPARED = "import sys; sys.argv[0] = 'laconic'; from laconic.command.start import main; "


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("process") / "small"
    lc.compress(tiny, lc.RTN(4, 32), out=out, evaluate=False)
    return out


def run(*words: object, program: str = PREPARED + "main()", **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], text=True, check=False, stderr=subprocess.PIPE, **options
    )


def test_a_reader_that_goes_away() -> None:
    read, write = os.pipe()
    os.close(read)
    for words in (["methods"], ["methods", "--json"], ["--help"]):
        done = run(*words, stdout=write)
        assert done.returncode in (1, 141), words
        assert done.stderr == ""
    os.close(write)


def test_a_full_disk_behind_stdout() -> None:
    for words in (["methods"], ["methods", "--json"]):
        with Path("/dev/full").open("w") as full:
            done = run(*words, stdout=full)
        assert done.returncode == 5
        assert done.stderr == "error No space left on device\n"


def test_a_log_on_a_full_disk_ends_no_work(small: Path) -> None:
    program = (
        PREPARED
        + "import laconic.show.inspect as i; from laconic.command.output import note; read = i.inspect_directory\n"
    )
    program += "i.inspect_directory = lambda *a, **k: note('x' * 9999) or read(*a, **k)\nmain()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "inspect", str(small), "--json"],
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
        )
    assert json.loads(done.stdout)["weights"]
    assert done.returncode == 0


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run("inspect", "nothing", stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "error the working directory is gone: No such file or directory\n"


def test_a_terminal_that_knows_ascii_only(tmp_path: Path, small: Path) -> None:
    (tmp_path / "mødel").symlink_to(small)
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = run("inspect", tmp_path / "mødel", env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_our_own_error_asks_to_be_reported(small: Path) -> None:
    broken = PREPARED + "import laconic.show.inspect as i; i.read_header = 3; main()"
    done = run("inspect", small, program=broken, stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "please report" in done.stderr.splitlines()[-1]


STARTING = (
    PREPARED
    + """
import os, signal, threading, time

number = int(sys.argv.pop())

def interrupt():
    while "numpy" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), number)

threading.Thread(target=interrupt, daemon=True).start()
main()
"""
)


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted; nothing was begun"), (signal.SIGTERM, "told to end; nothing was begun")],
)
def test_a_signal_while_pytorch_is_imported(number: signal.Signals, said: str) -> None:
    done = run("inspect", "nothing", int(number), program=STARTING, stdout=subprocess.PIPE)
    assert done.returncode == 128 + number
    assert done.stderr.splitlines() == [said]


WAITING = """
import time
from pathlib import Path
try:
    Path("witness").touch()
    time.sleep(60)
finally:
    time.sleep(0.2)
"""


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["term", "twice"])
def test_a_signal_while_a_plan_runs(
    numbers: list[signal.Signals], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.py").write_text(WAITING)
    words = [sys.executable, "-c", PREPARED + "main()", *PLAN]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - a background job ignores it
    )  # fmt: skip
    while not (tmp_path / "witness").exists() and process.poll() is None:
        time.sleep(0.02)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + numbers[0], stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert "--resume" in stderr
    assert json.loads(stdout)["error"]["exit_code"] == process.returncode


WORKER = """
import multiprocessing, signal, time
from laconic.command.signals import hold_signals, release_signals

def work(pipe):
    pipe.send("here")
    time.sleep(60)

hold_signals()
release_signals()
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
worker = context.Process(target=work, args=(theirs,))
worker.start()
ours.recv()
worker.terminate()
worker.join()
print(worker.exitcode)
"""


def test_a_worker_is_ended_without_a_word() -> None:
    done = run(program=WORKER, stdout=subprocess.PIPE)
    assert done.stdout == f"{-signal.SIGTERM}\n"
    assert done.stderr == ""


WAITS = """
import os, sys
from laconic.host.threads import wait_asleep
wait_asleep()
print({name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")})
assert "torch" not in sys.modules
"""


def test_threads_wait_asleep_unless_the_user_says_otherwise() -> None:
    bare = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "7"}, None)):
        done = run(program=WAITS, env=bare | given, stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert f"'OMP_WAIT_POLICY': {policy!r}" in done.stdout
    library = "import os, laconic; laconic.parse('RTN'); print(os.environ.get('OMP_WAIT_POLICY'))"
    assert run(program=library, env=bare, stdout=subprocess.PIPE).stdout == "None\n", (
        "a library does not change a program's environment"
    )


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("50000 100000", 1),
        ("350000 100000", 3),
        ("", None),
        ("a b", None),
        ("1 0", None),
    ],
)
def test_the_cores_of_a_container(content: str, cores: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert quota(str(tmp_path / "cpu.max")) == cores
    assert quota(str(tmp_path / "none")) is None
