"""How steps are taken, as values: optimizers of torch, schedules, losses, and what they say of memory before training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import laconic as lc
from laconic.errors import SchemeError
from laconic.recover import (
    KL,
    LC,
    Constant,
    Cosine,
    Features,
    FineTune,
    Geometric,
    Linear,
    Optimizer,
    Steps,
    Task,
    TaskLoss,
    parse_recovery,
    recover_task,
)
from laconic.recover.losses import Answer, Loss, answer_of
from laconic.recover.memory import memory_of
from laconic.recover.recipes import llm_qat
from laconic.recover.schedules import Schedule
from laconic.recover.train import Trainer
from laconic.weights import installed
from tests.conftest import tiny_config
from tests.recover.nets import conv, mlp, seeded, task, vectors
from tests.recover.test_resume import Killed, figures, noisy_task, stored

USABLE = [
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
]  # fmt: skip


def after(steps: Steps) -> nn.Module:
    """A net after five steps."""
    net, problem = seeded(lambda: nn.Linear(16, 4)), task()
    Trainer(net, problem, steps, 5, teacher=seeded(lambda: nn.Linear(16, 4), 1)).run(5)
    return net


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (Steps(lr=0.1, lr_end=0.01, weight_decay=0.1), Steps(Optimizer("SGD", lr=0.1, momentum=0.9, weight_decay=0.1), lr_end=0.01)),
        (Steps("adam", lr=0.1, lr_end=0.01), Steps(Optimizer("Adam", betas=(0.9, 0.999)), lr=0.1, schedule=Geometric(end=0.1))),
        (
            Steps("adamw", lr=0.1, lr_end=0.1, beta2=0.95, weight_decay=0.2),
            Steps(Optimizer("AdamW", lr=0.1, betas=(0.9, 0.95), weight_decay=0.2), schedule=Constant()),
        ),
        (Steps(lr=0.1, distill=0.25), Steps(lr=0.1, loss=0.75 * TaskLoss() + 0.25 * KL(3.0))),
        (Steps(lr=0.1, distill=1.0, temperature=2.0), Steps(lr=0.1, loss=KL(2.0))),
    ],
    ids=["sgd", "adam", "adamw", "a share of distillation", "distillation alone"],
)  # fmt: skip
def test_texts_and_numbers_are_values(text: Steps, value: Steps) -> None:
    assert torch.equal(after(text).weight, after(value).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", USABLE)
def test_any_optimizer_of_torch_trains_resumes_and_tells_its_memory(name: str, tmp_path: Path) -> None:
    """Muon moves matrices, so biases stay as they are."""
    learn = Steps(Optimizer(name, lr=1e-2), schedule=Constant())
    how, net, scheme = FineTune(4, learn, checks=2, along="none"), mlp(), "Magnitude(0.5)"
    whole, expected = recover_task(net, scheme, how, noisy_task())
    assert len({point["validation_loss"] for point in expected.curve}) == 3  # something moved at every step

    def kill(point: dict[str, Any]) -> None:
        if point["minibatches"] == 2:
            raise Killed

    with pytest.raises(Killed):
        recover_task(net, scheme, how, noisy_task(), folder=tmp_path / "run", listen=kill)
    again, found = recover_task(net, scheme, how, noisy_task(), folder=tmp_path / "run", resume=True)
    assert stored(again, tmp_path / "a") == stored(whole, tmp_path / "b")
    assert figures(found) == figures(expected)

    matrices = {n: p for n, p in net.named_parameters() if p.dim() == 2}
    trainer = Trainer(net, task(), learn, 2, moved=matrices)
    told = memory_of(trainer, [], 0)
    trainer.run(2)
    assert told.optimizer == sum(tensor.nbytes for tensor in trainer.state().values())


def test_optimizers_are_known_by_name() -> None:
    kinds = [
        cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    ]
    every = {cls.__name__ for cls in kinds} - {"Optimizer"}
    assert set(USABLE) | {"LBFGS", "SparseAdam"} == every


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Optimizer("AdamV"), "no 'AdamV'; did you mean 'Adam"), (lambda: Optimizer("adamw"), "did you mean 'AdamW'"),
        (lambda: Optimizer("SGD", momentun=0.9), "no argument 'momentun'"), (lambda: Optimizer("AdamW", betas=(2, 3)), "Invalid beta"),
        (lambda: Optimizer("LBFGS"), "closure"), (lambda: Optimizer("SparseAdam"), "dense gradients"),
        (lambda: Steps(Optimizer("SGD", lr=0.1), lr=0.1), "lr belongs into"), (lambda: Steps(Optimizer("SGD"), momentum=0.9), "momentum belongs"),
        (lambda: Steps(schedule=Linear(), lr_end=1e-4), "lr_end belongs into the schedule"),
        (lambda: Steps(loss=KL(), distill=0.5), "distill belongs into the loss"), (lambda: Steps(loss="kl"), "a loss such as KL"),
        (lambda: Steps(schedule="cosine"), "a schedule such as Cosine"), (lambda: Steps("rmsprop"), "must be sgd, adam or adamw, or Optimizer"),
        (lambda: Steps([]), "must be sgd"), (lambda: Steps(Optimizer("SGD", lr=1e-5)), "lr_end <= lr"), (lambda: Steps(lr=-1), "lr above 0"),
        (lambda: Cosine(warmup=1), "warmup is a share"), (lambda: Linear(end=2), "end is a share"), (lambda: Geometric(end=0), "never ends at 0"),
        (lambda: Steps(lr="0.1"), "lr should be float, got '0.1'"), (lambda: Steps(clip="no"), "clip should be"),
        (lambda: Optimizer("Adam", capturable=True), "capturable"), (lambda: Optimizer("Adam", lr=float("nan")), "Invalid learning rate"),
        (lambda: KL(0), "temperature above 0"), (lambda: Features("layer"), "a tuple of names"), (lambda: -1 * KL(), "a weight from 0"),
        (lambda: FineTune(trains="scales"), "trains should be 'w' or 'side'"), (lambda: FineTune(along="biases"), "along should be"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        make()


class Never:
    def __iter__(self) -> Any:
        raise AssertionError("nobody should look")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (FineTune(2, Steps(Optimizer("Muon"))), "Muon only supports 2D"), (LC(1, 1, learn=Steps(Optimizer("Muon"))), "Muon only supports 2D"),
        (FineTune(2, Steps(loss=Features(("blocks.*",)))), "no module of the model matches 'blocks"),
        (LC(1, 1, then=FineTune(2, Steps(loss=Features(("blocks.*",))))), "no module of the model matches 'blocks"),
        (FineTune(2, Steps(loss=Features())), "no chain of blocks"),
    ],
)  # fmt: skip
def test_what_this_model_cannot_be_trained_with_is_refused_before_work(how: Any, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        recover_task(mlp(), "Magnitude(0.5)", how, Task(Never(), [vectors(64, 2)]))


def test_schedules_by_hand() -> None:
    assert [Constant().factor(t, 4) for t in range(4)] == [1, 1, 1, 1]
    assert [Linear(end=0.25).factor(t, 4) for t in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [Cosine().factor(t, 5) for t in range(5)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]
    )
    assert [Geometric(end=0.01).factor(t, 3) for t in range(3)] == pytest.approx([1, 0.1, 0.01])
    assert [Linear(warmup=0.5).factor(t, 6) for t in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0])
    assert Cosine().factor(0, 1) == 1
    assert [Steps(lr=0.1, lr_end=0.001).rate(t, 3) for t in range(3)] == pytest.approx([0.1, 0.01, 0.001])
    assert llm_qat().how.learn.rate(0, 9) == 2e-5
    assert llm_qat().how.learn.rate(8, 9) == pytest.approx(0, abs=1e-12)


def test_the_rate_of_a_step_is_the_schedules() -> None:
    """Plain gradient descent on a loss whose gradient is 1: every step is as long as the rate."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    batch = (torch.ones(1, 1), torch.zeros(1))
    problem = Task([batch], [batch], loss=lambda output, _: output.mean())
    learn = Steps(lr=0.5, momentum=0.0, clip=None, schedule=Linear(warmup=0.25, end=0.5))
    trainer, lengths = Trainer(net, problem, learn, 8), []
    for _ in range(8):
        before = float(net.weight.detach())
        trainer.run(1)
        lengths.append(before - float(net.weight.detach()))
    assert lengths == pytest.approx([0.5 * learn.schedule.factor(t, 8) for t in range(8)])  # type: ignore[union-attr]


