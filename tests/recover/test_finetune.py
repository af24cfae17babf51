"""Fine-tuning of a compressed model with its side information kept; structures that stay silent; batch norms estimated anew."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import laconic as lc
from laconic.recover import LC, Direct, FineTune, Steps, StopRecovery, Task, recover_task
from laconic.recover.compressed import Bench
from laconic.recover.losses import distance_of
from laconic.recover.projection import project_onto
from laconic.recover.relaxed import Trained
from laconic.recover.train import Trainer
from laconic.surgery import thin
from laconic.weights import Codebook, Sparse, Uniform
from laconic.weights.install import installed
from tests.needs import extra
from tests.recover.nets import conv, mlp, outputs, seeded, task, trained, untouched, vectors

FAST = Steps(lr=0.1, lr_end=0.01)


def side(weight: nn.Module) -> list[Tensor]:
    """The mask, scale, zero and table of a weight, whichever it has."""
    if isinstance(weight, Sparse):
        return [weight.mask.clone(), *side(weight.values)]
    if isinstance(weight, Uniform):
        return [part.forward().detach().clone() for part in (weight.scale, weight.zero) if part is not None]
    return [weight.tables().detach().clone()] if isinstance(weight, Codebook) else []


@pytest.mark.parametrize(
    "scheme",
    ["Magnitude(0.7)", "Magnitude(0.7, scope='model') >> KMeans(bits=3)", "RTN(3, 'channel')", "KMeans(bits=3)"],
)
def test_side_information_is_kept_and_values_move(scheme: str) -> None:
    net, problem = mlp().eval(), task()
    direct = installed(recover_task(net, scheme, Direct(), problem)[0])
    with untouched(net):
        compressed, found = recover_task(net, scheme, FineTune(30, FAST, checks=3), problem)
    for name, weight in installed(compressed).items():
        before, after = side(direct[name]), side(weight)
        assert before
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
    assert any(not torch.equal(weight(), direct[name]()) for name, weight in installed(compressed).items())
    assert found.loss < found.curve[0]["validation_loss"] - 0.01
    assert [p["minibatches"] for p in found.curve] == [0, 10, 20, 30]


def test_for_pruning_it_is_training_of_the_survivors() -> None:
    """Against plain gradient descent on the entries that are left, in float32 as Dense keeps them."""
    g = torch.Generator().manual_seed(0)
    X, w = torch.randn(32, 6, generator=g), torch.tensor([[2.0, -0.1, 1.5, 0.2, -1.0, 0.05]])
    y = X @ w.T
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(w + 0.3)
    problem = Task([(X, y)], [(X, y)], loss=lambda output, batch: F.mse_loss(output, batch[1]))
    bench = Bench(model, project_onto(model, lc.Magnitude(0.5)), problem)
    weights = bench.projection.compress(bench.values())
    mask = weights[bench.projection.slots[0]].mask  # type: ignore[union-attr]
    expected = (w + 0.3).clone()
    Trained(bench, weights).run(Trainer(model, problem, Steps(lr=0.05, lr_end=0.05, momentum=0.0, clip=1.0), 20), 20)
    for _ in range(20):
        shown = (expected * mask).bfloat16().float()
        gradient = 2 * ((X @ shown.T - y) * X).mean(0, keepdim=True) * mask
        expected = expected - 0.05 * gradient * min(1.0, 1.0 / float(gradient.norm()))
    assert torch.allclose(model.weight.detach() * mask, expected * mask, atol=1e-5)
    assert torch.equal((model.weight.detach() - w - 0.3)[~mask], torch.zeros(3))  # what is cut is not trained


def test_then_goes_on_from_the_best_of_lc() -> None:
    net, problem = mlp().eval(), task()
    how = LC(3, 8, mu=0.5, learn=FAST, then=FineTune(20, FAST, checks=2))
    compressed, found = recover_task(net, "Magnitude(0.7)", how, problem)
    alone, before = recover_task(net, "Magnitude(0.7)", LC(3, 8, mu=0.5, learn=FAST), problem)
    assert [p["phase"] for p in found.curve] == ["direct", "L-C", "L-C", "L-C", "fine-tuning", "fine-tuning"]
    assert found.minibatches == how.total == 44
    assert found.loss < before.loss
    for name, weight in installed(compressed).items():
        assert torch.equal(weight.mask, installed(alone)[name].mask)  # type: ignore[arg-type]


def test_an_odd_number_of_minibatches_is_spread_over_the_checks() -> None:
    _, found = recover_task(mlp(), "Magnitude(0.5)", FineTune(5, checks=3), task())
    assert [p["minibatches"] for p in found.curve] == [0, 1, 3, 5]
    _, found = recover_task(mlp(), "Magnitude(0.5)", FineTune(2, checks=4), task())
    assert [p["minibatches"] for p in found.curve] == [0, 1, 2]


@pytest.mark.parametrize("how", [LC(6, 4, mu=0.1), FineTune(24, checks=6)])
def test_a_listener_can_stop_it_with_the_best_so_far(how: Any) -> None:
    heard: list[dict[str, Any]] = []

    def listen(found: dict[str, Any]) -> None:
        heard.append(found)
        if len(heard) == 3:
            raise StopRecovery

    problem = task()
    compressed, found = recover_task(mlp(), "Magnitude(0.5)", how, problem, listen=listen)
    assert found.stopped
    assert found.curve == heard
    assert found.minibatches == 8
    assert found.loss == min(p["validation_loss"] for p in heard)
    assert problem.judge(compressed, problem.validation).loss == pytest.approx(found.loss, abs=1e-6)


def test_stopped_at_once_it_is_direct_compression() -> None:
    def listen(found: dict[str, Any]) -> None:
        raise StopRecovery

    compressed, found = recover_task(mlp(), "RTN(3, 'channel')", LC(2, 4), task(), listen=listen)
    direct, _ = recover_task(mlp(), "RTN(3, 'channel')", Direct(), task())
    assert found.minibatches == 0
    assert all(torch.equal(w(), installed(direct)[name]()) for name, w in installed(compressed).items())


def test_norms_are_the_plain_averages_over_their_minibatches() -> None:
    """The first norm's mean is that of its inputs over the first batches of training, and the model's own momentum comes back."""
    net, data = conv(), [vectors(32, seed) for seed in range(4)]
    problem = Task(data, [vectors(64, 9)])
    compressed, _ = recover_task(net, "RTN(8, 'channel')", Direct(norm_batches=3), problem)
    before = compressed[:2]  # type: ignore[index]
    with torch.no_grad():
        means = torch.stack([before(x).mean((0, 2, 3)) for x, _ in data[:3]]).mean(0)
    assert torch.allclose(compressed[2].running_mean, means, atol=1e-5)  # type: ignore[index, arg-type]
    assert compressed[2].momentum == net[2].momentum == 0.1  # type: ignore[index]
    plain, _ = recover_task(net, "RTN(8, 'channel')", Direct(), problem)
    assert torch.equal(plain[2].running_mean, net[2].running_mean)  # type: ignore[index, arg-type]


def test_norms_make_up_for_pruning() -> None:
    net, problem = conv(), task()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(10):
            for x, y in problem.train:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
    plain = recover_task(net.eval(), "Magnitude(0.7, scope='model')", Direct(), problem)[1]
    anew = recover_task(net, "Magnitude(0.7, scope='model')", Direct(norm_batches=6), problem)[1]
    assert anew.loss < plain.loss


def silent_rows(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (module.weight.detach().flatten(1) == 0).all(1) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [Direct(), FineTune(20, FAST), LC(4, 8, mu=0.2, learn=FAST), LC(2, 8, mu=0.2, learn=FAST, then=FineTune(8, FAST))],
)
def test_silenced_filters_stay_silent_and_can_be_cut(how: Any) -> None:
    extra("torch_pruning")
    net, problem = conv(), task()
    with torch.no_grad():  # norms that would let a channel speak that its filter does not
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.uniform_(0.5, 1.0, generator=torch.Generator().manual_seed(0))
    with untouched(net):
        compressed, found = recover_task(net, "FilterPrune(0.5)", how, problem)
    rows = silent_rows(compressed)
    assert sum(int(r.sum()) for r in rows.values()) >= 6
    for conv_at, norm_at in ((1, 2), (4, 5)):
        gone, norm = rows[str(conv_at)], compressed[norm_at]  # type: ignore[index]
        assert not norm.weight[gone].any()
        assert not norm.bias[gone].any()
        assert not compressed[conv_at].bias[gone].any()  # type: ignore[index]
        assert norm.bias[~gone].all()
    assert problem.judge(compressed, problem.validation).loss == pytest.approx(found.loss, abs=1e-6)
    assert found.projection is not None
    thinned = thin(compressed, problem.sample(), found.projection.coupling)
    assert sum(p.numel() for p in thinned.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())
    assert torch.allclose(outputs(thinned, problem.test), outputs(compressed, problem.test), atol=1e-5)


def test_channels_are_silent_from_the_first_forward_pass_on() -> None:
    """Also where a gradient would make them speak again: that of ReLU at 0 is none, that of GELU is 1/2."""
    extra("torch_pruning")
    net = conv()
    net[3] = net[6] = nn.GELU()
    with torch.no_grad():
        net[2].bias.fill_(0.5)  # type: ignore[union-attr, operator]
    heard: list[Tensor] = []
    given = task()

    def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        heard.append(net[2].bias.detach().clone())  # type: ignore[union-attr, operator]
        return F.cross_entropy(output, batch[1])

    problem = Task(given.train, given.validation, loss=loss)
    bench = Bench(net, project_onto(net, lc.parse("FilterPrune(0.5)"), example=problem.sample()), problem)
    weights = bench.projection.compress(bench.values())
    gone = ~weights[bench.projection.slots[0]].mask.any(1)  # type: ignore[union-attr, operator]
    assert gone.any()
    Trained(bench, weights).run(Trainer(net, problem, FAST, 3), 3)
    assert len(heard) == 3
    assert all(not bias[gone].any() and bias[~gone].all() for bias in heard)


def test_an_embedding_with_sparse_gradients_is_trained() -> None:
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(12, (48, 3), generator=g), torch.randint(2, (48,), generator=g)
    net = seeded(lambda: nn.Sequential(nn.Embedding(12, 8, sparse=True), nn.Flatten(), nn.Linear(24, 2)))
    problem = Task([(ids, labels)], [(ids, labels)])
    for how in (LC(3, 10, mu=0.1, learn=FAST), FineTune(30, FAST)):
        _, found = recover_task(net, [("0", lc.Magnitude(0.5)), ("*", lc.RTN(4, "channel"))], how, problem)
        assert found.loss < found.curve[0]["validation_loss"] - 0.1


def test_distillation_follows_the_original_where_labels_are_noise() -> None:
    """With labels that say nothing, training on them destroys the network; training on the original's answers does not."""
    problem = task()
    net = trained(mlp(), problem.train, 200)
    noise = torch.Generator().manual_seed(1)
    wrong = [(x, torch.randint(4, y.shape, generator=noise)) for x, y in problem.train]
    noisy = Task(wrong, problem.validation)
    last = {}
    for share in (0.0, 1.0):
        steps = Steps(lr=0.05, lr_end=0.01, distill=share)
        last[share] = recover_task(net, "Magnitude(0.8, scope='model')", FineTune(40, steps, checks=1), noisy)[1].curve[
            -1
        ]["score"]
    assert last[1.0] > last[0.0] + 0.2


def test_the_distance_to_the_original_by_hand() -> None:
    own, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3)]])
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(distance_of(own, other, 2.0)) == pytest.approx(4 * by_hand)
