"""Thinned = masked: generated architectures, small cases by hand, limits."""

import copy

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import laconic as lc
from laconic.errors import SurgeryError
from laconic.model.sites import find_slots
from laconic.surgery import Coupling, couple, report, silence, thin
from tests.conftest import tiny_config
from tests.surgery.nets import KINDS, Dense, Transformer, conv_net, shaken

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink))


def output(model: nn.Module, batch: object) -> Tensor:
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found if isinstance(found, Tensor) else found.logits


def some(coupling: Coupling, generator: torch.Generator) -> Tensor:
    """Random channels: any number of each group, but never all."""
    chosen = []
    for group in coupling.groups:
        count = int(torch.randint(len(group), (1,), generator=generator))
        chosen.append(group.ids[0] + torch.randperm(len(group), generator=generator)[:count])
    return torch.cat(chosen)


def zero(model: nn.Module, coupling: Coupling, dead: Tensor) -> None:
    """Set the rows of some channels to zero, as a method that prunes filters does."""
    slots = {slot.name: slot for slot in find_slots(model)}
    with torch.no_grad():
        for name, ids in coupling.channels.items():
            parameter = model.get_parameter(slots[name].parameter)
            W = slots[name].view.matrix(parameter).clone()
            W[torch.isin(ids, dead)] = 0
            parameter.copy_(slots[name].view.restore(W))


def check(model: nn.Module, batch: object, coupling: Coupling, dead: Tensor) -> nn.Module:
    """Cut, and compare outputs and sizes with what the ids say."""
    zero(model, coupling, dead)
    thinned = thin(model, batch, coupling)
    assert silence(model, coupling) == len(dead)
    masked = output(model, batch)
    torch.testing.assert_close(output(thinned, batch), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))
    after = {slot.name: slot.rows for slot in find_slots(thinned)}
    assert after == {name: int((~torch.isin(ids, dead)).sum()) for name, ids in coupling.channels.items()}
    return thinned


