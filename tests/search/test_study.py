"""A search as a study: stages, resuming, workers that share it or die, bad storages and bad results."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.needs import extra

extra("optuna")
extra("sklearn")

import optuna
from optuna.trial import TrialState

from laconic.errors import SearchError
from laconic.methods.free import Free
from laconic.search.drucb import Rule, propose
from laconic.search.samplers import DRUCBSampler, Settings, distribution_of
from laconic.search.study import (
    Asked,
    Search,
    ask,
    best,
    fail,
    finished,
    is_feasible,
    open_study,
    pareto,
    running,
    set_reference,
    tell,
    trials,
)
from tests.processes import PATIENCE

ONE = {"sparsity": Free(0.0, 1.0)}


def score(s: float) -> float:
    """0.9 at first, 0.88 at s = 0.677."""
    return 0.9 - 0.8 / (1 + math.exp(-(s - 0.75) / 0.02))


def throughput(s: float) -> float:
    return 1000 / (1 - 0.5 * s)


def opened(storage: Path | None = None, **options: Any) -> Search:
    given = {
        "free": ONE,
        "objectives": {"throughput": "maximize"},
        "about": {"scheme": "Magnitude(sparsity=Free(0, 1))"},
    } | options
    search = open_study(storage, "test", **given)
    set_reference(search, level=0.88, reference=0.9)
    return search


def run(search: Search, objective: Callable[[float], float] = throughput, limit: int = 100) -> list[float]:
    """Carry out a search, at most `limit` trials of it; the sparsities in order."""
    sampled: list[float] = []
    while len(sampled) < limit and (asked := ask(search, poll=0.05)) is not None:
        s = asked.values["sparsity"]
        with running(search, asked):
            tell(search, asked, score(s), [objective(s)], minibatches=3)
        sampled.append(s)
    return sampled


def test_the_two_stages(capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    search = opened()
    run(search, lambda s: 1000 - 4000 * (s - 0.3) ** 2)
    measured = [t for t in trials(search) if t.state is TrialState.COMPLETE]
    stages = [t.user_attrs["stage"] for t in measured]
    assert stages == sorted(stages)
    assert set(stages) == {1, 2}
    top = max(t.params["sparsity"] for t in measured if is_feasible(t))
    assert 0.667 < top <= 0.678
    assert all(t.params["sparsity"] < top for t in measured if t.user_attrs["stage"] == 2)
    assert best(search).values[0] > 990
    assert search.study.best_trial.number == best(search).number  # what optuna-dashboard calls the best
    assert [is_feasible(t) for t in measured] == [t.user_attrs["score"] >= 0.88 for t in measured]
    assert measured[1].user_attrs["domain"] == [0.5, 0.999]
    assert {len(values) for values in measured[1].user_attrs["posterior"].values()} == {101}
    assert measured[0].user_attrs["minibatches"] == 3
    assert optuna.logging.get_verbosity() == verbosity
    assert capfd.readouterr().err == ""


def test_a_monotone_objective_ends_the_search_after_stage_1() -> None:
    search = opened(settings=Settings(trials=20))
    sampled = run(search)
    assert finished(search)
    assert len(sampled) <= 8
    assert 0.667 < best(search).params["sparsity"] <= 0.678


def test_a_resumed_study_takes_the_same_samples(tmp_path: Path) -> None:
    whole = run(opened())
    parts = run(opened(tmp_path / "deep" / "study.db"), limit=2) + run(opened(tmp_path / "deep" / "study.db"), limit=3)
    parts += run(opened(tmp_path / "deep" / "study.db"))
    assert parts == whole
    assert ask(opened(tmp_path / "deep" / "study.db")) is None


def test_more_trials_may_be_added_and_the_first_facts_hold(tmp_path: Path) -> None:
    settings = Settings(trials=2)
    assert len(run(opened(tmp_path / "study.db", settings=settings))) == 2
    search = open_study(
        tmp_path / "study.db",
        "test",
        free=ONE,
        objectives={"throughput": "maximize"},
        about={"scheme": "Magnitude(sparsity=Free(0, 1))"},
    )
    assert set_reference(search, level=0.5, reference=0.6) == {"level": 0.88, "reference": 0.9}
    assert len(run(search)) > 2


def test_another_search_under_the_same_name(tmp_path: Path) -> None:
    opened(tmp_path / "study.db")
    with pytest.raises(
        SearchError,
        match=r"free.sparsity was 'Free\(0.0, 1.0\)' and is 'Free\(0.0, 0.5\)'; settings.rule.gamma was 0.95 and is 0.5",
    ):
        opened(tmp_path / "study.db", free={"sparsity": Free(0.0, 0.5)}, settings=Settings(rule=Rule(gamma=0.5)))
    with pytest.raises(SearchError, match="objectives.bytes was None and is 'minimize'"):
        opened(tmp_path / "study.db", objectives={"bytes": "minimize"})
    with pytest.raises(SearchError, match="exists already"):
        opened(tmp_path / "study.db", resume=False)
    optuna.logging.disable_default_handler()
    other = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="foreign")
    other.add_trial(optuna.trial.create_trial(value=1.0))
    optuna.logging.enable_default_handler()
    with pytest.raises(SearchError, match="not made by laconic"):
        open_study(tmp_path / "study.db", "foreign", free=ONE, objectives={"throughput": "maximize"})


def work(storage: Path, heartbeat: int, die: bool, met: Any = None) -> None:
    """A worker's whole life, in a process of its own; `met`: a barrier that all workers reach with their first trial."""
    search = opened(storage, heartbeat=heartbeat)
    while (asked := ask(search, poll=0.1)) is not None:
        with running(search, asked):
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            if met is not None:
                met.wait(PATIENCE)
                met = None
            s = asked.values["sparsity"]
            tell(search, asked, score(s), [throughput(s)], worker=os.getpid())


