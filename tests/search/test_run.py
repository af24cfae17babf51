"""`lc.search` end to end, on a conv net that reads real digits: what it delivers, how it is resumed, interrupted and shared."""

import copy
import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as saved
from torch import Tensor, nn

from tests.needs import extra

extra("optuna")
extra("torch_pruning")
extra("sklearn")

import laconic as lc
from laconic.disk.files import atomically
from laconic.disk.store import read_manifest
from laconic.errors import OutputError, SearchError
from laconic.measure.candidate import Candidate
from laconic.measure.objectives import flops, stored_bytes
from laconic.recover import LC, Direct, FineTune, recover_task
from laconic.recover.checkpoint import STATE as UNFINISHED
from laconic.recover.train import Trainer
from laconic.search import Found
from laconic.search.trial import Trials
from laconic.weights import baked, installed
from tests.processes import PATIENCE
from tests.recover.nets import bytes_of, untouched
from tests.search.digits import HOW, Problem, conv, run, sampled

pytestmark = pytest.mark.usefixtures("no_pictures")
PAIR = "Magnitude(Free(0.1, 0.9), scope='model') >> KMeans(bits=Free(choices=(3, 6)))"


class Counted(list[Any]):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


@pytest.fixture(scope="module")
def small(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Counted, Path]:
    """The paper's P+Q: one threshold over the network, then half precision."""
    out, test = tmp_path_factory.mktemp("search") / "deep" / "p+q", Counted(problem[1].test or [])
    problem[0].train()
    with untouched(problem[0]):
        found = run(problem, out, test=test)
    problem[0].eval()
    return found, test, out


def fresh(path: Path) -> nn.Module:
    """A stored model in a network that knows nothing but the architecture."""
    return lc.load_into(conv(), path).eval()


def test_the_answer_keeps_the_floor_as_it_is_read_from_its_file(
    problem: Problem, small: tuple[Found, Counted, Path]
) -> None:
    found, _, out = small
    net, task = problem
    best, reference = found.result["best"], found.result["reference"]
    read = fresh(found.path)
    assert found.path == out / "model"
    assert best["score"] == task.judge(read, task.validation).score >= found.result["floor"]
    assert found.result["floor"] == task.judge(net, task.validation).score - 0.03 == reference["score"] - 0.03
    assert best["test_score"] == task.judge(read, task.test or []).score
    assert reference["test_score"] == task.judge(net, task.test or []).score
    assert best["values"] == found.values == read_manifest(found.path)["values"]
    weights = installed(found.model)
    pruned = sum(int((w() == 0).sum()) for w in weights.values()) / sum(w().numel() for w in weights.values())
    assert pruned == pytest.approx(found.values["sparsity"], abs=0.01)
    assert best["ratio"] > 2
    assert best["direct_test_score"] < best["test_score"]


def test_the_best_of_the_trials_is_chosen(small: tuple[Found, Counted, Path]) -> None:
    found = small[0]
    kept = [row for row in found.result["trials"] if row["score"] >= found.result["floor"]]
    assert 0 < len(kept) < len(found.result["trials"])
    best = min(kept, key=lambda row: row["objective"])
    assert (found.result["best"]["trial"], found.result["best"]["objective"]) == (best["number"], best["objective"])
    assert found.values["sparsity"] == max(row["values"]["sparsity"] for row in kept)
    assert found.study.best_trial.number == best["number"]


def test_the_result_says_everything(small: tuple[Found, Counted, Path]) -> None:
    result = small[0].result
    whole = {
        "scheme", "recovery", "objective", "floor", "keep", "margin", "reference", "free", "trials", "best", "layers", "cost", "noise", "seconds",
        "seed", "command", "versions", "machine", "notes",
    }  # fmt: skip
    assert set(result) == whole
    assert result["objective"] == {"name": "stored_bytes", "direction": "minimize"}
    assert result["scheme"] == "Magnitude(sparsity=Free(0, 1), scope='model') >> Cast(dtype='float16')"
    assert set(result["reference"]) == {
        "score",
        "test_score",
        "objective",
        "stored_bytes",
        "nonzero_bytes",
        "parameters",
    }
    for row in result["trials"]:
        assert {
            "stage",
            "domain",
            "posterior",
            "curve",
            "direct_score",
            "seconds",
            "warm_from",
            "stopped_early",
        } <= set(row)
        assert row["curve"][-1]["minibatches"] == row["minibatches"]
        assert "late" not in row
    assert {row["name"] for row in result["layers"]} == {"1", "4", "8", "everything else"}
    assert (result["noise"], result["notes"], result["margin"]) == (0.0, [], pytest.approx(0.03))
    assert result["reference"]["parameters"] == result["best"]["parameters"] == 3866
    assert result["reference"]["stored_bytes"] == sum(t.nbytes for t in conv().state_dict().values())


