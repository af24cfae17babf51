"""What is loaded when: names on first use, the reader of transformers in either order of imports, commands that need no PyTorch."""

import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import laconic as lc
import laconic.api
from laconic.command.listing import list_methods
from laconic.scheme.text import vocabulary
from laconic.version import __version__
from laconic.weights.blocks import Blocks


def fresh(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A program in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=False
    )


LIGHT = """
import sys
import laconic, laconic.command.cli, laconic.command.listing
laconic.command.listing.list_methods()
print(sorted(name for name in ("torch", "transformers", "numpy", "matplotlib", "safetensors") if name in sys.modules))
print(laconic.__version__)
"""


def test_the_command_and_the_list_of_methods_load_nothing_heavy() -> None:
    done = fresh(LIGHT)
    assert done.stdout.splitlines() == ["[]", __version__], done.stderr


def test_help_methods_and_version_load_nothing_heavy() -> None:
    """Every way to ask for help, in one process: what one of them loads, the list at the end holds."""
    program = """
import sys
from laconic.command.cli import app
names = ["compress", "evaluate", "inspect", "fold", "methods", "demo", "search", "recover"]
helps = [[name, flag] for name in names for flag in ("-h", "--help")]
for words in (["--help"], ["-h"], ["--version"], ["methods"], ["methods", "--json"], [], *helps):
    code = None
    try:
        app(words)
    except SystemExit as end:
        code = end.code
    assert code == 0, words
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
"""
    done = fresh(program)
    assert done.returncode == 0, done.stderr
    assert f"laconic {__version__}" in done.stdout.splitlines()


def test_every_public_name_is_there_however_it_is_reached() -> None:
    for name in laconic.api.__all__:
        assert getattr(lc, name) is getattr(laconic.api, name)
    for name, method in vocabulary().items():
        assert getattr(lc, name) is method
    assert {*laconic.api.__all__, *vocabulary(), "__version__"} <= set(dir(lc))
    names: dict[str, object] = {}
    exec("from laconic import *", names)
    assert set(laconic.api.__all__) <= set(names)
    assert lc.pipeline.compress is lc.compress, "modules are attributes of the package"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lc.nonsense  # type: ignore[attr-defined]


CLASHES = """
import sys
import laconic.disk.load, laconic.search, laconic.recover
import laconic as lc
from laconic import load, recover, search
print([callable(f) for f in (lc.load, lc.search, lc.recover, load, search, recover)])
import laconic.disk.load, laconic.search, laconic.recover
print([callable(f) for f in (lc.load, lc.search, lc.recover)])
"""


def test_a_function_is_not_replaced_by_the_module_of_its_name() -> None:
    done = fresh(CLASHES)
    assert done.stdout.splitlines() == [str([True] * 6), str([True] * 3)], done.stderr
    modules = {file.stem for file in Path(lc.__file__).parent.iterdir()}
    assert modules & set(laconic.api.__all__) == lc._FUNCTIONS, "the functions that are called as a module is"


READ = """
import json, sys
if sys.argv[2] == "laconic first":
    import laconic
from transformers import AutoModelForCausalLM
if sys.argv[2] == "transformers first":
    import laconic
if sys.argv[2] == "transformers used":
    AutoModelForCausalLM.from_pretrained(sys.argv[3])
    import laconic
assert "laconic.scheme.text" not in sys.modules, "nothing but the reader"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps({name: p.double().sum().item() for name, p in model.named_parameters()}))
"""


def test_transformers_reads_a_directory_after_import_laconic_in_either_order(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    lc.compress(tiny, lc.RTN(4, 32), str(text), out=tmp_path / "small", samples=4, length=32, evaluate=False)
    expected = {name: p.double().sum().item() for name, p in lc.load(tmp_path / "small").named_parameters()}
    for order in ("laconic first", "transformers first", "transformers used"):
        done = fresh(READ, tmp_path / "small", order, tiny)
        assert done.returncode == 0, (order, done.stderr)
        assert json.loads(done.stdout.splitlines()[-1]) == expected, order


def test_methods_as_they_are_listed_are_the_classes() -> None:
    """Names, first sentences, and of every argument its name, its type and its default: read from the text, equal to the signature."""
    listed = list_methods()
    assert list(listed) == list(vocabulary())
    for name, cls in vocabulary().items():
        does = listed[name]["does"]
        assert " ".join((cls.__doc__ or "").split()).startswith(does)
        assert does.endswith(".")
        known = {**vars(typing), **vars(sys.modules[cls.__module__]), "Blocks": Blocks, "Method": lc.Method}
        parameters = inspect.signature(cls).parameters.values()
        for argument, parameter in zip(listed[name]["arguments"], parameters, strict=True):
            written, _, rest = argument.partition(": ")
            kind, _, default = rest.partition(" = ")
            assert written == parameter.name
            assert eval(kind, known) == parameter.annotation, argument
            assert (eval(default, known) if default else inspect.Parameter.empty) == parameter.default, argument