def test_mu_is_counted_where_steps_grow_with_the_gradient() -> None:
    assert LC(minibatches=10, learn=Steps(lr=0.1)).start_mu == pytest.approx(0.1)
    value = Steps(Optimizer("SGD", lr=0.1, momentum=0.9))
    assert LC(minibatches=10, learn=value).start_mu == pytest.approx(0.1)
    for learn in (Steps("adam", lr=0.2), Steps("adamw", lr=0.2), Steps(Optimizer("RMSprop", lr=0.2))):
        assert LC(minibatches=10, learn=learn).start_mu == 0.1


def test_features_by_hand() -> None:
    own, original = mlp().eval(), seeded(mlp)
    original = original.eval()
    with torch.no_grad():
        original[0].bias.add_(1)
    x, y = vectors(8, 1)
    loss = Features(("0", "3"))
    assert loss.watches(own) == ["0", "3"]
    with torch.no_grad():
        found = loss(*(answer_of(net, (x, y), ["0", "3"]) for net in (own, original)), (x, y), task())
        parts = [F.mse_loss(own[: i + 1](x), original[: i + 1](x)) for i in (0, 3)]
    assert float(found) == pytest.approx(float(sum(parts) / 2))
    assert parts[0] == pytest.approx(1.0, rel=1e-5)
    assert not own[0]._forward_hooks


