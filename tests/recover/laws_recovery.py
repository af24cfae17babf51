"""The laws every recovery obeys. Recoveries are found by walking the folder; a new one needs an example here that is over in a moment.

One more is defined in this file alone, beside a relaxation of its own: what it takes to add one.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.errors import CheckpointError, DataError, OutputError, SchemeError
from laconic.model.sites import find_slots
from laconic.recover import (
    KL,
    LC,
    AdaRound,
    Blockwise,
    Cosine,
    Direct,
    Features,
    FineTune,
    Optimizer,
    Recovered,
    Recovery,
    Steps,
    StopRecovery,
    Task,
    TaskLoss,
    known_recoveries,
    parse_recovery,
    recover_task,
)  # fmt: skip
from laconic.recover.checkpoint import STATE
from laconic.recover.course import Course
from laconic.recover.relaxed import Trained
from laconic.recover.train import Trainer
from laconic.weights import Codebook, Weight, installed
from laconic.weights.relax import Relaxation
from tests.recover.nets import bytes_of, conv, mlp, task, untouched, vectors
from tests.recover.test_resume import Killed, figures, noisy_task, stored
from tests.test_docs import DOCS

FAST = Steps(lr=0.05, lr_end=0.02)


class Table(Relaxation):
    """Trains the table of a Codebook [entries, 1]; the codes stay."""

    def __init__(self, weight: Codebook) -> None:
        super().__init__(weight)
        self.table = nn.Parameter(weight.tables().detach().flatten(0, 1).clone())

    def trained(self, w: nn.Parameter) -> dict[str, nn.Parameter]:
        return {"table": self.table}

    def forward(self, w: Tensor) -> Tensor:
        return self.table[self.weight.codes.long()].flatten(1)  # type: ignore[operator, union-attr]

    def stored(self, w: Tensor) -> Weight:
        tuned = Codebook(self.weight.shape, bits=self.weight.bit_width)  # type: ignore[arg-type]
        tuned.codes = self.weight.codes.clone()  # type: ignore[operator, union-attr]
        tuned.set_tables(self.table.detach().unsqueeze(0))
        return tuned


@dataclass(frozen=True, repr=False)
class TableTuning(Recovery):
    """Direct compression, then training of the tables alone, end to end. Source: this file."""

    minibatches: int = 12
    learn: Steps = field(default_factory=lambda: FAST)

    @property
    def total(self) -> int:
        return self.minibatches

    @property
    def learns(self) -> tuple[Steps, ...]:
        return (self.learn,)

    def run(self, course: Course) -> None:
        start, bench = course.begin(), course.bench
        trained = Trained(bench, start.weights, lambda method, weight, w: Table(weight), along="none")  # type: ignore[arg-type]
        trainer = Trainer(bench.model, bench.task, self.learn, self.total, course.seed, moved=trained.moved)
        start.restore(trainer)
        trained.restore(start.state)
        course.tell_memory(trainer, copies=2)
        for check in range(start.done, 3):
            loss = trained.run(trainer, self.total * (check + 1) // 3 - self.total * check // 3)
            course.offer(trained.stored(), check + 1, trainer.taken, trainer=trainer, state=trained.state(), loss=loss)


ADAM = Steps(
    Optimizer("AdamW", lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01), schedule=Cosine(warmup=0.2),
    loss=0.5 * TaskLoss() + 0.4 * KL(2.0) + 0.1 * Features(("4", "7")),
)  # fmt: skip
ADAM_ONLY = Steps("adam", lr=1e-2, lr_end=1e-3)
EXAMPLES: dict[str, list[Recovery]] = {
    "AdaRound": [
        AdaRound(5, 4, FAST, checks=1), AdaRound(4, 4, FAST, fisher=True, start="codes", norm_batches=2, every=1),
        AdaRound(4, 4, ADAM_ONLY, per="layer", every=2, target="compressed"),
    ],
    "Blockwise": [
        Blockwise(4, 4, FAST, every=2, patience=None), Blockwise(6, 4, ADAM_ONLY, trains="w", fisher=True, patience=None),
        Blockwise(5, 4, FAST, beside="none", norm_batches=2, patience=None), Blockwise(4, 4, FAST, trains="none", patience=None),
    ],
    "Direct": [Direct(), Direct(norm_batches=2)],
    "FineTune": [
        FineTune(7, FAST, checks=3, norm_batches=2), FineTune(6, ADAM, checks=2), FineTune(6, FAST, checks=2, along="none"),
        FineTune(6, FAST, checks=3, trains="side"), FineTune(6, ADAM, checks=2, trains="side", along="norms"),
    ],
    "LC": [
        LC(3, 3, first=4, mu=0.1, learn=FAST, norm_batches=2), LC(2, 3, learn=ADAM, refit=False, restart_optimizer=True),
        LC(2, 3, mu=0.1, learn=FAST, then=FineTune(4, FAST, checks=2, trains="side")),
    ],
}  # fmt: skip
"""Of every recovery: settings in which it differs, over in some minibatches."""
EVERY = [*(how for several in EXAMPLES.values() for how in several), TableTuning()]
SCHEME = "KMeans(bits=3)"
GRIDS = "RTN(3, 'channel')"


def scheme_of(how: Recovery) -> str:
    """A scheme whose weights this recovery trains."""
    return GRIDS if isinstance(how, AdaRound) else SCHEME


@pytest.fixture(params=EVERY, ids=lambda how: repr(how)[:60])
def how(request: pytest.FixtureRequest) -> Recovery:
    found: Recovery = request.param
    return found


def net() -> nn.Sequential:
    return conv().append(nn.Dropout(0.2))


def test_every_recovery_has_an_example() -> None:
    assert EXAMPLES.keys() == known_recoveries().keys()
    assert all(type(one).__name__ == name for name, several in EXAMPLES.items() for one in several)


@pytest.mark.parametrize("name", known_recoveries())
def test_it_says_where_it_comes_from_and_has_a_page(name: str) -> None:
    assert "Source:" in inspect.getdoc(known_recoveries()[name])  # type: ignore[operator]
    texts = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    pages = "".join(text for text in texts if f"{name}(" in text)
    assert f"`lc.{name}(" in pages or f"`{name}(" in pages
    for parameter in inspect.signature(known_recoveries()[name]).parameters:
        assert f"`{parameter}`" in pages or f"{parameter}=" in pages, parameter


def test_it_is_its_text(how: Recovery) -> None:
    if type(how).__name__ in known_recoveries():
        assert parse_recovery(repr(how)) == how
    else:
        with pytest.raises(SchemeError, match="unknown 'TableTuning'"):
            parse_recovery(repr(how))


def test_interrupted_at_every_point_it_resumes_to_the_same_bytes(how: Recovery, tmp_path: Path) -> None:
    whole, expected = recover_task(net(), scheme_of(how), how, noisy_task())
    for i in range(len(expected.curve)):
        heard: list[dict[str, Any]] = []

        def kill(point: dict[str, Any], i: int = i, heard: list[dict[str, Any]] = heard) -> None:
            heard.append(point)
            if len(heard) == i + 1:
                raise Killed

        folder = tmp_path / str(i)
        with pytest.raises(Killed):
            recover_task(net(), scheme_of(how), how, noisy_task(), folder=folder, listen=kill)
        assert (folder / STATE).exists() == (i > 0)
        again, found = recover_task(net(), scheme_of(how), how, noisy_task(), folder=folder, resume=True)
        assert stored(again, tmp_path / "a") == stored(whole, tmp_path / "b")
        assert figures(found) == figures(expected)
        assert found.state.keys() == expected.state.keys()
        assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
        assert not (folder / STATE).exists()


def test_it_is_never_worse_than_direct_compression(how: Recovery) -> None:
    """Not even where what it learns from is noise."""
    g = torch.Generator().manual_seed(1)
    wrong = [(5 * torch.randn(16, 16, generator=g), torch.randint(4, (16,), generator=g)) for _ in range(4)]
    problem = Task(wrong, [vectors(64, 2)])
    compressed, found = recover_task(net(), scheme_of(how), how, problem)
    _, direct = recover_task(net(), scheme_of(how), Direct(how.norm_batches), problem)
    assert found.loss <= direct.loss == found.curve[0]["validation_loss"]
    assert found.loss == min(point["validation_loss"] for point in found.curve)
    assert problem.judge(compressed, problem.validation).loss == pytest.approx(found.loss, abs=1e-6)


def test_it_leaves_the_user_alone(how: Recovery) -> None:
    """Model, modes, flags, gradients and the random states."""
    given = net().train()
    given[1].requires_grad_(False)
    given[5].eval()
    before = bytes_of(given)
    with untouched(given):
        compressed, _ = recover_task(given, scheme_of(how), how, task())
    assert bytes_of(given) == before
    assert not compressed.training
    flags = {name: p.requires_grad for name, p in given.named_parameters()}
    for name, p in compressed.named_parameters():
        assert p.requires_grad == flags.get(name, p.requires_grad)
        assert p.grad is None


class Never:
    """Training data that nobody may look at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("nobody should look")


