"""Resuming: a killed recovery goes on to the same bytes; other runs' folders and damaged states are refused."""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import laconic as lc
from laconic.engine.saved import save
from laconic.errors import CheckpointError, OutputError, SchemeError
from laconic.host.progress import Log
from laconic.recover import LC, Direct, FineTune, Recovered, Steps, StopRecovery, Task, deliver, recover_task
from laconic.recover.checkpoint import STATE, Checkpoints
from laconic.recover.deliver import recover_directory
from laconic.recover.train import Trainer
from tests.processes import THREADS
from tests.recover.nets import conv, mlp, task, vectors

LEARN = Steps(lr=0.05, lr_end=0.005)


class Noisy(TensorDataset):
    """Images that are augmented as they are read, from torch's global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


def noisy_task() -> Task:
    own = torch.Generator().manual_seed(3)
    return Task(DataLoader(Noisy(*vectors(80, 1)), 16, shuffle=True, generator=own), [vectors(64, 2)])


class Killed(Exception):  # noqa: N818 - what happens to a run
    pass


def killed_after(step: int) -> Any:
    def listen(point: dict[str, Any]) -> None:
        if point.get("step") == step:
            raise Killed

    return listen


def stored(model: nn.Module, place: Path) -> bytes:
    save(model, place)
    return (place / "model.safetensors").read_bytes() + (place / "laconic.json").read_bytes()


def figures(found: Recovered) -> dict[str, Any]:
    return {key: value for key, value in found.as_dict().items() if key != "seconds"}


CASES: dict[str, tuple[str, LC]] = {
    "sgd": (
        "Magnitude(0.6, scope='model') >> KMeans(bits=3)",
        LC(5, 7, first=9, mu=0.05, a=1.2, learn=LEARN, norm_batches=2),
    ),
    "adam": ("GPTQ(bits=3, group='channel')", LC(5, 7, mu=0.05, learn=Steps("adam", 1e-3, 1e-3))),
    "a sum": ("RTN(3, 'channel') + LowRank(2)", LC(5, 7, mu=0.05, learn=LEARN)),
    "no refit": (
        "Magnitude(0.5) >> RTN(4, 'channel')",
        LC(5, 7, mu=0.05, learn=LEARN, refit=False, then=FineTune(9, LEARN, checks=2)),
    ),
    "plain": ("LowRank(0.5)", LC(5, 7, mu=0.05, learn=Steps(lr=0.05, lr_end=0.005, momentum=0.0), multipliers=False)),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("step", [-1, 0, 3])
def test_killed_and_resumed_it_gives_the_same_bytes(kind: str, step: int, tmp_path: Path) -> None:
    """With dropout or batch norms, shuffled and augmented data, killed within a pass over them; the curve and the state are the same too."""
    scheme, how = CASES[kind]
    net = conv().append(nn.Dropout(0.2))
    whole, expected = recover_task(net, scheme, how, noisy_task())
    with pytest.raises(Killed):
        recover_task(net, scheme, how, noisy_task(), folder=tmp_path / "run", listen=killed_after(step))
    assert (tmp_path / "run" / STATE).exists() == (
        step >= 0
    )  # what was trained when a listener ended the run is stored
    torch.rand(5)  # another process has another random state
    heard: list[dict[str, Any]] = []
    resumed, found = recover_task(
        net, scheme, how, noisy_task(), folder=tmp_path / "run", resume=True, listen=heard.append
    )
    assert stored(resumed, tmp_path / "a") == stored(whole, tmp_path / "b")
    assert figures(found) == figures(expected)
    assert heard == expected.curve  # a listener that stops by the whole curve decides as it would have
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())
    assert not (tmp_path / "run" / STATE).exists()


TAIL = LC(
    2,
    5,
    mu=0.05,
    a=1.2,
    learn=LEARN,
    norm_batches=2,
    then=FineTune(13, Steps("adam", 2e-3, 2e-4), checks=3, norm_batches=2),
)


@pytest.mark.parametrize(
    "scheme", ["Magnitude(0.6, scope='model') >> KMeans(bits=3)", "DKM(bits=2, tau=0.2, tau_end=0.02)"]
)
@pytest.mark.parametrize("check", [0, 1, 2])
def test_killed_in_the_training_after_l_c(scheme: str, check: int, tmp_path: Path) -> None:
    """The L-steps are not taken again, nor the checks that were told."""
    net, trained = conv().append(nn.Dropout(0.2)), []

    def killed(point: dict[str, Any]) -> None:
        trained.append(point["phase"])
        if trained.count("fine-tuning") > check:
            raise Killed

    whole, expected = recover_task(net, scheme, TAIL, noisy_task())
    with pytest.raises(Killed):
        recover_task(net, scheme, TAIL, noisy_task(), folder=tmp_path / "run", listen=killed)
    told = Checkpoints(tmp_path / "run", resuming=True, fingerprint=fingerprint(tmp_path / "run")).claim()
    assert told is not None
    assert told["done"] == 2 + check + 1
    resumed, found = recover_task(net, scheme, TAIL, noisy_task(), folder=tmp_path / "run", resume=True)
    assert stored(resumed, tmp_path / "a") == stored(whole, tmp_path / "b")
    assert figures(found) == figures(expected)
    assert [point["phase"] for point in found.curve] == ["direct", "L-C", "L-C", *["fine-tuning"] * 3]


def fingerprint(folder: Path) -> str:
    with safe_open(folder / STATE, framework="pt") as reader:
        return str(json.loads(reader.metadata()["state"])["fingerprint"])


def test_notes_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    """What was found in L-C is told, although the run that tells it only did the rest."""
    how = LC(2, 3, mu=1e-6, learn=LEARN, then=FineTune(4, LEARN, checks=2))
    _, expected = recover_task(mlp(), "Magnitude(0.9)", how, task())
    assert any("mu is too small" in note for note in expected.notes)

    def killed(point: dict[str, Any]) -> None:
        if point["minibatches"] == how.total:
            raise Killed

    with pytest.raises(Killed):
        recover_task(mlp(), "Magnitude(0.9)", how, task(), folder=tmp_path, listen=killed)
    _, found = recover_task(mlp(), "Magnitude(0.9)", how, task(), folder=tmp_path, resume=True)
    assert found.notes == expected.notes


def test_skipped_minibatches_are_still_counted(tmp_path: Path) -> None:
    x, y = vectors(16, 9)
    data = [(x * torch.nan, y), *(vectors(16, seed) for seed in range(20, 29))]
    problem, how = Task(data, [vectors(64, 2)]), LC(4, 5, mu=0.1)
    _, expected = recover_task(conv(), "Magnitude(0.5)", how, problem)
    with pytest.raises(Killed):
        recover_task(conv(), "Magnitude(0.5)", how, problem, folder=tmp_path, listen=killed_after(2))
    _, found = recover_task(conv(), "Magnitude(0.5)", how, problem, folder=tmp_path, resume=True)
    assert [p.get("skipped") for p in found.curve] == [None, 1, 1, 2, 2]
    assert figures(found) == figures(expected)


PROGRAM = """
import sys
from pathlib import Path
from tests.recover.test_resume import CASES, conv, noisy_task, recover_task
scheme, how = CASES["sgd"]
recover_task(conv(), scheme, how, noisy_task(), folder=sys.argv[1], listen=lambda point: print(point.get("step"), flush=True) or
             (point.get("step") == 3 and __import__("time").sleep(1800)))
