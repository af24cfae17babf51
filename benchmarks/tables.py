"""Writes the tables of README.md and of the docs from the results beside this file: `python benchmarks/tables.py [--check]`.

A table stands between `<!-- table FILE[#KEY]: column | column as heading | ... -->` and `<!-- end -->`; FILE is a result without its .json,
KEY a list in it other than `rows`. A figure that has an interval in the result (`NAME low`, `NAME high`) is shown with it. With --check nothing
is written, and the exit code is 1 where a page differs from the results.
"""

import argparse
import json
import re
import sys
from typing import Any

from common import RESULTS, ROOT, text

PAGES = ("README.md", "docs/benchmarks.md", "docs/edkm.md")
BLOCK = re.compile(
    r"(<!-- table (?P<file>[\w-]+)(#(?P<key>\w+))?: (?P<columns>[^>]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    arguments.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = arguments.parse_args().check
    stale = []
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = BLOCK.sub(_block, before)
        if after != before:
            stale.append(name)
            if not check:
                page.write_text(after, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


def _block(match: re.Match[str]) -> str:
    content = json.loads((RESULTS / f"{match['file']}.json").read_text())
    rows = [row for row in content[match["key"] or "rows"] if "failed" not in row]
    return match[1] + table(rows, match["columns"]) + "\n" + source(content) + "\n" + match["end"]


def table(rows: list[dict[str, Any]], columns: str) -> str:
    """Rows as a Markdown table; `name as heading` renames a column. Columns of numbers go to the right."""
    pairs = [part.strip().split(" as ") for part in columns.split("|")]
    names, headings = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = [headings, ["---:" if right else "---" for right in numeric]]
    lines += [[cell(row.get(name)) + interval(row, name) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(row: dict[str, Any], name: str) -> str:
    """The 95 % interval of a figure, where the result has one of any width."""
    low, high = row.get(f"{name} low"), row.get(f"{name} high")
    return f" ({cell(low)} to {cell(high)})" if low is not None and high is not None and low < high else ""


def cell(value: Any) -> str:
    """A value as the benchmarks print it, but floats below one to four decimals, and schemes as code."""
    if isinstance(value, float) and 1e-4 <= abs(value) < 1:
        return f"{value:.4f}"
    shown = text(value).replace("|", "\\|")
    scheme = re.match(r"(laconic )?([A-Z]\w*\(|\[\()", shown) and shown.endswith((")", "]", "passes"))
    return f"`{shown}`" if scheme else shown


def source(content: dict[str, Any]) -> str:
    """Where the figures come from, in a line."""
    machine, versions = content["machine"], content["versions"]
    used = f" ({machine['threads']} used)" if machine["threads"] is not None else ""  # the rows say it
    return (
        f"\n`{content['command']}`: {content['date'][:10]}, {machine['cpu']}, {machine['cores']} cores{used}, "
        f"Python {versions['python']}, torch {versions['torch']}, seed {content['seed']}.\n"
    )


if __name__ == "__main__":
    main()