def test_bad_input_is_refused_before_work(how: Recovery, tmp_path: Path) -> None:
    problem = Task(Never(), [vectors(64, 2)])
    with pytest.raises(SchemeError, match="rank 99"):
        recover_task(mlp(), lc.LowRank(99), how, problem)
    broken = mlp()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan  # type: ignore[index, operator, union-attr]
    with pytest.raises((CheckpointError, SchemeError), match="holds NaN|no module of the model matches"):
        recover_task(broken, scheme_of(how), how, problem)
    with pytest.raises(DataError, match="train: expected data that can be gone through again"):
        lc.recover(net(), scheme_of(how), how, train=iter([vectors(16, 1)]), validation=[vectors(64, 2)])
    (tmp_path / STATE).write_bytes(b"somebody else's")
    with pytest.raises(OutputError, match="holds an unfinished recovery"):
        recover_task(net(), scheme_of(how), how, problem, folder=tmp_path)
    with pytest.raises(SchemeError, match="expected LC"):
        lc.recover(net(), scheme_of(how), object(), train=Never(), validation=[])  # type: ignore[arg-type]


class Heard:
    """Progress that is written down."""

    def __init__(self) -> None:
        self.total, self.done = 0.0, 0.0
        self.said: list[tuple[float, str]] = []

    def plan(self, preflight: Any) -> None: ...

    def start(self, task: str, total: float) -> None:
        self.total = total

    def advance(self, units: float, note: str = "") -> None:
        self.done += units

    def site(self, record: Any) -> None: ...

    def say(self, message: str) -> None:
        self.said.append((self.done, message))