"""


def test_kill_9(tmp_path: Path) -> None:
    """A process that is killed while L-step 3's listener runs: its state is that after step 2."""
    scheme, how = CASES["sgd"]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(THREADS)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "3":
                break
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / STATE).is_file()
    resumed, _ = recover_task(conv(), scheme, how, noisy_task(), folder=tmp_path / "run", resume=True)
    whole, _ = recover_task(conv(), scheme, how, noisy_task())
    assert stored(resumed, tmp_path / "a") == stored(whole, tmp_path / "b")


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A folder with a recovery that was killed after its second L-step."""
    with pytest.raises(Killed):
        recover_task(mlp(), "Magnitude(0.5)", LC(3, 4, mu=0.1), task(), folder=tmp_path / "run", listen=killed_after(2))
    return tmp_path / "run"


def test_an_unfinished_recovery_is_not_overwritten(unfinished: Path) -> None:
    before = (unfinished / STATE).read_bytes()
    for how in (LC(3, 4, mu=0.1), Direct(), FineTune(2)):
        with pytest.raises(OutputError, match="holds an unfinished recovery"):
            recover_task(mlp(), "Magnitude(0.5)", how, task(), folder=unfinished)
    assert (unfinished / STATE).read_bytes() == before


def larger(slot: Any) -> lc.Method:
    return lc.Magnitude(0.5)


def other(slot: Any) -> lc.Method:
    return lc.Magnitude(0.6)


other.__name__ = "larger"


@pytest.mark.parametrize("change", ["scheme", "how", "seed", "start", "direct"])
def test_another_run_is_refused(change: str, unfinished: Path) -> None:
    net, scheme, how, seed = mlp(), "Magnitude(0.5)", LC(3, 4, mu=0.1), 0
    if change == "scheme":
        scheme = "Magnitude(0.6)"
    elif change == "how":
        how = LC(3, 4, mu=0.2)
    elif change == "seed":
        seed = 1
    elif change == "start":
        with torch.no_grad():
            net[0].bias[0] += 1  # type: ignore[index, union-attr, operator]
    else:
        how = Direct()  # type: ignore[assignment]
    before = (unfinished / STATE).read_bytes()
    with pytest.raises(OutputError, match="holds the recovery.*this one is"):
        recover_task(net, scheme, how, task(), folder=unfinished, resume=True, seed=seed)
    assert (unfinished / STATE).read_bytes() == before


def test_another_amount_of_data_is_another_run(unfinished: Path) -> None:
    """As with another --train-tokens or --batch on the command line."""
    with pytest.raises(OutputError, match=r"6 minibatches a pass.*this one is .* 4 minibatches a pass"):
        recover_task(
            mlp(),
            "Magnitude(0.5)",
            LC(3, 4, mu=0.1),
            replace(task(), train=[vectors(16, i) for i in range(4)]),
            folder=unfinished,
            resume=True,
        )


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = vectors(64, 1)
        return iter(zip(x, y, strict=True))


@pytest.mark.parametrize("how", [LC(2, 3, mu=0.1), FineTune(4), Direct()])
def test_data_of_unknown_length(how: Any, tmp_path: Path) -> None:
    """A loader of a stream has a `__len__`, which raises."""
    problem = replace(task(), train=DataLoader(Stream(), 16))
    _, found = recover_task(mlp(), "Magnitude(0.5)", how, problem, folder=tmp_path)
    assert found.minibatches == how.total
    with pytest.raises(SchemeError, match="data that has a length, got a DataLoader"):
        recover_task(mlp(), "Magnitude(0.5)", FineTune(epochs=1), problem)


def test_functions_of_one_name_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        recover_task(mlp(), larger, LC(2, 2), task(), folder=tmp_path, listen=killed_after(1))
    with pytest.raises(OutputError, match="this one is"):
        recover_task(mlp(), other, LC(2, 2), task(), folder=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "cut off", "header", "one bit", "no state"])
def test_a_damaged_state(damage: str, unfinished: Path) -> None:
    file = unfinished / STATE
    content = bytearray(file.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "cut off":
        del content[-100:]
    elif damage == "header":
        content[9:40] = b"\0" * 31
    elif damage == "one bit":
        content[-33] ^= 4
    else:
        from safetensors.torch import save as written

        content = bytearray(written(load_file(file), {"state": "{}"}))
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{STATE}: damaged"):
        recover_task(mlp(), "Magnitude(0.5)", LC(3, 4, mu=0.1), task(), folder=unfinished, resume=True)


def test_a_listener_decides_by_the_last_point_that_was_stored(tmp_path: Path) -> None:
    """Not by an earlier one: what was trained beyond it is there."""

    def stop_early(point: dict[str, Any]) -> None:
        if point["minibatches"] == 4:
            raise StopRecovery

    how = LC(3, 4, mu=0.1)
    _, whole = recover_task(mlp(), "Magnitude(0.5)", how, task())
    with pytest.raises(Killed):
        recover_task(mlp(), "Magnitude(0.5)", how, task(), folder=tmp_path, listen=killed_after(2))
    _, found = recover_task(mlp(), "Magnitude(0.5)", how, task(), folder=tmp_path, resume=True, listen=stop_early)
    assert not found.stopped
    assert found.curve == whole.curve


def test_resuming_needs_a_folder_and_may_find_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected the folder"):
        recover_task(mlp(), "Magnitude(0.5)", LC(1, 1), task(), resume=True)
    _, found = recover_task(mlp(), "Magnitude(0.5)", LC(1, 1), task(), folder=tmp_path / "new", resume=True)
    assert found.minibatches == 1


def test_stopped_by_its_listener_it_is_complete(tmp_path: Path) -> None:
    def listen(point: dict[str, Any]) -> None:
        if point.get("step") == 1:
            raise StopRecovery

    _, found = recover_task(mlp(), "Magnitude(0.5)", LC(4, 2), task(), folder=tmp_path, listen=listen)
    assert found.stopped
    assert list(tmp_path.iterdir()) == []


def test_snapshots_do_not_move_with_what_is_trained_later() -> None:
    """Weights, of every kind there is a default of, are points of their own: changing the values they were found for changes nothing."""
    from laconic.model.sites import Stats
    from laconic.recover.projection import project_onto
    from laconic.scheme.text import known_methods

    tried = 0
    for name, method in known_methods().items():
        bare = all(p.default is not p.empty for p in inspect.signature(method).parameters.values())
        if name == "Cut" or not bare or method().wants & Stats.CHANNELS:
            continue
        scheme = lc.parse(name)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        projection = project_onto(net, scheme, data=[vectors_of(64)])
        values = {slot: net.get_submodule(slot.users[0][0]).weight.detach().clone() for slot in projection.slots}
        weights = projection.compress(values)
        decoded = {slot: weight.forward().detach().clone() for slot, weight in weights.items()}
        for value in values.values():
            value.zero_()
        assert all(torch.equal(weight.forward(), decoded[slot]) for slot, weight in weights.items()), name
        tried += 1
    assert tried >= 12


def vectors_of(width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, width, generator=g), torch.randint(width, (40,), generator=g)


@pytest.mark.parametrize("when", ["save", "write_json"])
def test_killed_while_it_is_stored_nothing_is_trained_again(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a directory's recovery stays until its model and its figures are there."""
    net, how, out = mlp(), LC(3, 4, mu=0.1), tmp_path / "out"
    arguments: dict[str, Any] = {"source": None, "overwrite": False, "seed": 0, "command": "", "progress": Log()}
    whole = recover_directory(net, lc.Magnitude(0.5), how, task(), tmp_path / "whole", resume=False, **arguments)
    with monkeypatch.context() as patched:
        patched.setattr(deliver, when, raised)
        with pytest.raises(Killed):
            recover_directory(net, lc.Magnitude(0.5), how, task(), out, resume=False, **arguments)
    with pytest.raises(OutputError, match="unfinished recovery"):
        recover_directory(net, lc.Magnitude(0.5), how, task(), out, resume=False, **arguments)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", raised)
        found = recover_directory(net, lc.Magnitude(0.5), how, task(), out, resume=True, **arguments)
    assert found["curve"] == whole["curve"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (out / STATE).exists()


def raised(*_: Any, **__: Any) -> Any:
    raise Killed
