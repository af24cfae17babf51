"""Recurrent layers and multi-head attention: found, compressed, run in training and on the fast path, saved and loaded; gradients seen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.engine.losses import random_projection
from laconic.engine.statistics import Statistics
from laconic.model.sites import Slot, Stats, find_slots
from laconic.weights.install import bake, installed


class Words(nn.Module):
    """A language model of two recurrent layers."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.rnn = getattr(nn, kind)(24, 32, 2, dropout=0.5, batch_first=True, **options)
        self.head = nn.Linear(32 * (2 if options.get("bidirectional") else 1), 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class Attention(nn.Module):
    """One encoder layer, and cross-attention with keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=20, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        return self.cross(y, x[..., :20], x[..., 20:], need_weights=False)[0]


def build(kind: str) -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = (
            Attention()
            if kind == "attention"
            else Words(*kind.split("-")[:1], **({"bidirectional": True} if "-" in kind else {}))
        )
    if kind == "attention":
        return net.eval(), [torch.randn(4, 7, 32, generator=generator) for _ in range(4)]
    return net.eval(), [torch.randint(50, (4, 9), generator=generator) for _ in range(4)]


KINDS = ["LSTM", "GRU", "RNN", "LSTM-bidirectional", "attention"]
SCHEMES = [
    "Magnitude(0.5, scope='model') >> KMeans(bits=4)", "BlockPrune(0.5, 5) >> Cast('float16')", "Magnitude(0.5, criterion='taylor', scope='model')",
    "RTN(4, 'channel')", "KMeans(bits=4, weights='fisher')",
]  # fmt: skip


def test_their_weights_are_sites() -> None:
    found = {slot.name: slot.shape for slot in find_slots(nn.LSTM(6, 8, 1, proj_size=4, bidirectional=True))}
    assert found == {
        "weight_ih_l0": (32, 6), "weight_hh_l0": (32, 4), "weight_hr_l0": (4, 8),
        "weight_ih_l0_reverse": (32, 6), "weight_hh_l0_reverse": (32, 4), "weight_hr_l0_reverse": (4, 8),
    }  # fmt: skip
    assert {slot.name for slot in find_slots(nn.GRUCell(4, 5))} == {"weight_ih", "weight_hh"}
    names = [slot.name for slot in find_slots(Attention())]
    assert names == [
        "encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2",
        "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight", "cross.out_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_they_run_on_their_stored_weights(kind: str, scheme: str, tmp_path: Path) -> None:
    """Train and eval mode, with and without gradients, saved, loaded and baked: one and the same function, the decoded weights'."""
    net, batches = build(kind)
    before, fresh = net(batches[0]).detach(), copy.deepcopy(net)
    plain = copy.deepcopy(net)
    lc.compress(net, f"Keep() if role == 'embedding' else {scheme}", batches)
    assert {slot.parameter for slot in find_slots(plain) if slot.role == "body"} == set(installed(net))
    with torch.no_grad():
        for slot in find_slots(plain):  # the same network, with what the weights decode to
            if slot.parameter in installed(net):
                getattr(plain.get_submodule(slot.users[0][0]), slot.users[0][1]).copy_(
                    slot.view.restore(installed(net)[slot.parameter]())
                )
        expected = plain(batches[0])
        after = net(batches[0])
    # not to the last bit: a product's kernel may depend on where in memory its operand lies
    assert torch.allclose(after, expected, atol=1e-5)
    assert 0 < float((after - before).norm() / before.norm()) < 1
    assert torch.allclose(net(batches[0]), expected, atol=1e-5), "with gradients"
    for module in net.modules():
        module.training = not isinstance(module, nn.RNNBase | nn.Dropout)
    assert torch.allclose(net(batches[0]), expected, atol=1e-5), "off the fast path"
    net.eval()
    lc.save(net, tmp_path)
    with torch.no_grad():
        assert torch.allclose(lc.load_into(fresh, tmp_path).eval()(batches[0]), expected, atol=1e-5)
        bake(net)
        assert torch.allclose(net(batches[0]), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_fused_weights_are_those_of_autograd(kind: str) -> None:
    net, batches = build(kind)
    slots = [slot for slot in find_slots(net) if slot.role == "body"]
    parameters: dict[Slot, nn.Parameter] = {
        slot: getattr(net.get_submodule(slot.users[0][0]), slot.users[0][1]) for slot in slots
    }
    random_projection(net(batches[0]), torch.Generator().manual_seed(1)).backward()
    expected = {slot: slot.view.matrix(parameter.grad).square() for slot, parameter in parameters.items()}  # type: ignore[arg-type]
    net.zero_grad()
    net.requires_grad_(False)
    statistics = Statistics(parameters, dict.fromkeys(slots, Stats.FISHER))
    leaf = batches[0].clone().requires_grad_() if batches[0].is_floating_point() else batches[0]
    with statistics.watch():
        random_projection(net(leaf), torch.Generator().manual_seed(1)).backward()
    for slot in slots:
        found = statistics.describe(slot, slot.view.matrix(parameters[slot]), 0).fisher
        assert found is not None, slot.name
        assert torch.allclose(found, expected[slot], rtol=1e-3, atol=1e-6), slot.name


@pytest.mark.parametrize("kind", ["LSTM", "attention"])
@pytest.mark.parametrize("scheme", ["GPTQ(bits=4, group='channel')", "Wanda(0.5)", "GPTQ(rate=4.0)"])
def test_what_reads_inputs_says_that_it_sees_none(kind: str, scheme: str) -> None:
    net, batches = build(kind)
    _, report = lc.compress(net, scheme, batches)
    fused = {"LSTM": "rnn.weight_ih_l0", "attention": "encoder.self_attn.in_proj_weight"}[kind]
    records = {record["name"]: record for record in report.sites}
    assert records[fused]["unmeasured"] == 1.0
    assert records[fused]["notes"][0].startswith(f"{fused}: it is multiplied inside a fused call")
    assert fused in report.values["notes"][0]
    beside = records["encoder.linear1"] if kind == "attention" else None
    assert beside is None or ("unmeasured" not in beside and not beside["notes"])
    assert not any(p.grad is not None for p in net.parameters())


def test_other_layers_beside_them_are_calibrated() -> None:
    net, batches = build("LSTM")
    lc.compress(net, "[('rnn.*', RTN(4, 'channel')), ('head', GPTQ(bits=4, group='channel')), ('*', Keep())]", batches)
    assert len(installed(net)) == 5
