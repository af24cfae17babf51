"""Tasks: losses and scores, splits that share nothing, task files; recoveries as text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import laconic as lc
from laconic.errors import CheckpointError, DataError, SchemeError
from laconic.model.judging import default_loss, default_score
from laconic.recover import LC, Direct, FineTune, Steps, Task, load_task, parse_recovery, recover, recover_task
from laconic.recover.batches import stream
from tests.recover.nets import conv, mlp, task, untouched, vectors


def test_judge_averages_over_examples_and_leaves_the_model_alone() -> None:
    net = mlp().train()
    x, y = vectors(50, 2)
    problem = Task([(x, y)], [])
    with untouched(net):
        found = problem.judge(net, DataLoader(TensorDataset(x, y), 16, shuffle=True))  # 16, 16, 16 and 2
    logits = net.eval()(x).detach()
    assert found.examples == 50
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert found.score == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_a_score_of_ones_own_and_one_that_is_a_single_number() -> None:
    net, (x, y) = mlp(), vectors(50, 2)
    data = [(x[:40], y[:40]), (x[40:], y[40:])]
    each = Task([], [], score=lambda output, batch: (output.argmax(1) == batch[1]).float()).judge(net, data)
    batch = Task([], [], score=lambda output, batch: (output.argmax(1) == batch[1]).float().mean()).judge(net, data)
    assert each.score == pytest.approx(batch.score) == pytest.approx(Task([], []).judge(net, data).score)


def test_default_losses() -> None:
    g = torch.Generator().manual_seed(0)
    tokens, logits = torch.randint(7, (2, 5), generator=g), torch.randn(2, 5, 7, generator=g)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), tokens[:, 1:].reshape(-1))
    assert torch.equal(default_loss(logits, {"input_ids": tokens, "use_cache": False}), expected)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    kept = torch.cat([logits[0, :4], logits[1, :1]]), torch.cat([tokens[0, 1:], tokens[1, 1:2]])
    assert torch.allclose(default_loss(logits, {"input_ids": tokens, "attention_mask": mask}), F.cross_entropy(*kept))
    assert torch.allclose(
        default_loss(logits, (tokens, tokens)), F.cross_entropy(logits.reshape(-1, 7), tokens.reshape(-1))
    )


def test_the_default_score_is_only_for_one_class_per_example() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert default_score(logits, (None, torch.tensor([0, 0]))).tolist() == [1.0, 0.0]  # type: ignore[union-attr]
    assert default_score(logits, {"labels": torch.tensor([1, 1])}).tolist() == [0.0, 1.0]  # type: ignore[union-attr]
    assert default_score(logits, (None, torch.tensor([0.0, 0.0]))) is None  # a regression's targets
    assert default_score(torch.tensor([0.3, -2.0]), (None, torch.tensor([1, 0]))) is None  # one logit per example
    assert default_score(logits, (None, torch.tensor([[0, 1], [1, 0]]))) is None
    assert default_score(logits, logits) is None


def test_without_a_class_the_score_is_minus_the_loss() -> None:
    x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20.0)
    found = Task([], [], loss=lambda output, batch: F.mse_loss(output.squeeze(1), batch[1])).judge(
        nn.Linear(3, 1), [(x[:15], y[:15]), (x[15:], y[15:])]
    )
    assert found.score == pytest.approx(-found.loss)


BATCHES: dict[str, tuple[Any, Any]] = {
    "a lone tensor": (torch.randn(4, 3), torch.randn(4, 3)),
    "targets that are no classes": (torch.randn(4, 3), (torch.randn(4, 3), torch.randn(4))),
    "targets of another shape": (torch.randn(4, 3, 2), (torch.randn(4, 3), torch.arange(4))),
    "targets that are no tensor": (torch.randn(4, 3), (torch.randn(4, 3), [0, 1, 2, 0])),
    "a dict that is no text": (torch.randn(4, 3), {"pixels": torch.randn(4, 3)}),
    "a dict whose labels the model ignores": (
        torch.randn(4, 3),
        {"input_ids": torch.arange(4), "labels": torch.arange(4)},
    ),
    "hidden states": ({"last_hidden_state": torch.randn(4, 3, 2)}, {"input_ids": torch.ones(4, 3, dtype=torch.int64)}),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_no_default_loss(kind: str) -> None:
    with pytest.raises(DataError, match="pass loss="):
        default_loss(*BATCHES[kind])


def test_a_loss_that_is_no_mean() -> None:
    problem = Task([], [], loss=lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"))
    with pytest.raises(DataError, match=r"one number, got \(64,\)"):
        problem.judge(mlp(), [vectors(64, 0)])


class Once:
    """Data that looks like a collection and is exhausted after one pass."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def test_splits_that_are_none() -> None:
    good = [vectors(8, 1)]
    with pytest.raises(DataError, match="validation: expected data that can be gone through again"):
        Task(good, iter([vectors(8, 2)])).checked()
    with pytest.raises(DataError, match="test: expected data that can be gone through again"):
        Task(good, [vectors(8, 2)], (vectors(8, i) for i in (3, 4))).checked()
    with pytest.raises(DataError, match="validation: .*exhausted after one pass"):
        Task(good, Once([vectors(8, 2)])).checked()
    with pytest.raises(DataError, match="train: expected batches, got none"):
        Task([], good).checked()
    with pytest.raises(DataError, match="validation: expected batches, got none"):
        Task(good, []).checked()
    with pytest.raises(DataError, match="train: expected an iterable of batches.* got a TensorDataset"):
        Task(TensorDataset(*vectors(8, 1)), [vectors(8, 2)]).checked()
    with pytest.raises(DataError, match="expected a batch"):
        Task([{"labels": torch.arange(3)}], [vectors(8, 2)]).checked()


