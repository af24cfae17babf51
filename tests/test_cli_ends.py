"""A new user's mistakes: whatever is given to a command, it ends with its exit code and one line, and never with a traceback."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.command.console import Terminal
from laconic.command.ends import Ended, end_of
from laconic.command.shown import shown
from laconic.errors import LaconicError
from laconic.host.told import PlannedSite, Preflight, SiteRecord
from tests.conftest import TEXT, tiny_config

DEEP = b"[" * 100_000 + b"]" * 100_000
NO_FILE_FOR_READING = Path("/proc/self/mem")  # opens, and answers the first read with an input/output error
TASK = """import torch
from torch import nn

def data(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g))]

model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
train, validation, test = data(1), data(2), data(3)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder as a user has it: a model of one block, what laconic made of it, a text, a task."""
    folder = tmp_path_factory.mktemp("desk")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(f"{TEXT}\n" * 40)
    (folder / "task.py").write_text(TASK)
    lc.compress(
        folder / "model",
        lc.RTN(4, 32),
        str(folder / "text.txt"),
        out=folder / "small",
        samples=4,
        length=32,
        evaluate=False,
    )
    return folder


@pytest.fixture
def here(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with the desk's things in it; they are links, so nobody may write through them."""
    for thing in desk.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def laconic(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ends(result: Result, code: int, said: str = "") -> str:
    """Asserts that a command ended as it should, `--json` given: its code, one line on stderr, the same as JSON on stdout. The line."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 550
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == code
    assert lines[0] == f"error {shown(error['message'])}"
    assert said in error["message"], error["message"]
    return lines[0]


def compress(
    *more: object, data: object = "text.txt", scheme: str = "RTN(4, 32)", source: object = "model"
) -> list[object]:
    chosen = ["--scheme", scheme] if scheme else []
    return [
        "compress",
        source,
        *chosen,
        "--data",
        data,
        "--samples",
        4,
        "--length",
        32,
        "--test-tokens",
        256,
        "--out",
        "out",
        "--json",
        *more,
    ]


def put(file: Path, content: Any) -> None:
    """A file's content: bytes, changes to its JSON, a folder, nothing at all, or a link to another file."""
    text = file.read_bytes() if file.is_file() else b""
    file.unlink(missing_ok=True)
    if isinstance(content, dict):
        file.write_text(json.dumps(json.loads(text) | content))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "folder":
        file.mkdir()
    elif isinstance(content, Path):
        file.symlink_to(content)


UNREADABLE: dict[str, Any] = {
    "a list": b"[1]", "a number": b"3", "binary": bytes(range(256)), "empty": b"", "deep": DEEP, "a folder": "folder", "absent": None,
    "another encoding": "{}".encode("utf-16"), "a disk error": NO_FILE_FOR_READING,
}  # fmt: skip
BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "a word for a number": {"hidden_size": "many"}, "null": {"hidden_size": None}, "a list for a number": {"num_hidden_layers": [1]},
    "no heads": {"num_attention_heads": 0}, "a negative size": {"hidden_size": -64}, "a size beyond all memory": {"hidden_size": 10**12},
    "an unknown kind": {"model_type": "no_such"}, "a kind that is a list": {"model_type": ["llama"]},
    "a class that is a number": {"architectures": 3},
    "a class that is none": {"architectures": ["pipeline"]}, "code of its own, misspelt": {"auto_map": ["a.py"]},
    "a quantization that is a number": {"quantization_config": 3}, "an unknown rope": {"rope_parameters": {"rope_type": "x"}},
    "an unknown type": {"dtype": "float99"}, "an unknown activation": {"hidden_act": "nope"}, "more layers than are stored": {"num_hidden_layers": 2},
}  # fmt: skip
BAD_MODELS: dict[str, tuple[str, Any]] = {
    **{
        f"config {name}": ("config.json", content) for name, content in UNREADABLE.items() if name != "another encoding"
    },
    **{f"config with {name}": ("config.json", change) for name, change in BAD_CONFIGS.items()},
    **{
        f"weights {name}": ("model.safetensors", content)
        for name, content in UNREADABLE.items()
        if name not in ("a list", "a disk error")
    },
    **{
        f"tokenizer {name}": ("tokenizer.json", UNREADABLE[name])
        for name in ("a list", "binary", "empty", "deep", "a folder")
    },
    **{
        f"tokenizer config {name}": ("tokenizer_config.json", UNREADABLE[name]) for name in ("a list", "binary", "deep")
    },
    "a tokenizer of a class that is a number": ("tokenizer_config.json", {"tokenizer_class": 7}),
    "a tokenizer that fails in use": ("tokenizer_config.json", {"model_max_length": "x"}),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_read(case: str, here: Path) -> None:
    name, content = BAD_MODELS[case]
    shutil.copytree("model", "broken")
    put(here / "broken" / name, content)
    ends(laconic(*compress(source="broken")), 3)
    assert not (here / "out").exists()


BAD_STORED = {
    **{f"manifest {name}": ("laconic.json", content) for name, content in UNREADABLE.items()},
    "manifest without specs": ("laconic.json", {"specs": {"a": 1}}), "manifest of another kind": ("laconic.json", {"weights": 3}),
    "manifest of a newer version": ("laconic.json", {"schema": 99}),
    **{f"weights {name}": ("model.safetensors", content) for name, content in UNREADABLE.items() if name not in ("a list", "a disk error")},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STORED)
@pytest.mark.parametrize("command", ["inspect", "evaluate", "fold"])
def test_a_compressed_directory_that_cannot_be_read(command: str, case: str, here: Path) -> None:
    name, content = BAD_STORED[case]
    shutil.copytree("small", "broken")
    put(here / "broken" / name, content)
    more = {"inspect": [], "evaluate": ["--data", "text.txt"], "fold": ["out"]}[command]
    ends(laconic(command, "broken", *more, "--json"), 3)
    assert not (here / "out").exists()


PLANS: dict[str, tuple[str | bytes, int, str]] = {
    "unfinished": ("scheme = (\n", 2, "plan.py, line 1: SyntaxError"),
    "raises": ("\n\ndef f():\n    raise KeyError('abc')\n\nscheme = f()\n", 2, "plan.py, line 4: KeyError: 'abc'"),
    "raises in a library": ("import json\n\nscheme = json.loads('{')\n", 2, "plan.py, line 3: JSONDecodeError"),
    "exits": ("import sys\nsys.exit(3)\n", 2, "plan.py, line 2: it ended the program: sys.exit(3)"),
    "imports what is not there": (
        "import no_such_module\n",
        2,
        "plan.py, line 1: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "has no scheme": ("x = 1\n", 2, "plan.py: expected a variable named 'scheme'"),
    "has a class": ("import laconic as lc\nscheme = lc.RTN\n", 2, "write RTN(...)"),
    "has a text": ("scheme = 'RTN(4)'\n", 2, "give that to --scheme"),
    "has a number": ("scheme = 3\n", 2, "got a int"),
    "has an unknown method": ("import laconic as lc\nscheme = lc.GPTG(3)\n", 2, "plan.py, line 2: AttributeError"),
    "has a bad method": ("import laconic as lc\n\nscheme = lc.Magnitude(sparsity=7)\n", 2, "plan.py, line 3"),
    "is binary": (bytes(range(256)), 2, "plan.py"),
    "is deep": ("scheme = " + "(" * 3000 + "1" + ")" * 3000, 2, "plan.py"),
    "never ends": ("def f():\n    return f()\nf()\n", 2, "plan.py, line 2: RecursionError"),
    "says much": ("raise ValueError('x' * 100_000)\n", 2, "plan.py, line 1: ValueError"),
    "hides": ("raise ValueError('\\x1b[2J\\u202egood\\n\\nerror no')\n", 2, "plan.py, line 1: ValueError"),
    "has a function that raises": (
        "def scheme(site):\n    return {}[site.name]\n",
        2,
        "plan.py, line 2: KeyError: 'model.",
    ),
    "has a condition that raises": (
        "import laconic as lc\nscheme = [(lambda s: s.nope, lc.RTN(4, 32)), ('*', lc.Keep())]\n",
        2,
        "plan.py, line 2",
    ),
    "has a function without a result": ("def scheme(site):\n    return None\n", 2, "should return a method"),
    "has a function that takes nothing": (
        "def scheme():\n    return None\n",
        2,
        "scheme() takes 0 positional arguments",
    ),
    "has a rule that is none": ("scheme = [3]\n", 2, "a rule is a pair"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_file_with_an_error(case: str, here: Path) -> None:
    text, code, said = PLANS[case]
    (here / "plan.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    ends(laconic(*compress("--plan", "plan.py", scheme="")), code, said)
    assert not (here / "out").exists()


TASKS: dict[str, tuple[str, str, str]] = {
    "unfinished": ("model =", "model = (", "line 8: SyntaxError"), "raises": ("train, v", "1 / 0\ntrain, v", "line 9: ZeroDivisionError"),
    "exits": ("train, v", "raise SystemExit(2)\ntrain, v", "sys.exit(2)"),
    "imports what is not there": ("import torch\n", "import torchh\n", "line 1"),
    "has no model": ("model =", "net =", "no variable 'model'"),
    "has a model that is a text": ("model = ", "model = 'm'\nnet = ", "a model that is a str"),
    "has a loss that is a number": ("train, v", "loss = 3\ntrain, v", "expected a function loss(output, batch)"),
    "has a loss of one argument": ("train, v", "def loss(output):\n    return output.sum()\ntrain, v", "this one takes (output)"),
    "has a loss that raises": ("train, v", "def loss(output, batch):\n    return output.nope\ntrain, v", "line 10: AttributeError"),
    "has a loss that is no loss": ("train, v", "def loss(output, batch):\n    return 'x'\ntrain, v", "task.py"),
    "has a score that raises": ("train, v", "def score(output, batch):\n    return 1 / 0\ntrain, v", "line 10: ZeroDivisionError"),
    "has a model that does not fit": ("nn.Linear(16, 3)", "nn.Linear(15, 3)", "mat1 and mat2"),
    "has data that is a number": ("data(1), data(2)", "3, data(2)", "train should be batches"),
    "has data for once": ("data(1), data(2)", "(x for x in data(1)), data(2)", "train should be batches"),
    "has no data": ("data(1), data(2)", "data(1), []", "expected batches"),
    "has words as data": ("data(1), data(2)", "['a'], ['b']", "must be Tensor"),
    "has a model of its own that raises": ("nn.ReLU()", "type('M', (nn.Module,), {'forward': lambda s, x: x.nope})()", "line 8: AttributeError"),
}  # fmt: skip
SEARCHED = "RTN(bits=Free(2, 8, integer=True), group='channel')"


@pytest.mark.parametrize("case", TASKS)
@pytest.mark.parametrize("command", ["search", "recover"])
def test_a_task_file_with_an_error(command: str, case: str, here: Path) -> None:
    before, after, said = TASKS[case]
    file = here / "own-task.py"
    assert before in TASK
    file.write_text(TASK.replace(before, after))
    scheme = SEARCHED if command == "search" else "RTN(4, 'channel')"
    line = ends(laconic(command, "--task", file.name, "--scheme", scheme, "--out", "out", "--json"), 4, said)
    assert "own-task.py" in line
    assert not (here / "out").exists()


COMPRESS: dict[str, tuple[int, str, list[object]]] = {
    "no such model": (3, "none", compress(source="none")),
    "a file as model": (3, "text.txt", compress(source="text.txt")),
    "a model without a name": (3, "config.json", compress(source="")),
    "a name too long": (1, "File name too long", compress(source="x" * 9000)),
    "a name with colours": (3, "\x1b[31m", compress(source="\x1b[31m[bold]a\u202eb[/bold]\\")),
    "a name with NUL": (2, "NUL", compress(source="a\0b")),
    "a name that is no text": (2, "UTF-8", compress(source="a\udcffb")),
    "an output that is no text": (2, "UTF-8", compress("--out", "a\udcffb")),
    "no such data": (4, "nope", compress(data="nope")),
    "binary data": (4, "binary.txt", compress(data="binary.txt")),
    "a folder without text": (4, "model", compress(data="model")),
    "a short text": (4, "short.txt", compress(data="short.txt")),
    "an empty text": (4, "empty.txt", compress(data="empty.txt")),
    "an empty scheme": (2, "scheme ''", compress("--scheme", "", scheme="")),
    "half a scheme": (2, "never closed", compress(scheme="RTN(")),
    "a deep scheme": (2, "scheme", compress(scheme="(" * 5000 + "RTN" + ")" * 5000)),
    "a long scheme": (2, "scheme", compress(scheme=f"RTN({'4' * 20_000})")),
    "a program as scheme": (2, "only methods can be called", compress(scheme="lambda site: 3")),
    "a scheme of another tool": (2, "W4A16", compress(scheme="W4A16")),
    "a scheme in small letters": (2, "gptq", compress(scheme="gptq")),
    "a scheme with an escape": (2, "scheme", compress(scheme="RTN(\x1b[31m)")),
    "a folder as plan": (2, "it is a folder", compress("--plan", "model", scheme="")),
    "a plan that is not there": (2, "no such plan file", compress("--plan", "plan.py", scheme="")),
    "no such device": (2, "abacus", compress("--device", "abacus")),
    "a device without values": (2, "meta", compress("--device", "meta")),
    "an unknown precision": (2, "float64", compress("--dtype", "float64")),
    "an option misspelt": (2, "did you mean '--scheme'?", compress("--shceme", "RTN")),
    "a method's argument as option": (2, "--scheme 'GPTQ(rate=3)'", compress("--rate", "3")),
    "no windows": (2, "--samples", compress("--samples", "0")),
    "a word for a number": (2, "--samples", compress("--samples", "many")),
    "an option without its value": (2, "--test", compress("--test")),
    "a word too many": (2, "RTN", compress("RTN")),
}


@pytest.mark.parametrize("case", COMPRESS)
def test_compress_is_told_what_it_cannot_do(case: str, here: Path) -> None:
    code, said, words = COMPRESS[case]
    (here / "binary.txt").write_bytes(bytes(range(256)) * 9)
    (here / "short.txt").write_text("hi")
    (here / "empty.txt").touch()
    ends(laconic(*words), code, said)
    assert not (here / "out").exists()


OTHERS: dict[str, tuple[int, str, list[object]]] = {
    "a command misspelt": (2, "did you mean 'compress'?", ["compres", "model"]),
    "a model as command": (2, "no command 'model'", ["model"]),
    "an option before the command": (2, "--nope", ["--nope"]),
    "a word too many": (2, "x", ["methods", "x"]),
    "nothing to measure": (2, "nothing to measure", ["evaluate", "model"]),
    "no model to measure": (3, "none", ["evaluate", "none", "--data", "text.txt"]),
    "no reference": (3, "none", ["evaluate", "small", "--data", "text.txt", "--reference", "none"]),
    "no text to measure on": (4, "nope", ["evaluate", "small", "--data", "nope"]),
    "an original to inspect": (3, "laconic.json", ["inspect", "model"]),
    "a file to inspect": (3, "text.txt", ["inspect", "text.txt"]),
    "a name too long to inspect": (1, "File name too long", ["inspect", "x" * 9000]),
    "a title to inspect": (3, "laconic.json", ["inspect", "\x1b]0;title\x07"]),
    "an original to fold": (3, "laconic.json", ["fold", "model", "out"]),
    "nothing to fold": (7, "nothing to fold", ["fold", "small", "out"]),
    "a tolerance below 0": (2, "--tolerance", ["fold", "small", "out", "--tolerance", "-1"]),
    "too few windows": (2, "--samples", ["demo", "--samples", "2"]),
    "a search of nothing": (2, "--scheme", ["search"]),
    "a search without data": (2, "--data", ["search", "model", "--scheme", SEARCHED]),
    "a search of two": (2, "one of them", ["search", "model", "--task", "task.py", "--scheme", SEARCHED]),
    "a search of what is not there": (4, "no such task file", ["search", "--task", "nope.py", "--scheme", SEARCHED]),
    "a folder as task": (4, "it is a folder", ["search", "--task", "model", "--scheme", SEARCHED]),
    "nothing left to search": (
        8,
        "nothing to search",
        ["search", "--task", "task.py", "--scheme", "RTN(4, 'channel')", "--out", "out"],
    ),
    "an unknown goal": (
        8,
        "nonsense",
        ["search", "--task", "task.py", "--scheme", SEARCHED, "--objective", "nonsense", "--out", "out"],
    ),
    "an unknown sampler": (
        8,
        "sampler",
        ["search", "--task", "task.py", "--scheme", SEARCHED, "--sampler", "x", "--out", "out"],
    ),
    "no database": (
        8,
        "nodb://x",
        ["search", "--task", "task.py", "--scheme", SEARCHED, "--storage", "nodb://x", "--out", "out"],
    ),
    "a text as database": (
        8,
        "text.txt",
        ["search", "--task", "task.py", "--scheme", SEARCHED, "--storage", "text.txt", "--out", "out"],
    ),
    "a recovery misspelt": (
        2,
        "did you mean 'LC'?",
        ["recover", "--task", "task.py", "--scheme", "RTN", "--recovery", "LD(3)"],
    ),
    "an unknown recipe": (2, "unknown method 'nope'", ["recover", "model", "--method", "nope", "--data", "text.txt"]),
    "bits of no recipe": (2, "--bits", ["recover", "model", "--bits", "3", "--scheme", "RTN", "--data", "text.txt"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_are_told_what_they_cannot_do(case: str, here: Path) -> None:
    code, said, words = OTHERS[case]
    ends(laconic(*words, "--json"), code, said)
    assert not (here / "out").exists()


OUTPUTS = {
    "a file": "text.txt",
    "below a file": "text.txt/x",
    "far below a file": "text.txt/x/y",
    "where nothing can be": "/proc/nope/out",
    "too long": "y" * 300,
}


@pytest.mark.parametrize("where", OUTPUTS)
@pytest.mark.parametrize("command", ["compress", "recover", "search", "demo"])
def test_an_output_that_cannot_be(command: str, where: str, here: Path) -> None:
    words = {
        "compress": compress(), "demo": ["demo", "--samples", "8", "--json"],
        "recover": ["recover", "--task", "task.py", "--scheme", "RTN(4, 'channel')", "--json"],
        "search": ["search", "--task", "task.py", "--scheme", SEARCHED, "--json"],
    }[command]  # fmt: skip
    before = (here / "text.txt").read_bytes()
    result = laconic(*words, "--out", OUTPUTS[where])
    ends(result, result.exit_code)
    assert result.exit_code in (1, 5)
    assert (here / "text.txt").read_bytes() == before


def test_no_more_files_can_be_opened(here: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for words in (["inspect", "small", "--json"], compress(), ["evaluate", "small", "--data", "text.txt", "--json"]):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            result = laconic(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        ends(result, result.exit_code, "Too many open files")


def test_an_error_of_our_own_is_no_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not on the list stays an exception."""
    monkeypatch.setattr("laconic.show.inspect.MANIFEST", 3)
    monkeypatch.setattr("laconic.show.inspect.INDEX", [])
    monkeypatch.setattr("laconic.show.inspect.read_header", 3)
    result = laconic("inspect", "small", "--json")
    assert isinstance(result.exception, TypeError)


def test_the_list_of_ends() -> None:
    with pytest.raises(RuntimeError) as lack:
        torch.empty(1 << 60)
    for error, code, said in (
        (lack.value, 1, "not enough memory"), (MemoryError(), 1, "--samples"), (torch.OutOfMemoryError("CUDA out of memory"), 1, "not enough memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), 1, "the device failed"), (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (PermissionError(13, "Permission denied", "a/b"), 1, "a/b: Permission denied"), (OSError(28, "No space left on device"), 5, "No space"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 1, "invalid"),
        (RecursionError(), 1, "nested"), (KeyboardInterrupt(), 130, "interrupted"),
        (LaconicError("a"), 1, "a"),
    ):  # fmt: skip
        end = end_of(error)
        assert end is not None
        assert end.code == code
        assert said in end.message
        assert end_of(Ended(end)) is end
    for error in (
        TypeError("x"),
        ValueError("x"),
        KeyError("x"),
        RuntimeError("shapes"),
        AssertionError(),
        ImportError("x"),
    ):
        assert end_of(error) is None, error


@pytest.mark.parametrize(
    ("text", "seen"),
    [("plain [bold] :smile: ä 漢", "plain [bold] :smile: ä 漢"), ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"), ("a\n  b\r\nc", "a b c"),
     ("gpj.\u202eexe", r"gpj.\u202eexe"), ("a\udcffb", r"a\udcffb"), ("tab\there", r"tab\there"), ("\x9b31m\x00", r"\x9b31m\x00"),
     ("x" * 1000, "x" * 500 + "... (500 more)"), ("\ufeffbom", r"\ufeffbom"), (Path("a") / "b", "a/b"), (7, "7")],
)  # fmt: skip
def test_text_from_outside_is_shown_on_one_line_with_nothing_hidden(text: object, seen: str) -> None:
    assert shown(text) == seen


def test_names_are_drawn_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """In the lines of a run, its plan and its bar."""
    name = "[red]\x1b[2Ja\u202e:smile:[/red]\\"
    seen = "[red]\\x1b[2Ja\\u202e:smile:[/red]\\"
    terminal = Terminal()
    terminal.console = Console(stderr=True, width=200, emoji=False, highlight=False)
    record = SiteRecord(name, [name], name, [3, 3], "body", name, name, 27, 3.0, 0.1, 0.1, 0, [name], seconds=1.0)
    site = PlannedSite(name, [name], [3, 3], name, "body", 3.0, 1.0, 2.0, False, "")
    found = {
        "parameters": 9,
        "compressed": 8,
        "kept": {},
        "vectors": 1,
        "untreated": [{"name": name, "reason": "raw", "entries": 1}],
    }
    terminal.plan(Preflight([site], 1, 2, 3, 4.0, {}, [name], found))
    terminal.start(name, 1)
    terminal.advance(1, name)
    terminal.site(record)
    terminal.say(name)
    drawn = capsys.readouterr().err
    assert drawn.count(seen) == 8, drawn
    assert "\x1b" not in drawn