def test_features_of_a_module_that_gives_no_tensor() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, str]:
            return {"name": "x"}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = Named()

        def forward(self, x: Tensor) -> Tensor:
            self.named(x)
            return x

    with pytest.raises(SchemeError, match="named gives no tensor but a dict"):
        answer_of(Net(), torch.ones(1, 2), ["named"])


def test_hidden_states_are_those_transformers_gives() -> None:
    model = seeded(
        lambda: transformers.LlamaForCausalLM(tiny_config(hidden_size=32, num_hidden_layers=3, dtype="float32"))
    ).eval()
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    names = Features().watches(model)
    assert names == [f"model.layers.{i}" for i in range(3)]
    with torch.no_grad():
        answer = answer_of(model, {"input_ids": ids}, names)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for name, state in zip(names[:-1], states[1:-1], strict=True):  # the last one is given behind the final norm
        assert torch.equal(answer.features[name][0], state)


def test_features_bring_the_model_back_without_labels() -> None:
    """With labels that say nothing, following the original's inner outputs keeps what the network knows."""
    problem = task()
    wrong = [(x, torch.zeros_like(y)) for x, y in problem.train]
    _, found = recover_task(
        conv(), "RTN(2, 'channel')", FineTune(30, Steps(lr=0.05, lr_end=0.01, loss=Features(("3", "6"))), checks=1),
        Task(wrong, [(x, conv().eval()(x).detach().argmax(1)) for x, _ in [vectors(64, 5)]]),
    )  # fmt: skip
    assert found.curve[-1]["loss"] > 0
    assert found.curve[-1]["validation_loss"] < found.curve[0]["validation_loss"]


def test_memory_is_what_is_there() -> None:
    """Of parameters, gradients, the optimizer and the original, to the byte."""
    net, teacher = conv(), conv()
    sites, biases = [net[1].weight, net[4].weight], {"9.bias": net[9].bias}
    learn = Steps(Optimizer("AdamW", lr=1e-3), schedule=Constant(), loss=KL())
    for moved in (None, biases):
        trainer = Trainer(net, task(), learn, 2, teacher=teacher, moved=moved)
        told = memory_of(trainer, sites, copies=2)
        trainer.run(2)
        state = [*net.parameters(), *net.buffers()]
        assert told.parameters == told.original == sum(t.nbytes for t in state)
        of = list(net.parameters()) if moved is None else [*biases.values(), *sites]
        assert told.gradients == sum(p.nbytes for p in of)
        assert told.optimizer == sum(t.nbytes for t in trainer.state().values())
        assert told.copies == 2 * sum(p.nbytes for p in sites)
        assert told.total == told.parameters + told.gradients + told.optimizer + told.original + told.copies
        assert "training takes" in str(told)
    assert memory_of(Trainer(net, task(), Steps(), 2, teacher=teacher), [], 0).original == 0