def worker(*arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the workers are forked")


@needs_fork
def test_two_workers_share_the_trials(tmp_path: Path) -> None:
    met = multiprocessing.get_context("fork").Barrier(2)
    both = [worker(tmp_path / "study.db", PATIENCE, False, met) for _ in range(2)]
    for process in both:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in both] == [0, 0]
    search = opened(tmp_path / "study.db")
    measured = [t for t in trials(search) if t.state is TrialState.COMPLETE]
    assert len(measured) <= 10
    assert len({t.params["sparsity"] for t in measured}) == len(measured)
    assert 0.66 < best(search).params["sparsity"] <= 0.678
    assert {t.user_attrs["worker"] for t in measured} == {process.pid for process in both}
    assert ask(search) is None


@needs_fork
def test_the_trial_of_a_killed_worker_is_run_again(tmp_path: Path) -> None:
    killed = worker(tmp_path / "study.db", 1, True)
    killed.join(timeout=PATIENCE)
    assert killed.exitcode == -signal.SIGKILL
    search = opened(tmp_path / "study.db", heartbeat=1)
    assert [t.state for t in trials(search)] == [TrialState.RUNNING]
    time.sleep(3.1)  # two heartbeats, and the second's fraction that a database does not keep
    sampled = run(search)
    first, second = trials(search)[:2]
    assert first.state is TrialState.FAIL
    assert second.state is TrialState.COMPLETE
    assert second.params == first.params
    assert second.user_attrs["retry_of"] == 0
    assert second.user_attrs["domain"] == first.user_attrs["domain"]
    assert sampled == run(opened())


def test_a_heartbeat_keeps_a_long_trial(tmp_path: Path) -> None:
    search, other = opened(tmp_path / "study.db", heartbeat=1), opened(tmp_path / "study.db", heartbeat=1)
    asked = ask(search)
    with running(search, asked):
        time.sleep(3.5)
        beside = ask(other)
        assert beside is not None
        assert beside.values != asked.values
        assert trials(other)[0].state is TrialState.RUNNING
        tell(search, asked, score(asked.values["sparsity"]), [1.0])
    assert trials(other)[0].state is TrialState.COMPLETE


