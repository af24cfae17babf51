"""Recovery of a model whose layers round their inputs: what is judged and trained is what is delivered."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.errors import SchemeError
from laconic.recover import LC, Direct, FineTune, recover_task
from laconic.recover.prepare import convert, prepare
from laconic.weights import installed
from laconic.weights.demands import demands_of, set_demands
from laconic.weights.inputs import Inputs
from tests.recover.nets import mlp, seeded, task, vectors
from tests.recover.test_finetune import FAST
from tests.test_activations import Rounded

HOW = [
    Direct(),
    FineTune(16, FAST, checks=2),
    LC(3, 4, mu=0.1, learn=FAST),
    LC(2, 4, mu=0.1, learn=FAST, then=FineTune(8, FAST, checks=1)),
]


class Noting(nn.Module):
    """Notes, of every forward pass that is trained through, how many of its layers round."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = seeded(mlp), []

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen.append(sum(demands_of(layer) is not None for layer in self.net))
        return self.net(x)


@pytest.mark.parametrize("how", HOW)
def test_the_delivered_model_is_the_one_that_was_judged(how: Any, tmp_path: Path) -> None:
    given = task()
    model, found = recover_task(seeded(mlp), Rounded(2), how, given)
    loss = given.judge(model, given.validation).loss
    assert loss == pytest.approx(min(point["validation_loss"] for point in found.curve), rel=1e-6)
    lc.save(model, tmp_path / "model")
    fresh = lc.load_into(seeded(mlp), tmp_path / "model").eval()
    assert given.judge(fresh, given.validation).loss == pytest.approx(loss, rel=1e-6)
    assert {weight.inputs for weight in installed(fresh).values()} == {Inputs(2)}
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        set_demands(layer, None)
    assert abs(given.judge(plain, given.validation).loss - loss) > 1e-4


def test_fine_tuning_sees_rounded_inputs_and_l_steps_do_not() -> None:
    """Fine-tuning trains what will run; an L-step trains the uncompressed network."""
    for how, expected in ((FineTune(4, FAST, checks=1), {3}), (LC(2, 2, mu=0.1, learn=FAST), {0})):
        net = Noting()
        model, _ = recover_task(net, Rounded(4), how, task())
        assert set(model.seen) == expected
        assert net.seen == []
        assert not any(demands_of(layer) for layer in net.modules())


def test_a_resumed_recovery_goes_on_with_it(tmp_path: Path) -> None:
    how = LC(4, 4, mu=0.1, learn=FAST)
    whole, _ = recover_task(seeded(mlp), Rounded(3), how, task())

    def stop(point: dict[str, Any]) -> None:
        if point["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_task(seeded(mlp), Rounded(3), how, task(), folder=tmp_path, listen=stop)
    again, _ = recover_task(seeded(mlp), Rounded(3), how, task(), folder=tmp_path, resume=True)
    assert {weight.inputs for weight in installed(again).values()} == {Inputs(3)}
    x = vectors(16, 5)[0]
    assert torch.equal(again(x), whole(x))


def test_anybodys_loop_sees_them_too() -> None:
    net, x = seeded(mlp), vectors(16, 5)[0]
    prepared = prepare(net, Rounded(3)).eval()
    before = prepared(x)
    assert torch.equal(convert(prepared)(x), before)
    assert all(weight.inputs == Inputs(3) for weight in installed(prepared).values())
    for layer in prepared.modules():
        set_demands(layer, None)
    assert not torch.allclose(prepared(x), before, atol=1e-2)


@pytest.mark.parametrize(
    "way",
    [
        lambda net: recover_task(net, [("*", Rounded(4))], Direct(), task()),
        lambda net: prepare(net, [("*", Rounded(4))]),
    ],
)
def test_what_cannot_round_is_refused_by_name(way: Any) -> None:
    net = nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(56, 4))
    with pytest.raises(SchemeError, match="1: the inputs of Conv1d"):
        way(net)
    assert not any(demands_of(layer) for layer in net.modules())
