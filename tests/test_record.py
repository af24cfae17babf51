"""Records: the JSON they are written as, read back, and read by key as JSON is."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.errors import CheckpointError
from laconic.host.progress import Log
from laconic.host.record import Record, plain
from laconic.host.told import Preflight, SiteRecord
from laconic.recover.curve import Point
from laconic.search.records import TrialRecord

SITE = [
    "name", "aliases", "parameter", "shape", "role", "method", "kind", "bits", "bits_per_weight", "error", "weight_error", "checksum", "notes",
    "seconds", "original_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Inner(Record):
    value: float


@dataclass(frozen=True)
class Outer(Record):
    OPTIONAL = frozenset({"more"})

    name: str
    inner: tuple[Inner, ...]
    by_name: dict[str, Inner]
    nothing: int | None = None
    more: int | None = None


def test_a_record_is_its_json_and_is_read_by_key() -> None:
    one = Outer("a", (Inner(1.5), Inner(2.0)), {"x": Inner(0.0)})
    told = {"name": "a", "inner": [{"value": 1.5}, {"value": 2.0}], "by_name": {"x": {"value": 0.0}}, "nothing": None}
    assert one.to_json() == told
    assert list(one.to_json()) == list(told), "in the order of the fields"
    assert replace(one, more=3).to_json() == told | {"more": 3}
    assert (one["inner"], one.get("more"), one.get("more", 7)) == (told["inner"], None, 7)
    with pytest.raises(KeyError):
        _ = one["more"]
    assert plain([one, {"one": one}, (3, "text")]) == [told, {"one": told}, [3, "text"]]
    assert Inner.from_json({"value": 2.5, "new": 3}) == Inner(2.5)
    with pytest.raises(CheckpointError, match="a Inner without 'value'"):
        Inner.from_json({})


def test_a_point_of_a_curve_says_what_its_recovery_tells_among_the_others() -> None:
    point = Point(3, 0.5, 0.25, {"phase": "L-C", "skipped": 1})
    told = {"minibatches": 3, "score": 0.5, "validation_loss": 0.25, "phase": "L-C", "skipped": 1}
    assert list(point.to_json().items()) == list(told.items())
    assert Point.from_json(json.loads(json.dumps(point.to_json()))) == point
    assert (point["phase"], point.get("distance")) == ("L-C", None)
    with pytest.raises(CheckpointError, match="without 'score'"):
        Point.from_json({"minibatches": 3, "validation_loss": 1.0})


def test_a_trial_is_read_back_from_its_study() -> None:
    curve = [Point(0, 0.5, 0.25), Point(3, 0.75, 0.125, {"phase": "L-C"})]
    record = TrialRecord(0.75, 0.5, [2.0], curve, False, False, None, 3, 4, 1.5, ["a note"])
    attributes = json.loads(json.dumps(record.attributes()))
    assert not attributes.keys() & {"score", "objectives", "late"}
    assert TrialRecord.stored({**attributes, "score": 0.75, "late": 7, "stage": 1}, (2.0,)) == record
    del attributes["curve"]
    with pytest.raises(CheckpointError, match="without 'curve'"):
        TrialRecord.stored({**attributes, "score": 0.75}, (2.0,))


class Told(Log):
    """Keeps what is told of sites and of the plan."""

    def __init__(self) -> None:
        self.sites: list[SiteRecord] = []
        self.preflight: list[Preflight] = []

    def site(self, record: SiteRecord) -> None:
        self.sites.append(record)

    def plan(self, preflight: Preflight) -> None:
        self.preflight.append(preflight)


def test_the_sites_of_a_module_are_told_reported_and_read_back() -> None:
    told = Told()
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    _, report = lc.compress(net, "RTN(4, 'channel')", progress=told)
    assert report.sites == [record.to_json() for record in told.sites]
    assert list(report.sites[0]) == SITE
    assert report.records == told.sites
    assert report.sites[0]["error"] == told.sites[0].error == told.sites[0]["error"]
    assert report.matrix_bits == sum(r.bits for r in told.sites) / sum(r.entries for r in told.sites)
    assert json.loads(json.dumps(report.as_dict()))["sites"] == report.sites


def test_what_is_rounded_and_unmeasured_is_in_the_record_where_it_is_so() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    batches = [torch.randn(8, 64, generator=torch.Generator().manual_seed(0))]
    _, report = lc.compress(net, "[('0', SmoothQuant()), ('*', RTN(4, 'channel'))]", batches)
    first, second = report.sites
    assert list(first) == [*SITE[:13], "input_bits", *SITE[13:]]
    assert first["input_bits"] == 8
    assert list(second) == SITE


def test_the_preflight_is_one_record_told_and_printed(tiny: Path, tmp_path: Path) -> None:
    told = Told()
    lc.compress(tiny, "RTN(4, 32)", out=tmp_path / "out", evaluate=False, progress=told)
    preflight = told.preflight[0]
    done = CliRunner().invoke(
        app, ["compress", str(tiny), "--out", str(tmp_path / "no"), "--scheme", "RTN(4, 32)", "--dry-run", "--json"]
    )
    printed: dict[str, Any] = json.loads(done.stdout)
    mine = json.loads(json.dumps(preflight.to_json()))
    assert list(printed) == list(mine)
    assert printed["sites"] == mine["sites"]
    assert printed["stages"].keys() == mine["stages"].keys()
    assert set(printed["stages"]["compression"]) == {"bytes", "seconds"}
    assert preflight["bytes"] == preflight.bytes == printed["bytes"]
    assert preflight.sites[0]["method"] == printed["sites"][0]["method"]