def test_waiting_for_another_worker_ends_in_time() -> None:
    search = opened(settings=Settings(trials=1))
    assert ask(search) is not None
    began = time.time()
    assert ask(search, until=began + 0.3) is None
    assert time.time() - began > 0.25
    assert not finished(search)


def test_noise_of_the_score_is_the_rules_margin(tmp_path: Path) -> None:
    options = {"free": ONE, "objectives": {"throughput": "maximize"}}
    search = open_study(tmp_path / "study.db", "test", **options)  # type: ignore[arg-type]
    set_reference(search, level=0.88, reference=0.9, noise=0.004)
    tell(search, ask(search), 0.877, [1.0])
    assert ask(search).values["sparsity"] > 0.7  # 0.877 at 0.5 is doubted
    open_study(tmp_path / "study.db", "test", settings=Settings(rule=Rule(margin=0.01)), **options)  # type: ignore[arg-type]


def test_a_result_that_comes_late_is_kept(tmp_path: Path) -> None:
    search = opened(tmp_path / "study.db")
    asked = ask(search)
    fail(search, asked, "taken over")
    tell(search, asked, 0.89, [1234.0])
    late = trials(search)[1]
    assert (late.state, late.values, late.params) == (TrialState.COMPLETE, [1234.0], asked.values)
    assert late.user_attrs["late"] == 0
    assert is_feasible(late)


def test_a_trial_that_kills_every_worker_is_given_up() -> None:
    search = opened()
    asked = ask(search)
    for _ in range(2):
        _die(search, asked)
        asked = ask(search)
    with pytest.raises(SearchError, match="has ended 3 workers"):
        _die(search, asked)


def _die(search: Search, asked: Asked) -> None:
    from laconic.search.retries import again  # what the storage calls for a silent worker's trial

    fail(search, asked, "silent")
    again(search.study, trials(search)[asked.number])


def test_interrupted_and_failed_trials() -> None:
    search = opened()
    asked = ask(search)
    with pytest.raises(KeyboardInterrupt), running(search, asked):
        raise KeyboardInterrupt
    again = ask(search)
    assert again.values == asked.values
    assert again.stage == 1
    with pytest.raises(ZeroDivisionError), running(search, again):
        1 / 0  # noqa: B018
    assert trials(search)[again.number].user_attrs["failure"] == "ZeroDivisionError: division by zero"
    assert ask(search).values == asked.values  # a failed trial is as if it had not been


def test_results_that_are_no_numbers() -> None:
    search = opened()
    asked = ask(search)
    with pytest.raises(SearchError, match="the objective 'throughput' is nan"):
        tell(search, asked, 0.9, [math.nan])
    assert trials(search)[0].state is TrialState.FAIL
    assert "throughput" in trials(search)[0].user_attrs["failure"]
    with pytest.raises(SearchError, match="the score is nan"):
        tell(search, ask(search), math.nan, [1.0])
    tell(search, ask(search), -math.inf, [1.0])  # a run that diverged
    assert not is_feasible(trials(search)[2])
    assert ask(search).values["sparsity"] < 0.5


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:secret@127.0.0.1:1/db",
        "mysql+pymysql://me:secret@127.0.0.1:1/db",
        "nonsense://me:secret@host/db",
    ],
)
def test_a_storage_that_does_not_answer(address: str) -> None:
    with pytest.raises(SearchError, match=r"me:\*\*\*@") as error:
        opened(address)
    assert "secret" not in str(error.value)


def test_a_storage_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("this is not a database, but long enough to look like one\n" * 100)
    with pytest.raises(SearchError, match=r"study\.db.*not a database"):
        opened(tmp_path / "study.db")
    with pytest.raises(SearchError, match="no place"):
        opened(tmp_path / "study.db" / "below.db")
    with pytest.raises(SearchError, match="unable to open"):
        opened(tmp_path)


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    run(opened(tmp_path / "a {b} 100%?#.db"), limit=1)
    assert (tmp_path / "a {b} 100%?#.db").is_file()


