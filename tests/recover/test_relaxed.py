"""Training through relaxations: clusters that move along, checkpoints, steps of several minibatches, faults that are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic as lc
from laconic.errors import RecoveryError, SchemeError
from laconic.recover import KL, Cosine, Direct, FineTune, Steps, Task, recover_task, usual_recovery
from laconic.recover.compressed import Bench
from laconic.recover.projection import project_onto
from laconic.recover.recipes import dkm, llm_qat, recipe
from laconic.recover.relaxed import Trained
from laconic.recover.train import Trainer
from laconic.weights import Codebook, Dense, Weight, installed
from laconic.weights.relax import Relaxation
from tests.recover.nets import Words, conv, mlp, seeded, task, vectors, words_task
from tests.recover.test_resume import Killed, figures, noisy_task, stored

FAST = Steps("adamw", lr=5e-3, lr_end=5e-4, beta2=0.95)


SCHEMES = {
    "scalars": "DKM(bits=2, tau=0.2, tau_end=0.02)",
    "vectors": "[('1', RTN(4, 'channel')), ('*', DKM(2, dimension=2, tau=0.2))]",
    "survivors": "Magnitude(0.5, scope='model') >> DKM(bits=2)",
    "straight through": "RTN(2, 'channel')",
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_killed_and_resumed_it_gives_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    net, how = conv().append(nn.Dropout(0.2)), FineTune(21, FAST, checks=3, norm_batches=2)
    whole, expected = recover_task(net, scheme, how, noisy_task())

    def listen(point: dict[str, Any]) -> None:
        if point["minibatches"] == 14:
            raise Killed

    folder = tmp_path / "state"
    with pytest.raises(Killed):
        recover_task(net, scheme, how, noisy_task(), folder=folder, listen=listen)
    again, found = recover_task(net, scheme, how, noisy_task(), folder=folder, resume=True)
    assert stored(whole, tmp_path / "one") == stored(again, tmp_path / "two")
    assert figures(expected) == figures(found)


def test_a_tied_embedding_is_one_codebook(tmp_path: Path) -> None:
    net = seeded(Words).eval()
    plan = [("*lstm*", lc.Keep()), ("*", lc.DKM(bits=2, tau=0.1))]
    compressed, found = recover_task(net, plan, FineTune(30, FAST, checks=2), words_task())
    weights = installed(compressed)
    assert weights["table.weight"] is weights["head.weight"]
    assert isinstance(weights["table.weight"], Codebook)
    assert found.score > found.direct
    lc.save(compressed, tmp_path)
    assert (tmp_path / "laconic.json").read_text().count('"codebook"') == 1


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_named() -> None:
    net = mlp()
    calls = 0

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal calls
        if torch.is_grad_enabled():
            calls += 1
        value = nn.functional.cross_entropy(output, batch[1])
        if torch.is_grad_enabled() and calls in (2, 3):
            output.register_hook(lambda g: g * float("nan"))
        return value

    _, found = recover_task(net, "DKM(bits=2)", FineTune(12, FAST, checks=1), task(loss=loss))
    assert found.curve[-1]["skipped"] == 2
    assert "2 of 12 minibatches were skipped; not finite: the gradient of 0.weight (2 times)" in found.notes
    assert found.score == found.score  # a number

    def broken(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(output, batch[1]) * (float("nan") if torch.is_grad_enabled() else 1)

    with pytest.raises(RecoveryError, match=r"Not finite: the loss \(\d+ times\)"):
        recover_task(net, "DKM(bits=2)", FineTune(12, FAST, checks=1), task(loss=broken))


def test_a_step_of_two_halves_is_a_step_of_the_whole() -> None:
    x, y = vectors(32, 5)
    models = []
    for batches, accumulate in (([(x, y)], 1), ([(x[:16], y[:16]), (x[16:], y[16:])], 2)):
        net = seeded(lambda: nn.Linear(16, 4))
        Trainer(net, Task(batches, batches), Steps(lr=0.1, lr_end=0.1, accumulate=accumulate), 5).run(5)
        models.append(net)
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-5)


def test_epochs_are_counted_in_minibatches() -> None:
    _, found = recover_task(mlp(), "RTN(4, 'channel')", FineTune(epochs=2, learn=FAST), task())
    assert found.minibatches == 12  # 96 points in minibatches of 16, twice
    _, found = recover_task(mlp(), "RTN(4, 'channel')", FineTune(epochs=2, learn=Steps(accumulate=3)), task())
    assert found.minibatches == 4
    with pytest.raises(SchemeError, match="has a length, got a Endless"):
        FineTune(epochs=1).over(Endless())
    assert Direct().over(Endless()) == Direct()


class Learned(Relaxation):
    """A step that is learned beside w, or one for several matrices: what it trains is its own affair."""

    def __init__(self, weight: Weight, step: nn.Parameter, with_w: bool) -> None:
        super().__init__(weight)
        self.step, self.with_w = step, with_w

    def trained(self, w: nn.Parameter) -> dict[str, nn.Parameter]:
        return {"step": self.step} | ({"w": w} if self.with_w else {})

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * self.step

    def stored(self, w: torch.Tensor) -> Weight:
        dense = Dense((w.shape[0], w.shape[1]), dtype="float32")
        dense.right_inverse(self(w).detach())
        return dense


@pytest.mark.parametrize("with_w", [True, False])
def test_a_state_that_matrices_share_gets_the_gradient_of_all(with_w: bool) -> None:
    """Against plain gradient descent on (w, step) of the function the network computes."""
    net, (x, y) = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), vectors(32, 1)
    problem = Task([(x, y)], [(x, y)])
    w = [net[0].weight.detach().clone().requires_grad_(with_w), net[2].weight.detach().clone().requires_grad_(with_w)]
    biases, step = [net[0].bias.detach().clone(), net[2].bias.detach().clone()], torch.ones((), requires_grad=True)
    for _ in range(3):
        hidden = torch.tanh(x @ (step * w[0]).t() + biases[0])
        loss = nn.functional.cross_entropy(hidden @ (step * w[1]).t() + biases[1], y)
        moved = [step, *(w if with_w else [])]
        gradients = torch.autograd.grad(loss, moved)
        with torch.no_grad():
            for one, gradient in zip(moved, gradients, strict=True):
                one.sub_(gradient, alpha=0.1)
    shared = nn.Parameter(torch.ones(()))
    bench = Bench(net, project_onto(net, lc.parse("Cast('float32')")), problem)
    weights = bench.projection.compress(bench.values())
    trained = Trained(bench, weights, lambda method, weight, _: Learned(weight, shared, with_w), along="none")
    assert len(trained.moved) == (3 if with_w else 1)
    learn = Steps(lr=0.1, lr_end=0.1, momentum=0.0, clip=None)
    trained.run(Trainer(net, problem, learn, 3, moved=trained.moved), 3)
    torch.testing.assert_close(shared.detach(), step.detach())
    torch.testing.assert_close(net[0].weight.detach(), w[0].detach())
    torch.testing.assert_close(next(iter(trained.stored().values()))(), (step * w[0]).detach())
    assert torch.equal(net[2].bias.detach(), biases[1])


def test_with_nothing_to_train_it_says_so() -> None:
    with pytest.raises(SchemeError, match="nothing to train"):
        recover_task(mlp(), "[('*', Keep())]", FineTune(2, along="none"), task())


class Endless:
    def __iter__(self) -> Any:
        return iter([vectors(16, 0)])


def test_how_a_scheme_is_trained_if_nobody_says() -> None:
    assert usual_recovery(lc.parse("Magnitude(0.5)"), mlp()) == lc.LC()
    for scheme in ("DKM(bits=2)", "Magnitude(0.5) >> DKM(bits=2)", "[('0', DKM(bits=2)), ('*', RTN(4, 'channel'))]"):
        assert usual_recovery(lc.parse(scheme), mlp()) == dkm().how


def test_recipes_have_the_papers_numbers() -> None:
    how = dkm().how
    assert (how.epochs, dkm().length, dkm().batch) == (2, 256, 64)
    assert how.learn == Steps("adamw", lr=5e-5, lr_end=5e-5, momentum=0.9, beta2=0.95, weight_decay=0.0, clip=1.0)
    assert "DKM(bits=3)" in dkm().scheme
    assert "DKM(bits=8" in dkm().scheme
    assert llm_qat().data == "self"
    assert llm_qat().how.learn == Steps("adamw", lr=2e-5, clip=1.0, schedule=Cosine(), loss=KL(1.0))
    assert recipe("llm-qat", 3).scheme == llm_qat(3).scheme
    with pytest.raises(SchemeError, match="known: dkm, llm-qat"):
        recipe("awq")