@FEW
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple), st.lists(st.sampled_from((6, 8, 9)), min_size=4, max_size=4),
    st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_generated_conv_nets(kinds: tuple[str, ...], widths: list[int], flatten: bool, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = shaken(conv_net(kinds, tuple(widths[: len(kinds) + 1]), flatten), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    coupling = couple(model, x)
    refused = [
        line for line in coupling.refused if "does not change the output" not in line
    ]  # dead ReLUs, in nets as small as these
    assert len(refused) == 1
    assert "model's output" in refused[0]
    assert len(refused) < len(coupling.refused) or all(
        (ids >= 0).all() for name, ids in coupling.channels.items() if name != find_slots(model)[-1].name
    )
    if not len(coupling):
        return
    dead = some(coupling, generator)
    thinned = check(model, x, coupling, dead)
    assert (sum(p.numel() for p in thinned.parameters()) < sum(p.numel() for p in model.parameters())) == (
        len(dead) > 0
    )


@FEW
@given(
    st.integers(1, 2), st.sampled_from(((4, 2), (4, 4), (6, 2), (3, 3))), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from((nn.RMSNorm, nn.LayerNorm)), st.integers(0, 2**16),
)  # fmt: skip
def test_generated_transformers(
    layers: int, heads: tuple[int, int], fused: bool, sizes: bool, eager: bool, norm: type[nn.Module], seed: int
) -> None:
    queries, groups = heads if not fused else (heads[0], heads[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = shaken(Transformer(layers, queries, groups, fused, sizes, eager, norm), seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (2, 6), generator=generator)
    coupling = couple(model, ids)
    assert sorted((group.kind, len(group)) for group in coupling.groups) == sorted(
        layers
        * [("attention.*.qkv" if fused else "attention.*.q", groups), ("gated.*.up" if fused else "gated.*.gate", 10)]
    )
    assert [group.heads for group in coupling.groups].count(True) == layers
    check(model, ids, coupling, some(coupling, generator))


def test_llama_by_groups_of_heads() -> None:
    model = LlamaForCausalLM(tiny_config(attention_bias=True)).float().eval()
    batch = {"input_ids": torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))}
    coupling = couple(model, batch)
    q, k, o = (coupling.channels[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert torch.equal(k, torch.arange(2).repeat_interleave(16) + k[0])
    assert torch.equal(q, torch.arange(2).repeat_interleave(32) + k[0])
    assert (o == -1).all()
    thinned = check(model, batch, coupling, some(coupling, torch.Generator().manual_seed(4)))
    rows = {cut.layer: cut.after for cut in report(model, thinned)}
    assert all(shape[0] % 16 == 0 for name, shape in rows.items() if "q_proj" in name)


def test_exact_case() -> None:
    """Linear 2 -> 3, ReLU, linear 3 -> 1, the second unit zero: its bias is silenced, its row and column go."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 7.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 100.0, -1.0]]))
        model[2].bias.copy_(torch.tensor([0.25]))
    x = torch.tensor([[1.0, 1.0]])
    coupling = couple(model, x)
    assert coupling.channels["0"].tolist() == [0, 1, 2]
    assert coupling.channels["2"].tolist() == [-1]
    thinned = thin(model, x, coupling)
    assert thinned[0].weight.tolist() == [[1.0, 2.0], [3.0, -1.0]]
    assert thinned[0].bias.tolist() == [0.5, 0.0]
    assert thinned[2].weight.tolist() == [[2.0, -1.0]]
    assert (thinned[0].out_features, thinned[2].in_features) == (2, 2)
    assert output(thinned, x).item() == 2 * 3.5 - 2.0 + 0.25
    assert model[0].bias[1] == 7  # the model itself is silenced only on request
    assert silence(model, coupling) == 1
    assert model[0].bias.tolist() == [0.5, 0.0, 0.0]
    assert [(cut.layer, cut.before, cut.after) for cut in report(model, thinned)] == [
        ("0", (3, 2), (2, 2)),
        ("2", (1, 3), (1, 2)),
    ]


def test_a_channel_that_nobody_reads_goes_whatever_it_says() -> None:
    model = shaken(
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 2),
        )
    )
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    before = output(model, x)
    with torch.no_grad():
        model[3].weight[:, 2] = 0
        model[6].weight[:, 4:8] = 0  # all four places of the second channel
    masked = output(model, x)
    assert not torch.allclose(before, masked)
    thinned = thin(model, x)
    assert thinned[0].out_channels == 5
    assert thinned[3].weight.shape == (3, 5, 3, 3)
    assert thinned[6].in_features == 12
    torch.testing.assert_close(output(thinned, x), masked, rtol=0, atol=1e-6)


def test_silence_is_exactly_zero() -> None:
    """A zero filter still speaks through its bias and its norm, until it is silenced."""
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    coupling = couple(model, x)
    zero(model, coupling, coupling.channels["0"][1:2])
    model[1].bias.data[1] = 0.3
    assert model[:2](x)[:, 1].abs().max() > 0
    assert silence(model, coupling) == 1
    assert torch.equal(model[:2](x)[:, 1], torch.zeros(2, 5, 5))
    assert silence(model, coupling) == 1  # and again: nothing changes
    assert (model[:2](x)[:, [0, 2, 3]].std((0, 2, 3)) > 0).all()


def test_one_channel_stays_in_each_layer() -> None:
    model = shaken(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model[0].weight.zero_()
    thinned = thin(model, x)
    assert thinned[0].weight.shape == (1, 4)
    torch.testing.assert_close(output(thinned, x), model[2].bias.detach().expand(6, 3), rtol=0, atol=0)


def test_nothing_dead_changes_nothing() -> None:
    model = shaken(conv_net(("residual", "dense"), (6, 6, 6), False))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    thinned = thin(model, x)
    assert report(model, thinned) == []
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), thinned.state_dict().values(), strict=True)
    )


def test_concatenation_offsets_by_hand() -> None:
    """In a dense block the columns of later layers follow the places of earlier channels."""
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 1), Dense(4, 2, 2), nn.Conv2d(8, 1, 1)))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    coupling = couple(model, x)
    dead = torch.stack(
        [coupling.channels["0"][3], coupling.channels["1.convs.0"][0], coupling.channels["1.convs.1"][1]]
    )
    columns = model[2].weight.detach().clone()
    thinned = check(model, x, coupling, dead)
    assert torch.equal(thinned[2].weight, columns[:, [0, 1, 2, 5, 6]])


def test_installed_weights_are_baked() -> None:
    model = shaken(conv_net(("residual",), (6, 6), True))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    coupling = couple(model, x)
    zero(model, coupling, some(coupling, torch.Generator().manual_seed(8)))
    compressed, _ = lc.compress(copy.deepcopy(model), "Cast('float16')")
    names = [name for name, _ in compressed.named_parameters()]
    again = couple(compressed, x)
    assert {name: ids.tolist() for name, ids in again.channels.items()} == {
        name: ids.tolist() for name, ids in coupling.channels.items()
    }
    dead = silence(compressed, coupling)
    thinned = thin(compressed, x, coupling)
    assert dead > 0
    assert [name for name, _ in compressed.named_parameters()] == names
    assert not any("parametrizations" in name for name, _ in thinned.named_parameters())
    torch.testing.assert_close(output(thinned, x), output(compressed, x), rtol=0, atol=1e-5)


def test_the_random_state_and_the_model_are_left_alone() -> None:
    model = shaken(conv_net(("inception",), (6, 8), False)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    first, second = couple(model, x), couple(model, x)
    thin(model, x, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(first.channels[name], second.channels[name]) for name in first.channels)


def test_a_coupling_of_another_model_is_refused() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(10))
    small, large = (conv_net(("residual",), (n, n), False) for n in (6, 8))
    with pytest.raises(SurgeryError, match=r"8 channels .* the coupling 6"):
        thin(large, x, couple(small, x))


def test_a_wrong_coupling_is_caught_and_named() -> None:
    """A forged coupling that forgets a consumer breaks the forward pass; the error says where."""
    model = shaken(conv_net(("residual",), (6, 6), False))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(11))
    coupling = couple(model, x)
    forged = Coupling(
        coupling.channels,
        coupling.groups,
        tuple(p for p in coupling.ports if not (p.path == "3.conv2" and p.side == "in")),
    )
    zero(model, coupling, coupling.channels["3.conv1"][:2])
    with pytest.raises(SurgeryError, match=r"3\.conv1: the thinned network is not the masked one"):
        thin(model, x, forged)