def test_what_cannot_be_searched() -> None:
    with pytest.raises(SearchError, match="nothing to search"):
        opened(free={})
    with pytest.raises(SearchError, match="one real number for one objective"):
        opened(free={"bits": Free(2, 8, integer=True)}, settings=Settings(sampler="drucb"))
    with pytest.raises(SearchError, match="maximize or minimize"):
        opened(objectives={})
    with pytest.raises(SearchError, match="at least one trial"):
        Settings(trials=0)
    search = open_study(None, "test", free=ONE, objectives={"throughput": "maximize"})
    with pytest.raises(SearchError, match="not reached by the uncompressed model"):
        set_reference(search, level=0.9, reference=0.88)
    with pytest.raises(SearchError, match="call set_reference first"):
        ask(search)
    with pytest.raises(SearchError, match="numbers, text and None"):
        distribution_of(Free(choices=((1, 2), (3, 4))))


MANY = {"sparsity": Free(0.0, 1.0), "block": Free(1, 16, integer=True), "dtype": Free(choices=("float16", "float32"))}


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
@pytest.mark.parametrize("objectives", [{"bytes": "minimize"}, {"bytes": "minimize", "throughput": "maximize"}])
def test_several_variables_and_objectives(
    sampler: str, objectives: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def carry_out(search: Search, limit: int = 100) -> list[dict[str, Any]]:
        sampled: list[dict[str, Any]] = []
        while len(sampled) < limit and (asked := ask(search)) is not None:
            s, block = asked.values["sparsity"], asked.values["block"]
            values = [(1 - s) * (4 if asked.values["dtype"] == "float32" else 2), s * block][: len(objectives)]
            tell(search, asked, score(s + 0.01 * block), values)
            sampled.append(asked.values)
        return sampled

    options = {"free": MANY, "objectives": objectives, "settings": Settings(sampler=sampler, trials=6, startup=4)}  # type: ignore[arg-type]
    search = opened(None, **options)
    whole = carry_out(search)
    front = pareto(search)
    assert len(whole) == 6
    assert front
    assert all(t.user_attrs["score"] >= 0.88 for t in front)
    assert all(t.constraints == {"score": pytest.approx(0.88 - t.user_attrs["score"])} for t in trials(search))
    if len(objectives) == 1:
        assert best(search).number == front[0].number
    else:
        with pytest.raises(SearchError, match="no single best"):
            best(search)
    if len(objectives) == 1:
        assert (
            carry_out(opened(tmp_path / "s.db", **options), 5) + carry_out(opened(tmp_path / "s.db", **options))
            == whole
        )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("sampler", "rule"), [("auto", "two-sided"), ("two-sided", "two-sided"), ("drucb", "dr-ucb")])
def test_a_samplers_name_is_its_rule_of_stage_1(sampler: Any, rule: Any) -> None:
    """ "drucb" is Algorithm 1 as published, "two-sided" ours and the default."""
    low, high = distribution_of(ONE["sparsity"]).low, distribution_of(ONE["sparsity"]).high  # type: ignore[attr-defined]
    history: list[tuple[float, float]] = []
    for _ in range(4):
        s = propose(history, 0.88, (low, high), Rule(rule), reference=0.9).s
        history.append((s, score(s)))
    assert run(opened(settings=Settings(sampler=sampler, trials=6)), limit=4) == pytest.approx([s for s, _ in history])
    assert Settings(sampler, rule=Rule(gamma=0.5)).level_rule == Rule(rule, gamma=0.5)


def test_the_sampler_in_optunas_own_loop() -> None:
    study = optuna.create_study(
        direction="maximize", sampler=DRUCBSampler("sparsity", distribution_of(ONE["sparsity"]))
    )
    study.set_user_attr("facts", {"level": 0.88, "reference": 0.9})

    def objective(trial: Any) -> float:
        s = trial.suggest_float("sparsity", 0.001, 0.999)
        trial.set_user_attr("score", score(s))
        return throughput(s)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study.optimize(objective, n_trials=7)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    assert [t.params["sparsity"] for t in study.trials] == pytest.approx(run(opened())[:7])