@pytest.mark.parametrize("where", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_that_share_an_example(where: tuple[str, str]) -> None:
    splits = {"train": vectors(40, 1), "validation": vectors(30, 2), "test": vectors(20, 3)}
    assert Task(*([pair] for pair in splits.values())).checked().test is not None
    splits[where[1]][0][11] = splits[where[0]][0][7]
    batches = {name: [(x[:16], y[:16]), (x[16:], y[16:])] for name, (x, y) in splits.items()}
    with pytest.raises(DataError, match=rf"example 7 of {where[0]} is example 11 of {where[1]}"):
        Task(**batches).checked()


def test_examples_are_compared_by_all_their_inputs() -> None:
    """Equal masks are no equal examples; equal examples are found whatever stands before them, and whatever their labels."""
    mask = torch.ones(6, 5, dtype=torch.int64)
    ids = [torch.arange(30).view(6, 5) + 100 * i for i in range(3)]

    def split(i: int, label: int) -> list[dict[str, Any]]:
        return [{"attention_mask": mask, "input_ids": ids[i], "use_cache": False, "labels": torch.full((6,), label)}]

    Task(split(0, 1), split(1, 1), split(2, 1)).checked()
    with pytest.raises(DataError, match="example 0 of train is example 0 of validation"):
        Task(split(0, 1), split(0, 2)).checked()


def test_recover_checks_the_splits_and_the_weights() -> None:
    shared = vectors(16, 1)
    with pytest.raises(DataError, match="may not share"):
        recover(mlp(), "Magnitude(0.5)", Direct(), train=[shared], validation=[shared])
    with pytest.raises(DataError, match="train: expected batches"):
        recover(mlp(), "Magnitude(0.5)", validation=[shared])
    broken = mlp()
    with torch.no_grad():
        broken[3].weight[2, 1] = torch.nan  # type: ignore[index, union-attr, operator]
    with pytest.raises(CheckpointError, match=r"3\.weight: holds NaN"):
        recover(broken, "Magnitude(0.5)", Direct(), train=[vectors(16, 1)], validation=[vectors(16, 2)])


def test_recover_from_python() -> None:
    net, problem = mlp(), task()
    with untouched(net):
        compressed, found = recover(
            net, "Magnitude(0.6)", LC(3, 10, mu=0.1, learn=Steps(lr=0.1, lr_end=0.1)), train=problem.train, validation=problem.validation,
            test=problem.test,
        )  # fmt: skip
    assert found.score > found.direct
    figures = found.as_dict()
    assert figures["scheme"] == "Magnitude(sparsity=0.6)"
    assert figures["test_score"] == problem.judge(compressed, problem.test).score  # type: ignore[arg-type]
    assert "state" not in figures


def test_half_precision_is_computed_in_float32_and_flags_come_back() -> None:
    net = mlp().bfloat16()
    net[5].requires_grad_(False)
    compressed, _ = recover_task(net, "Magnitude(0.5)", LC(1, 2), task())
    assert net[0].weight.dtype == torch.bfloat16
    assert compressed[0].bias.dtype == torch.float32  # type: ignore[index, union-attr]
    assert compressed[0].bias.requires_grad  # type: ignore[index, union-attr]
    assert not compressed[5].bias.requires_grad  # type: ignore[index, union-attr]


def test_a_state_is_where_another_recovery_starts() -> None:
    net, problem = conv(), task()
    learn = Steps(lr=0.1, lr_end=0.1)
    _, first = recover_task(net, "Magnitude(0.5)", LC(3, 8, mu=0.1, learn=learn), problem)
    _, warm = recover_task(net, "Magnitude(0.55)", LC(1, 1, mu=0.1), problem, start=first.state)
    _, cold = recover_task(net, "Magnitude(0.55)", LC(1, 1, mu=0.1), problem)
    assert warm.direct > cold.direct


def test_statistics_are_not_gathered_for_a_scheme_that_reads_none() -> None:
    """And the training data are then not even gone through."""

    class Never:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("nobody should look")

    recover_task(mlp(), "Magnitude(0.5)", Direct(), Task(Never(), [vectors(16, 2)]))
    with pytest.raises(AssertionError, match="nobody"):
        recover_task(mlp(), "GPTQ(bits=4, group='channel')", Direct(), Task(Never(), [vectors(16, 2)]))


class Noisy(TensorDataset):
    """Images that are augmented as they are read, from the global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(x.shape), y


def test_the_order_of_batches_follows_from_the_seed_also_for_a_generator_of_the_loaders_own() -> None:
    x, y = vectors(24, 1)
    own = torch.Generator().manual_seed(5)
    for loader in (
        DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=own),
        DataLoader(TensorDataset(x, y), 8, shuffle=True),
    ):

        def drawn(seed: int, loader: Any = loader) -> Tensor:
            return torch.cat([batch[1] for _, batch in zip(range(7), stream(loader, seed), strict=False)])

        assert torch.equal(drawn(0), drawn(0))
        assert not torch.equal(drawn(0), drawn(1))
        assert not torch.equal(drawn(0)[:24], drawn(0)[24:48])  # another order at every pass


def test_the_users_random_state_survives_loaders_of_all_kinds() -> None:
    data = Noisy(*vectors(48, 1)), Noisy(*vectors(24, 2))
    net = conv()
    with untouched(net):
        problem = Task(DataLoader(data[0], 16, shuffle=True), DataLoader(data[1], 16)).checked()
        recover_task(net, "GPTQ(bits=4, group='channel')", LC(2, 2, mu=0.1, norm_batches=2), problem)


TASK = """
import torch
from torch import nn

def data(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g))]

