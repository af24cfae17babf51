"""The report: one page that needs nothing else, with the figures of its JSON, and no way in for hostile text."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import laconic as lc
from laconic.disk.store import stored_bytes
from laconic.engine.report import by_class
from laconic.host.units import human_bytes
from laconic.show.page import render
from tests.processes import PATIENCE

FIELDS = (
    "source",
    "scheme",
    "command",
    "note",
    "data",
    "metrics data",
    "name",
    "alias",
    "method",
    "kind",
    "site note",
    "speaker",
    "sample",
)


def hostile(field: str) -> str:
    """Text that would rename the page, break out of a comment, a cell or a sample, or be computed by a template, if it were let."""
    return f"--></pre></td><script>document['title'] = 'taken'</script><img src=x onerror=\"document['title'] = 'taken'\"> & {{{{ 7 }}}} {field}"


class Page(HTMLParser):
    """Every tag with its attributes, every table row as its cells' text, and all text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self._cell = False
        self._style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data
        if not self._style:
            self.text.append(data)

    def row(self, first: str) -> list[str]:
        """The one row that begins with `first`."""
        (found,) = [row for table in self.tables for row in table if row[0] == first]
        return found

    def table(self, column: str) -> list[list[str]]:
        """The rows of the one table that has a column of that name."""
        (found,) = [table for table in self.tables if column in table[0]]
        return found[1:]


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "model"
    lc.compress(
        tiny, "[('lm_head', RTN(8, 32)), ('*.v_proj', SpQR(bits=3)), ('*', RTN(4, 32) + LowRank(2))]", data=str(text), out=out, samples=8,
        length=32, test_tokens=512,
    )  # fmt: skip
    return out


def hostile_report(made: Path) -> lc.Report:
    """The report of `made`, as if everything a stranger can choose had been chosen to hurt."""
    values: dict[str, Any] = json.loads((made / "report.json").read_text())
    values |= {name: hostile(name) for name in ("source", "scheme", "command")} | {"notes": [hostile("note")]}
    values["samples"] = [{"model": hostile("speaker"), "text": hostile("sample")}]
    values["data"]["source"], values["metrics"]["data"] = hostile("data"), hostile("metrics data")
    site = {name: hostile(name) for name in ("name", "method", "kind")} | {
        "aliases": [hostile("alias")],
        "notes": [hostile("site note")],
    }
    values["sites"][0] |= site | {"error": 1e9}  # the worst, so that it is shown twice
    values["sites"][1] |= {
        "name": "model.layers.0.$\\fracture{$",
        "error": 0.0,
    }  # mathematics that a plot must not typeset
    return lc.Report(values)


def test_the_page_needs_nothing_else(made: Path) -> None:
    html = (made / "report.html").read_text()
    page = Page(html)
    loading = ("src", "href", "xlink:href", "data", "poster", "srcset", "action", "background")
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in loading or str(value).startswith("#"), (tag, name, value)
    assert re.findall(r"url\((?!#)[^)]*\)", html) == []
    assert "@import" not in html
    assert {"table", "svg", "style"} <= {tag for tag, _ in page.tags}
    assert set(re.findall(r"https?://[\w./-]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }, "names, never fetched"


def test_the_page_shows_the_figures_of_the_json(made: Path) -> None:
    values = json.loads((made / "report.json").read_text())
    page, m = Page((made / "report.html").read_text()), values["metrics"]
    size = [human_bytes(values["original_bytes"]), human_bytes(stored_bytes(made))]
    assert page.row("files of weights")[1:3] == size
    bits = page.row(f"bits per weight, all {values['parameters']:,} parameters")
    assert bits[1:3] == [
        f"{8 * values['original_bytes'] / values['parameters']:.3f}",
        f"{values['bits_per_weight']:.3f}",
    ]
    assert page.row(f"perplexity on {m['data']}")[1:3] == [f"{m['reference_perplexity']:.3f}", f"{m['perplexity']:.3f}"]
    assert page.row("KL(original || stored), nats per token")[2] == f"{m['kl']:.4g}"
    assert page.row("same most likely token")[2] == f"{100 * m['top1']:.2f} %"
    sites = [
        [" = ".join([s["name"], *s["aliases"]]), "{} x {}".format(*s["shape"]), s["kind"], f"{s['bits'] // 8:,}", f"{s['bits_per_weight']:.3f}",
         f"{s['error']:.4g}"]
        for s in values["sites"]
    ]  # fmt: skip
    assert page.table("stored as") == sites
    assert [row[0] for row in page.table("weight error")] == values["worst"]
    for row in values["by_class"]:
        assert page.row(row["class"])[1:3] == [human_bytes(row["before"]), human_bytes(row["after"])]
    for sample in values["samples"]:
        assert sample["text"] in "".join(page.text)


def test_the_classes_add_up_before_and_after(made: Path) -> None:
    values = json.loads((made / "report.json").read_text())
    assert sum(row["after"] for row in values["by_class"]) == values["stored_bytes"] == stored_bytes(made)
    assert sum(row["before"] for row in values["by_class"]) == values["original_bytes"]
    assert values["by_class"] == by_class(lc.Report(values))


def test_hostile_text_is_shown_and_does_nothing(made: Path) -> None:
    page = Page(render(hostile_report(made)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    text = "".join(page.text)
    for field in FIELDS:
        assert hostile(field) in text, field


def browser() -> str:
    found = next(
        (path for name in ("chromium", "google-chrome", "chromium-browser", "chrome") if (path := shutil.which(name))),
        None,
    )
    if found is None:
        pytest.skip("no chromium or google-chrome on PATH")
    return found


def dump_dom(page: Path, profile: Path) -> str:
    """The page's DOM after a real browser has read it and run whatever would run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--dump-dom"]
    result = subprocess.run(
        [browser(), *flags, page.as_uri()], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return result.stdout


def test_a_browser_shows_the_rows(made: Path, tmp_path: Path) -> None:
    shown, written = (
        Page(dump_dom(made / "report.html", tmp_path / "profile")),
        Page((made / "report.html").read_text()),
    )
    assert len(shown.table("stored as")) == 22
    assert shown.tables == written.tables
    assert sum(tag == "svg" for tag, _ in shown.tags) == 1


def test_a_browser_runs_nothing_of_a_hostile_report(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(render(hostile_report(made)))
    dom = dump_dom(file, tmp_path / "profile")
    shown = Page(dom)
    assert "<title>taken</title>" not in dom
    assert not {"script", "img"} & {tag for tag, _ in shown.tags}
    assert all(hostile(field) in "".join(shown.text) for field in FIELDS)


def test_the_page_of_a_module_in_memory() -> None:
    """There is no file yet and nothing was measured: the page shows the expected size and every site, and invents nothing."""
    _, report = lc.compress(
        torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), "RTN(4, 'channel')"
    )
    page = Page(render(report))
    assert page.row("files of weights")[1:3] == [
        human_bytes(report["original_bytes"]),
        human_bytes(report["expected_bytes"]),
    ]
    assert [row[0] for row in page.table("stored as")] == ["0", "2"]
    assert "perplexity" not in "".join(page.text).lower()