def test_the_report_is_written(small: tuple[Found, Counted, Path]) -> None:
    found, _, out = small

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads((out / "search.json").read_text(), parse_constant=refuse) == json.loads(json.dumps(found.result))
    assert found.report == out / "search.html"
    assert found.report.read_text().count("<svg") >= 3
    assert (out / "study.db").is_file()


def test_trials_start_from_their_neighbours_and_cost_less(problem: Problem, small: tuple[Found, Counted, Path]) -> None:
    rows = small[0].result["trials"]
    for row in rows[:2]:  # of the original compressed directly, not of the neighbour
        scheme = lc.Magnitude(row["values"]["sparsity"], scope="model") >> lc.Cast("float16")
        assert row["direct_score"] == recover_task(problem[0], scheme, Direct(2), problem[1])[1].score
    warm = [row for row in rows if row["warm_from"] is not None]
    assert rows[0]["warm_from"] is None
    assert warm
    for row in warm:
        assert rows[row["warm_from"]]["score"] >= small[0].result["floor"]
        assert row["minibatches"] <= 8 < row["cold_minibatches"] == 16
    cost = small[0].result["cost"]
    assert cost == {"minibatches": sum(row["minibatches"] for row in rows), "cold_minibatches": 16 * len(rows)}
    assert cost["minibatches"] < cost["cold_minibatches"]


def test_no_trial_sees_the_test_data(small: tuple[Found, Counted, Path]) -> None:
    """Two passes that check the splits; the original, the compressed model and direct compression, once each."""
    assert small[1].passes == 5


def test_a_finished_search_returns_the_same_again(problem: Problem, small: tuple[Found, Counted, Path]) -> None:
    first, _, out = small
    again = run(problem, out, resume=True)
    assert sampled(again) == sampled(first)
    assert again.values == first.values
    assert bytes_of(again.model) == bytes_of(first.model)
    with pytest.raises(SearchError, match="exists already; resume it, overwrite it, or give another name"):
        run(problem, out)
    with pytest.raises(SearchError, match=r"another search: .*scheme was"):
        run(problem, out, "Magnitude(Free(0, 1)) >> Cast('float16')", resume=True)


def test_more_trials_go_on_from_the_finished_ones(
    problem: Problem, small: tuple[Found, Counted, Path], tmp_path: Path
) -> None:
    two = run(problem, tmp_path / "s", trials=2)
    four = run(problem, tmp_path / "s", trials=4, resume=True)
    assert sampled(four)[:2] == sampled(two)
    assert sampled(four) == sampled(small[0])