def test_it_tells_how_far_it_is_and_what_memory_it_takes(how: Recovery) -> None:
    progress = Heard()
    _, found = recover_task(net(), scheme_of(how), how, task(), progress=progress)
    total = how.total_on(net(), find_slots(net()))
    assert (progress.total, progress.done) == (max(total, 1), total)
    assert found.minibatches == total
    told = [at for at, message in progress.said if "training takes" in message]
    assert len(told) == len(how.learns)
    assert told[:1] == [0.0] * bool(told)


def test_a_listener_ends_it_with_the_best_so_far(how: Recovery) -> None:
    def stop(point: dict[str, Any]) -> None:
        raise StopRecovery

    compressed, found = recover_task(net(), scheme_of(how), how, task(), listen=stop)
    direct, _ = recover_task(net(), scheme_of(how), Direct(how.norm_batches), task())
    assert found.stopped
    assert all(torch.equal(weight(), installed(direct)[name]()) for name, weight in installed(compressed).items())


def test_it_is_counted_over_data_and_warmed(how: Recovery) -> None:
    assert how.over([vectors(16, 1)]).total == how.total
    warmed = how.warmed(0.5)
    assert warmed is None or (type(warmed) is type(how) and 0 < warmed.total < how.total)


def test_a_recovery_of_ones_own_trains_a_table_end_to_end() -> None:
    """Through the public call: tables move, codes and everything else stay, and the model gets better."""
    given, problem = conv(), task()
    data: dict[str, Any] = {"train": problem.train, "validation": problem.validation}
    direct, _ = lc.recover(given, SCHEME, Direct(), **data)
    compressed, found = lc.recover(given, SCHEME, TableTuning(60), **data)
    assert isinstance(found, Recovered)
    assert found.loss < found.curve[0]["validation_loss"] - 0.01
    for name, weight in installed(compressed).items():
        before = installed(direct)[name]
        assert isinstance(weight, Codebook)
        assert isinstance(before, Codebook)
        assert torch.equal(weight.codes, before.codes)
        assert not torch.equal(weight.tables(), before.tables())
    beside = [name for name, _ in given.named_parameters() if not name.endswith("weight") or "2" in name or "5" in name]
    for name in beside:
        if name not in installed(compressed):
            assert torch.equal(compressed.get_parameter(name), given.get_parameter(name)), name


def test_a_recovery_that_leaves_direct_compression_out_is_refused() -> None:
    @dataclass(frozen=True, repr=False)
    class Forgetful(TableTuning):
        def run(self, course: Course) -> None:
            course.offer(course.bench.projection.compress(course.bench.values()), 1, 0)

    with pytest.raises(lc.RecoveryError, match=r"has to begin with course.begin\(\)"):
        recover_task(net(), SCHEME, Forgetful(), task())
    assert replace(Forgetful(), minibatches=3).total == 3
