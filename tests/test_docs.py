"""The documentation is held to the code: pages, tables, options, links, and every example."""

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import laconic as lc
from laconic import errors
from laconic.command.cli import app
from laconic.scheme.text import parse, vocabulary
from laconic.search import SearchOptions
from laconic.weights import Weight
from tests.conftest import make_site
from tests.needs import extra

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("README.md")])
METHOD_PAGES = sorted((DOCS / "methods").glob("*.md"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row that starts with something in backquotes; other rows are heads and prose."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]


def section(page: Path, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.S | re.M)
    assert found is not None, f"{name_of(page)} has no section {title!r}"
    return found.group(2)


def anchor(title: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-")


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    assert {page.stem for page in METHOD_PAGES} == {name.lower() for name in vocabulary()}
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"[{name}](methods/{name.lower()}.md)" in index for name in vocabulary())


@pytest.mark.parametrize("name", vocabulary())
def test_the_argument_table_is_the_signature(name: str) -> None:
    table = {row[0].strip("`"): row[1] for row in rows(section(DOCS / "methods" / f"{name.lower()}.md", "Arguments"))}
    signature = {
        parameter.name: "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        for parameter in inspect.signature(vocabulary()[name]).parameters.values()
    }
    assert table == signature


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_sections_of_the_others(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for title in ("What it computes", "Arguments", "Statistics and cost", "When to use it", "Examples"):
        assert f"\n## {title}\n" in text
    for words in ("what is stored", "## decoding", "## traps"):
        assert words in text.lower()
    assert blocks(page, "bash")
    assert blocks(page, "python")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_with_its_default(command: str) -> None:
    described = {
        row[0].strip("`"): row[1]
        for row in rows(section(DOCS / "command-line.md", f"laconic {command}"))
        if row[0].startswith("`--")
    }
    options = [p for p in COMMANDS[command].params if p.opts[0].startswith("--") and p.name != "help"]
    assert set(described) == {p.opts[0] for p in options}
    for option in options:
        default = described[option.opts[0]].strip("`")
        if isinstance(option.default, bool):
            assert default == "off"
        elif option.default is not None:
            assert default == str(option.default)
    from laconic.command.compress import DEFAULT_SCHEME

    assert command != "compress" or described["--scheme"] == f"`{DEFAULT_SCHEME}`"


def test_the_exit_codes_are_those_of_the_errors() -> None:
    text = section(DOCS / "command-line.md", "Exit codes")
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        line = next(line for line in text.splitlines() if line.startswith(f"| {cls.exit_code} |"))
        assert f"`{name}`" in line


def test_the_options_table_is_the_dataclass() -> None:
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(section(DOCS / "python.md", "A model directory"))}
    assert table == {field.name: repr(field.default) for field in fields(lc.Options)}


def test_the_table_of_search_options_is_the_dataclass() -> None:
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(section(DOCS / "python.md", "Searching"))}
    assert table == {field.name: repr(field.default) for field in fields(SearchOptions)}


def test_every_kind_of_weight_and_every_file_at_the_root_is_in_the_architecture() -> None:
    page = DOCS / "architecture.md"
    kinds, todo = set(), [Weight]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if not inspect.isabstract(cls) and cls.__module__.startswith("laconic."):
            kinds.add(cls.kind)
    assert {row[0].strip("`") for row in rows(section(page, "On disk"))} >= kinds
    text = page.read_text(encoding="utf-8")
    files = {file.name for file in (ROOT / "laconic").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in files if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if fragment and file.suffix == ".md":
            assert fragment in {
                anchor(title) for title in re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            }, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_can_be_read(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)
    for text in blocks(page, "json"):
        json.loads(text)
    for script in blocks(page, "bash"):
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["laconic"] and len(words) > 1 and not words[1].startswith("-"):
                known = {option for p in COMMANDS[words[1]].params for option in p.opts}
                assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line
                if "--scheme" in words:
                    parse(words[words.index("--scheme") + 1])


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_examples_of_methods_run(page: Path) -> None:
    with torch.random.fork_rng():
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), {})


def test_the_python_page_runs_from_top_to_bottom(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").symlink_to(tiny, target_is_directory=True)
    (tmp_path / "books.txt").symlink_to(text)
    monkeypatch.chdir(tmp_path)
    page = DOCS / "python.md"
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), names)


def test_the_condensa_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but its task file, which needs a download; that one defines what the command asks for."""
    for package in ("optuna", "sklearn", "torch_pruning"):
        extra(package)
    monkeypatch.chdir(tmp_path)
    page = DOCS / "condensa.md"
    (task,) = (code for code in blocks(page, "python") if code.startswith("# resnet.py"))
    assigned = {
        target.id
        for node in ast.parse(task).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {"model", "train", "validation", "test"} <= assigned
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for code in blocks(page, "python"):
            if code != task:
                exec(compile(code, page.name, "exec"), names)


def test_the_template_of_a_method_works() -> None:
    names: dict[str, Any] = {"__name__": "template"}
    (template,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    exec(compile(template, "CONTRIBUTING.md", "exec"), names)
    method, site = names["Dithered"](bits=6), make_site()
    weight = method(site)
    assert weight.bits() == method.expected_bits((48, 64))
    assert (weight() - site.W).norm() < 0.2 * site.W.norm()


def test_tables_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