def broken(at: int, how: Callable[[], None]) -> Callable[[Any, Any], Tensor]:
    """The usual score, until it is asked for the `at`-th time."""
    calls = 0

    def hits(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            how()
        return (output.argmax(1) == batch[1]).float()

    return hits


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_search_takes_the_trials_it_would_have_taken(
    problem: Problem, small: tuple[Found, Counted, Path], tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(KeyboardInterrupt):  # twice the original, then five or six times per trial: in the second one
        run(problem, tmp_path / "s", score=broken(11, _interrupt))
    found = run(problem, tmp_path / "s", resume=True)
    assert sampled(found) == sampled(small[0])
    assert [row["state"] for row in found.result["trials"]] == ["complete", "fail", "complete", "complete", "complete"]
    assert found.values == small[0].values


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry for every minibatch that is trained on."""
    taken: list[int] = []
    step = Trainer._step

    def counted(trainer: Trainer, *arguments: Any) -> float | None:
        taken.append(1)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", counted)
    return taken


@pytest.mark.parametrize("how", [HOW, replace(HOW, then=FineTune(8, HOW.learn, checks=2))])
def test_an_interrupted_trial_goes_on_from_its_last_l_step(
    problem: Problem, tmp_path: Path, how: LC, steps_taken: list[int]
) -> None:
    """To the same model, without taking any step of what was finished a second time."""
    options = {"scheme": "Magnitude(Free(0.3, 0.6), scope='model')", "trials": 1, "recover": how}
    whole = run(problem, tmp_path / "w", **options)
    assert len(steps_taken) == how.total
    steps_taken.clear()
    ends = 8  # twice the original, the direct compression, and what five parts of training came to (with `then`: its first check)
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path / "s", score=broken(ends if how.then else ends - 1, _interrupt), **options)
    before = len(steps_taken)
    assert (tmp_path / "s" / "trials" / "000" / UNFINISHED).is_file()
    found = run(problem, tmp_path / "s", resume=True, **options)
    assert len(steps_taken) - before == 4 + how.total - before  # an L-step (or check) of 4 is taken again
    assert sampled(found) == sampled(whole)
    assert found.result["trials"][1]["curve"] == whole.result["trials"][0]["curve"]
    assert bytes_of(found.model) == bytes_of(whole.model)
    assert not list(tmp_path.rglob(UNFINISHED))


def test_what_another_recovery_left_is_not_gone_on_from(
    problem: Problem, tmp_path: Path, steps_taken: list[int]
) -> None:
    """The neighbour an interrupted trial started from may not be the nearest any more: then it begins anew."""
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path / "s", trials=1, score=broken(7, _interrupt))
    file = tmp_path / "s" / "trials" / "000" / UNFINISHED
    with safe_open(file, framework="pt") as reader:
        told = json.loads(reader.metadata()["state"])
    told["fingerprint"] = "something else"
    file.write_bytes(saved(load_file(file), {"state": json.dumps(told)}))
    steps_taken.clear()
    run(problem, tmp_path / "s", trials=1, resume=True)
    assert len(steps_taken) == HOW.total


def damaged(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_damaged_state_does_not_end_a_search(
    problem: Problem, tmp_path: Path, steps_taken: list[int], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path / "s", trials=1, score=broken(7, _interrupt))
    damaged(tmp_path / "s" / "trials" / "000" / UNFINISHED)
    steps_taken.clear()
    run(problem, tmp_path / "s", trials=1, resume=True)
    assert len(steps_taken) == HOW.total
    assert "damaged: its tensors are not those that were written; the run begins anew" in caplog.text


def test_a_trial_interrupted_again_and_again(
    problem: Problem, tmp_path: Path, steps_taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before its recovery begins: the state is looked for in all of its attempts."""
    with pytest.raises(KeyboardInterrupt):
        run(problem, tmp_path / "s", trials=1, score=broken(6, _interrupt))
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["laconic.search.trial"], "fix", lambda *_: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(problem, tmp_path / "s", trials=1, resume=True)
    found = run(problem, tmp_path / "s", trials=1, resume=True)
    assert len(steps_taken) == HOW.total + 4
    assert [row["state"] for row in found.result["trials"]] == ["fail", "fail", "complete"]
    assert not list(tmp_path.rglob(UNFINISHED))


def test_a_trial_whose_result_could_not_be_stored_is_not_trained_again(
    problem: Problem, tmp_path: Path, steps_taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["laconic.search.study"], "tell", lambda *_, **__: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(problem, tmp_path / "s", trials=1, heartbeat=1)
    before = len(steps_taken)
    run(problem, tmp_path / "s", trials=1, heartbeat=1, resume=True)
    assert (before, len(steps_taken)) == (HOW.total, HOW.total)


def test_a_full_disk_puts_the_trial_back(
    problem: Problem, tmp_path: Path, steps_taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stored before is there when some space is free again; after any other error nothing is left of a trial."""
    writes = []

    def full(*arguments: Any) -> None:
        writes.append(1)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        atomically(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["laconic.recover.checkpoint"], "atomically", full)
        with pytest.raises(OutputError, match="free some space and run again with --resume"):
            run(problem, tmp_path / "s", trials=1)
    assert (tmp_path / "s" / "trials" / "000" / UNFINISHED).is_file()
    run(problem, tmp_path / "s", trials=1, resume=True)
    assert len(steps_taken) == HOW.total + 4
    with pytest.raises(SearchError, match="the score is nan"):
        run(
            problem,
            tmp_path / "s",
            trials=2,
            resume=True,
            score=lambda output, batch: output[:, 0] * (torch.nan if len(steps_taken) > 24 else 1),
        )
    with monkeypatch.context() as patched:
        patched.setattr(Trials, "stored_form", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(problem, tmp_path / "s", trials=2, resume=True)
    assert not list(tmp_path.rglob(UNFINISHED))


def test_random_samplers_go_on_after_an_interruption_too(problem: Problem, tmp_path: Path) -> None:
    options = {"scheme": PAIR, "recover": Direct(2), "keep": lc.within(0.5), "trials": 3}
    with pytest.raises(KeyboardInterrupt):  # twice the original, twice a trial: in the second one
        run(problem, tmp_path / "s", score=broken(5, _interrupt), **options)
    assert sampled(run(problem, tmp_path / "s", resume=True, **options)) == sampled(
        run(problem, tmp_path / "w", **options)
    )


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the workers are forked")


def worker(*arguments: Any, **named: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments, kwargs=named)
    process.start()
    return process


@needs_fork
def test_the_trial_of_a_killed_worker_is_run_again(
    problem: Problem, small: tuple[Found, Counted, Path], tmp_path: Path
) -> None:  # fmt: skip
    died = worker(problem, tmp_path / "s", heartbeat=1, score=broken(11, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    died.join(timeout=PATIENCE)
    assert died.exitcode == -signal.SIGKILL
    found = run(problem, tmp_path / "s", heartbeat=1, resume=True)
    done = sorted((tuple(values.items()), score) for values, score, *_ in sampled(found))
    lost = small[0].result["trials"][1]["values"]  # what an undisturbed search tries second
    assert (found.result["trials"][1]["state"], found.result["trials"][1]["values"]) == ("fail", lost)
    assert sum(row["values"] == lost and row["state"] == "complete" for row in found.result["trials"]) == 1
    assert len(done) == 4
    assert found.result["best"]["score"] >= found.result["floor"]


@needs_fork
def test_two_workers_on_one_storage(problem: Problem, tmp_path: Path) -> None:
    """The trials are shared, and both workers end with the same answer."""
    out = tmp_path / "s"
    both = [worker(problem, out, trials=5, resume=True, early_stop=False) for _ in range(2)]
    for process in both:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in both] == [0, 0]
    found = run(problem, out, trials=5, resume=True, early_stop=False)
    values = [row["values"]["sparsity"] for row in found.result["trials"] if row["state"] == "complete"]
    assert len(values) == len(set(values)) == 5
    assert found.values == json.loads((out / "search.json").read_text())["best"]["values"]
    assert [folder.name for folder in out.iterdir() if folder.name.startswith(".")] == []


def test_filters_and_neurons_are_taken_out(problem: Problem, tmp_path: Path) -> None:
    def speed(candidate: Candidate) -> float:
        """Examples per second of a machine that does a million operations."""
        return 1e6 / flops(candidate)

    found = run(
        problem, tmp_path / "s", "StructurePrune(Free(0, 0.4), scale='layer') >> Cast('float16')", objective=lc.Maximize(speed),
        keep=lc.within(0.15), trials=2,
    )  # fmt: skip
    best, reference = found.result["best"], found.result["reference"]
    assert found.result["objective"] == {"name": "speed", "direction": "maximize"}
    assert best["objective"] > reference["objective"]
    assert best["parameters"] == sum(p.numel() for p in baked(found.model).parameters()) < reference["parameters"]
    macs = sum(row["macs_after"] for row in found.result["layers"])
    assert best["objective"] == pytest.approx(1e6 / (2 * macs))
    read, task = fresh(found.path), problem[1]
    assert read[4].out_channels < 16
    assert task.judge(read, task.validation).score == best["score"] >= found.result["floor"]
    assert {type(w).__name__ for w in installed(read).values()} == {"Dense"}  # nothing is left to mask
    assert all(w.pack()[0]["dtype"] == "float16" for w in installed(read).values())


def test_what_was_trained_is_not_compressed_again_after_the_cut(problem: Problem, tmp_path: Path) -> None:
    """Filters of one layer go, single weights of the next keep their masks, and a layer that lost nothing keeps its codes."""
    scheme = [
        ("1", lc.RTN(6, "channel")),
        ("4", lc.FilterPrune(lc.Free(0.2, 0.4))),
        ("8", lc.Magnitude(0.7) >> lc.RTN(6, "channel")),
    ]
    found = run(problem, tmp_path / "s", scheme, keep=lc.within(0.3), trials=1)
    read = fresh(found.path)
    masked = lc.load_into(
        conv(), run(problem, tmp_path / "m", scheme, keep=lc.within(0.3), trials=1, thin=False).path
    ).eval()
    assert torch.equal(read[1].weight, masked[1].weight)
    left = (masked[4].weight.flatten(1) != 0).any(1)
    assert 9 < int(left.sum()) < 16
    columns = left.repeat_interleave(16)
    assert torch.equal(read[8].weight != 0, masked[8].weight[:, columns] != 0)
    assert torch.allclose(read[8].weight, masked[8].weight[:, columns], atol=0.02)
    assert found.result["best"]["score"] == pytest.approx(
        problem[1].judge(masked, problem[1].validation).score, abs=0.02
    )


def test_without_thinning_channels_stay_as_zeros(problem: Problem, tmp_path: Path) -> None:
    found = run(
        problem,
        tmp_path / "s",
        "FilterPrune(Free(0.2, 0.6))",
        recover=Direct(4),
        keep=lc.at_least(0.0),
        trials=2,
        thin=False,
    )
    read = fresh(found.path)
    assert "shapes" not in read_manifest(found.path)
    assert read[4].weight.shape == (16, 8, 3, 3)
    silent = (read[4].weight.flatten(1) == 0).all(1)
    assert 0 < int(silent.sum()) < 16
    assert not read[5].bias[silent].any()
    assert found.result["best"]["parameters"] == found.result["reference"]["parameters"]
    assert found.result["notes"] == []


@pytest.mark.parametrize("kind", ["a plan", "a function"])
def test_schemes_that_are_programs(kind: str, problem: Problem, tmp_path: Path) -> None:
    deep, last = lc.Magnitude(lc.Free(0.3, 0.9)), lc.RTN(8, "channel")
    scheme = [("4", deep), ("8", last), ("*", lc.Keep())]
    if kind == "a function":
        scheme = lambda slot: {"4": deep, "8": last}.get(slot.name, lc.Keep())  # type: ignore[assignment]  # noqa: E731
    found = run(problem, tmp_path / "s", scheme, recover=FineTune(8, checks=2), keep=lc.within(0.2), trials=2)
    weights = installed(fresh(found.path))
    assert {name: type(weight).__name__ for name, weight in weights.items()} == {
        "4.weight": "Sparse",
        "8.weight": "Uniform",
    }
    assert float((weights["4.weight"]() == 0).float().mean()) == pytest.approx(found.values["sparsity"], abs=0.01)


def test_several_variables(problem: Problem, tmp_path: Path) -> None:
    found = run(problem, tmp_path / "s", PAIR, recover=Direct(4), keep=lc.within(0.1), trials=6)
    rows = found.result["trials"]
    assert found.result["free"] == {"sparsity": {"low": 0.1, "high": 0.9, "log": False}, "bits": {"choices": [3, 6]}}
    assert {row["values"]["bits"] for row in rows} == {3, 6}
    assert all(0.1 < row["values"]["sparsity"] < 0.9 for row in rows)
    best = min((row for row in rows if row["score"] >= found.result["floor"]), key=lambda row: row["objective"])
    assert found.values == best["values"]
    (bits,) = {weight.pack()[0]["values"]["bits"] for weight in installed(found.model).values()}
    assert bits == found.values["bits"]


class Rate:
    """A million operations a second, less and less often."""

    calls = 0

    def __call__(self, candidate: Candidate) -> float:
        self.calls += 1
        return 1e6 / flops(candidate) / self.calls

    def relative(self, candidate: Candidate) -> float:
        return flops(replace(candidate, network=candidate.reference)) / flops(candidate)


def test_what_the_machine_says_is_said_beside_the_original(problem: Problem, tmp_path: Path) -> None:
    rate = Rate()
    found = run(
        problem,
        tmp_path / "s",
        "Magnitude(Free(0.1, 0.9))",
        objective=lc.Maximize(rate, "rate"),
        recover=Direct(4),
        trials=3,
    )
    original = 1e6 / flops(Candidate(problem[0], problem[0], problem[1].sample(), problem[0]))
    assert found.result["reference"]["objective"] == pytest.approx(original)
    assert rate.calls == 1, "the original was measured once, the trials as multiples of it"
    rows = sorted(found.result["trials"], key=lambda row: row["values"]["sparsity"])
    assert [row["objective"] for row in rows] == sorted(row["objective"] for row in rows)
    assert rows[0]["objective"] > original


def test_another_models_study_is_not_gone_on_with(problem: Problem, small: tuple[Found, Counted, Path]) -> None:
    other = copy.deepcopy(problem[0])
    with torch.no_grad():
        other[8].weight[0, 0] += 1
    with pytest.raises(SearchError, match="checksum was"):
        run((other, *problem[1:]), small[2], resume=True)


def test_two_objectives_have_a_pareto_front(problem: Problem, tmp_path: Path) -> None:
    def coarseness(candidate: Candidate) -> float:
        return -float(candidate.network[8].weight.unique().numel())

    goals = [lc.Minimize(stored_bytes), lc.Minimize(coarseness)]
    found = run(
        problem, tmp_path / "s", PAIR, recover=Direct(4), keep=lc.within(0.1), trials=5, objective=goals, sampler="tpe"
    )
    result = found.result
    kept = [row for row in result["trials"] if row["score"] >= result["floor"]]

    def beaten(row: dict[str, Any]) -> bool:
        return any(
            all(a <= b for a, b in zip(o["objective"], row["objective"], strict=True))
            and o["objective"] != row["objective"]
            for o in kept
        )

    assert result["pareto"] == [row["number"] for row in kept if not beaten(row)]
    assert (
        result["best"]["trial"]
        == min((row for row in kept if not beaten(row)), key=lambda row: row["objective"][0])["number"]
    )
    assert [len(result[key]["objective"]) for key in ("best", "reference")] == [2, 2]
    assert [goal["name"] for goal in result["objective"]] == ["stored_bytes", "coarseness"]


class Clock:
    """Stands in for the module `time`: moves `step` seconds whenever it is looked at."""

    def __init__(self, now: list[float], step: float = 0.0) -> None:
        self.now, self.step = now, step

    def time(self) -> float:
        self.now[0] += self.step
        return self.now[0]


def clocks(patched: pytest.MonkeyPatch, **steps: float) -> None:
    now = [0.0]
    for module in ("run", "trial", "study"):
        patched.setattr(sys.modules[f"laconic.search.{module}"], "time", Clock(now, steps.get(module, 0.0)))


def test_a_trial_that_has_no_time_left_is_put_back(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int]
) -> None:  # fmt: skip
    """What is cut short below the floor says nothing of its sparsity; a resumed search carries it to its end."""

    def carry_out(**options: Any) -> list[dict[str, Any]]:
        with pytest.raises(SearchError, match=options.pop("match")):
            run(problem, tmp_path / "s", "Magnitude(Free(0.97, 1))", **options)
        return list(json.loads((tmp_path / "s" / "search.json").read_text())["trials"])

    with monkeypatch.context() as patched:
        clocks(patched, trial=60)
        cut, waiting = carry_out(minutes=3, match="no trial was finished: allow more time")
    assert (cut["state"], waiting["state"]) == ("fail", "waiting")
    assert "time was up" in cut["failure"]
    before = len(steps_taken)
    cut, done = carry_out(
        trials=1,
        resume=True,
        match=r"no trial kept the floor 0\.\d{4}: the best of 1 has 0\.\d{4}, at {'sparsity': 0\.985}",
    )
    assert done["state"] == "complete"
    assert 0 < before < len(steps_taken) <= 16 + 4, "it went on from what was trained before"
    assert done["values"] == cut["values"]
    assert done["minibatches"] == 16


def test_every_session_gets_a_trial_further(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_taken: list[int], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """A trial longer than the time there is: what a session trained is stored before the trial is put back."""
    options = {"scheme": "Magnitude(Free(0.97, 1))", "recover": replace(HOW, norm_batches=0), "trials": 1}
    caplog.set_level("INFO", logger="laconic")
    for session in range(1, 4):
        with monkeypatch.context() as patched:
            clocks(patched, trial=60)
            with pytest.raises(SearchError, match="no trial was finished: allow more time"):
                run(
                    problem, tmp_path / "s", minutes=2 + session, resume=True, **options
                )  # a look at the clock per point of the curve
        assert len(steps_taken) == 4 * session
        assert caplog.text.count(", put back: the time is up") == session
    with pytest.raises(SearchError, match="no trial kept the floor"):
        run(problem, tmp_path / "s", resume=True, **options)
    assert len(steps_taken) == HOW.total
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["fail"] * 3 + ["complete"]
    assert rows[-1]["minibatches"] == HOW.total


def test_the_time_ends_the_search(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        clocks(patched, run=60)
        found = run(problem, tmp_path / "s", "Magnitude(Free(0.1, 0.5))", recover=Direct(2), minutes=4)
    assert len(sampled(found)) == 3
    assert found.result["notes"] == [
        "the search ended after its 4 minutes, with 3 trials of at most 4; it can be resumed"
    ]
    assert len(sampled(run(problem, tmp_path / "s", "Magnitude(Free(0.1, 0.5))", recover=Direct(2), resume=True))) == 4
