"""Several compressed models side by side on one page."""

import re
from pathlib import Path
from typing import Any

from laconic.engine.report import Report
from laconic.host.told import SiteRecord
from laconic.show.compare import quality_plot, row_of, write_comparison


def report(bits: float, kl: float) -> Report:
    site = SiteRecord(
        name="a",
        aliases=[],
        parameter="a.weight",
        shape=[4, 8],
        role="body",
        method=f"RTN(bits={bits:g})",
        kind="uniform",
        bits=int(32 * bits),
        bits_per_weight=bits,
        error=0.1,
        weight_error=0.1,
        checksum=0,
    ).to_json()
    metrics = {
        "perplexity": 10 + kl,
        "perplexity_interval": (9.0, 12.0),
        "kl": kl,
        "kl_interval": (kl / 2, 2 * kl),
        "top1": 0.75,
    }
    return Report(
        {
            "scheme": f"RTN(bits={bits:g})",
            "parameters": 64,
            "stored_bytes": int(8 * bits),
            "expected_bytes": int(8 * bits),
            "sites": [site],
            "metrics": metrics,
            "seconds": 2.5,
        }
    )


def rows() -> list[dict[str, Any]]:
    found = [
        row_of(report(bits, kl), family) for family, bits, kl in (("one", 4, 0.01), ("one", 2, 0.1), ("two", 3, 0.02))
    ]
    return [row | {"first": False, "best": row["kl"] == 0.01} for row in found]


def test_a_row_is_what_the_run_measured() -> None:
    row = row_of(report(3, 0.02), "two", "two/report.html")
    assert row == {
        "family": "two",
        "scheme": "RTN(bits=3)",
        "stored_bytes": 24,
        "bits_per_weight": 3.0,
        "matrix_bits": 3.0,
        "perplexity": 10.02,
        "perplexity_interval": (9.0, 12.0),
        "kl": 0.02,
        "kl_interval": (0.01, 0.04),
        "top1": 0.75,
        "seconds": 2.5,
        "link": "two/report.html",
    }


def test_the_plot_has_a_line_for_each_family_and_the_same_bytes_at_any_time() -> None:
    plot = quality_plot(rows())
    assert plot.startswith("<svg")
    assert plot == quality_plot(rows())
    one_family = quality_plot([row | {"family": "one"} for row in rows()])
    assert plot.count('id="line2d') - one_family.count('id="line2d') == 2  # a line, and its sign in the legend


def test_the_page_holds_every_row_and_needs_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    facts, words = {"model": "tiny & small"}, ["A <b>word</b>."]
    reference = {"name": "original", "bytes": 2048, "bits_per_weight": 16.0, "perplexity": 9.5}
    found = [*rows(), row_of(report(8, 0.001), "three", "three/report.html") | {"first": True, "best": False}]
    write_comparison(file, "Three schemes", facts, reference, found, words)
    page = file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    for row in found:
        assert f"<code>{row['scheme']}</code>" in page
    assert '<a href="three/report.html">' in page
    assert page.count('<tr class="best ">') == 1
    assert "tiny &amp; small" in page
    assert "A &lt;b&gt;word&lt;/b&gt;." in page
    assert not re.search(r'(src|href)="https?:', page)