model = nn.Linear(6, 3)
train, validation, test = data(1), data(2), data(3)

def score(output, batch):
    return -(output.argmax(1) - batch[1]).abs().float()
"""


def test_a_task_file(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(TASK)
    model, problem = load_task(file)
    assert isinstance(model, nn.Linear)
    assert problem.test is not None
    assert problem.loss is None
    assert problem.judge(model, problem.validation).score <= 0
    assert torch.equal(problem.sample(), problem.validation[0][0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "said"),
    [(("model = nn", "net = nn"), "found no variable 'model'"), (("train, validation", "train, _"), "found no variable 'validation'"),
     (("nn.Linear(6, 3)", "'resnet'"), "a model that is a str")],
)  # fmt: skip
def test_a_task_file_that_lacks_something(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(TASK.replace(*change))
    with pytest.raises(DataError, match=said):
        load_task(file)


def test_no_task_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such task file"):
        load_task(tmp_path / "task.py")


@pytest.mark.parametrize(
    "how",
    [LC(), Direct(norm_batches=3), FineTune(20, Steps("adam", 1e-3, 1e-3, clip=None)),
     LC(5, 10, first=40, mu=0.02, a=1.3, learn=Steps(lr=0.1), multipliers=False, refit=False, then=FineTune(7, checks=1), norm_batches=2)],
)  # fmt: skip
def test_a_recovery_is_its_text(how: Any) -> None:
    assert parse_recovery(repr(how)) == how


def test_recoveries_as_text() -> None:
    assert parse_recovery("LC") == LC()
    assert parse_recovery(" LC(10, 50, then=FineTune(200)) ") == LC(10, 50, then=FineTune(200))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LC(", "not a Python expression"), ("LCC()", "unknown 'LCC'.*did you mean 'LC'"), ("LC(stepz=3)", "no argument 'stepz'.*'steps'"),
        ("LC(3, steps=3)", "'steps' twice"), ("Direct(1, 2)", "takes 1 argument"), ("Steps()", "expected LC"), ("3", "expected LC"),
        ("LC(mu=x + 1)", "expected a number"), ("LC(**{'mu': 1})", "no argument"), ("__import__('os').system('ls')", "expected a number"),
        ("open('x')", "unknown 'open'"), ("LC(steps='3')", "LC"), ("LC(steps=0)", "at least 1"), ("LC(then=Direct())", "FineTune"),
        ("LC(2.5)", "whole number"), ("FineTune(True)", "whole number"),
    ],
)  # fmt: skip
def test_text_that_is_no_recovery(text: str, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        parse_recovery(text)


def test_the_scheme_is_checked_before_training() -> None:
    with pytest.raises(SchemeError, match="rank 99 of a"):
        recover_task(mlp(), lc.LowRank(99), LC(), task())


def one(model: nn.Module) -> float:
    return 0.0


def probe(output: Any, generator: torch.Generator) -> Tensor:
    return output.sum()


FUNCTIONS: dict[str, Any] = {
    "of the model": one,
    "with a generator": probe,
    "of three": lambda a, b, c: a,
    "no function": 3,
    "of anything": None,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("name", ["loss", "score"])
def test_a_loss_and_a_score_are_of_output_and_batch(name: str, kind: str) -> None:
    """Found when the task is checked, before anything is compressed or trained."""
    if kind == "of anything":
        Task([vectors(8, 1)], [vectors(8, 2)], **{name: lambda *both: both[0].sum()}).checked()
        return
    with pytest.raises(
        DataError, match=rf"{name}: expected a function {name}\(output, batch\) of the model's output and the batch"
    ):
        recover(mlp(), "RTN(4)", Direct(), train=[vectors(8, 1)], validation=[vectors(8, 2)], **{name: FUNCTIONS[kind]})