@pytest.mark.parametrize("trains", ["w", "side"])
@pytest.mark.parametrize("along", ["all", "norms", "none"])
def test_what_is_not_trained_does_not_move(trains: Any, along: Any) -> None:
    net = mlp()
    plan = [("5*", lc.Keep()), ("*", lc.parse("KMeans(bits=2)"))]
    how = FineTune(12, Steps(lr=0.1), checks=1, trains=trains, along=along)
    direct, _ = recover_task(net, plan, lc.Direct(), task())
    tuned, found = recover_task(net, plan, how, task())
    assert found.loss < found.curve[0]["validation_loss"]  # the trained one came out
    weights: dict[str, Any] = dict(installed(tuned))
    before: dict[str, Any] = dict(installed(direct))
    for name, weight in weights.items():
        assert torch.equal(weight.tables(), before[name].tables()) == (trains == "w")
        assert trains == "w" or torch.equal(weight.codes, before[name].codes)
    for name, parameter in net.named_parameters():
        if name not in weights:
            moved = not torch.equal(tuned.get_parameter(name), parameter)
            assert moved == (along == "all" or (along == "norms" and parameter.dim() == 1)), name


@dataclass(frozen=True)
class Halves(Schedule):
    """Half the rate in the second half."""

    def fall(self, x: float) -> float:
        return 1.0 if x < 0.5 else 0.5


@dataclass(frozen=True)
class Far(Loss):
    """The mean absolute distance to the original's outputs."""

    @property
    def compares(self) -> bool:
        return True

    def __call__(self, own: Answer, original: Answer | None, batch: Any, task: Task) -> Tensor:
        assert original is not None
        distance: Tensor = (own.output - original.output).abs().mean()
        return distance


def test_a_schedule_and_a_loss_of_ones_own() -> None:
    """The labels say nothing, so that only the original can be followed."""
    given = task()
    wrong = [(x, torch.zeros_like(y)) for x, y in given.train]
    learn = Steps(lr=0.02, schedule=Halves(warmup=0.25), loss=Far())
    _, found = recover_task(mlp(), "RTN(2, 'channel')", FineTune(60, learn, checks=3), Task(wrong, given.validation))
    losses = [point["loss"] for point in found.curve[1:]]
    assert losses[2] < losses[0]
    assert [Halves().factor(t, 4) for t in range(4)] == [1, 1, 0.5, 0.5]


def test_a_recovery_is_given_as_text() -> None:
    problem = task()
    data: dict[str, Any] = {"train": problem.train, "validation": problem.validation}
    text, value = (
        lc.recover(mlp(), "RTN(3, 'channel')", how, **data)[1]
        for how in ("FineTune(4, checks=2)", FineTune(4, checks=2))
    )
    assert figures(text) == figures(value)
    with pytest.raises(SchemeError, match="unknown 'FineTuned'.*did you mean 'FineTune'"):
        lc.recover(mlp(), "RTN(3, 'channel')", "FineTuned(4)", **data)


def test_values_are_text() -> None:
    for text in (
        "FineTune(learn=Steps(Optimizer('AdamW', lr=3e-4, betas=(0.9, 0.95)), schedule=Cosine(warmup=0.1), loss=0.1 * TaskLoss() + 0.9 * KL(2.0)))",
        "LC(2, 3, learn=Steps(Optimizer('Muon', lr=0.1), lr_end=0.01, loss=KL() + 2 * Features(('*.mlp',))), then=FineTune(trains='side'))",
    ):
        how = parse_recovery(text)
        assert parse_recovery(repr(how)) == how
    for text, said in (
        ("FineTune(learn=Steps(Optimizer('AdamX')))", "no 'AdamX'"), ("FineTune(learn=Steps(loss=KL() * 2))", "expected a number"),
        ("FineTune(learn=Steps(loss=KL() + 2))", "expected a number"), ("FineTune(learn=Cosine())", "learn should be Steps"),
        ("Cosine()", "expected LC"), ("FineTune(learn=Steps(schedule=Cosinus()))", "unknown 'Cosinus'.*'Cosine'"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=said):
            parse_recovery(text)
