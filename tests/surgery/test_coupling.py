"""What is coupled, and what is refused with which reason; the real networks."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from laconic.errors import SurgeryError
from laconic.surgery import Coupling, couple, thin
from laconic.surgery.verify import apart, few, sift
from tests.surgery.nets import Attention, Inception, Residual, Transformer, separable, shaken
from tests.surgery.test_thinning import check, output, some

CNN = Path(__file__).resolve().parents[2] / "benchmarks"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def resnet(layers: int) -> nn.Module:
    """The benchmarks' CIFAR ResNet."""
    sys.path.insert(0, str(CNN))
    try:
        from cnn import resnet as build
    finally:
        sys.path.remove(str(CNN))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(build(layers))


class Net(nn.Module):
    """Two convolutions around any function."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(width, 2, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Branching(nn.Module):
    """Decides by its activations which layer comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(x) if (x.mean() > 0) else x)


def test_resnet_with_padded_shortcuts() -> None:
    """Inner channels of a block can be cut; the residual stream passes through padding, and is refused in these words."""
    model = resnet(20)
    x = torch.randn(4, 3, 32, 32, generator=generator())
    coupling = couple(model, x)
    assert [group.layers for group in coupling.groups] == [
        (f"layer{i}.{j}.conv1",) for i in (1, 2, 3) for j in range(3)
    ]
    assert {group.kind for group in coupling.groups} == {f"layer{i}.*.conv1" for i in (1, 2, 3)}
    assert len(coupling) == 3 * (16 + 32 + 64)
    assert (coupling.channels["conv1"] == -1).all()
    assert (coupling.channels["layer3.0.conv2"] == -1).all()
    assert sum("ConstantPadNd" in line for line in coupling.refused) == 3
    assert coupling.refused[-1] == "linear: no layer reads its channels: they reach the model's output"
    check(model, x, coupling, some(coupling, generator(1)))


def test_resnet_56_is_quick() -> None:
    """Groups that pass are proved together, so that the number of passes does not grow with the depth."""
    assert len(couple(resnet(56), torch.randn(2, 3, 32, 32, generator=generator())).groups) == 27


def test_a_residual_stream_is_one_group() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(3, 6, 1), Residual(6, 6, 1), Residual(6, 6, 1), nn.Conv2d(6, 2, 1)))
    coupling = couple(model, torch.randn(2, 3, 6, 6, generator=generator()))
    stream = [coupling.channels[name] for name in ("0", "1.conv2", "2.conv2")]
    assert all(torch.equal(stream[0], ids) for ids in stream)
    assert next(group for group in coupling.groups if group.ids[0] == int(stream[0].min())).layers == (
        "0",
        "1.conv2",
        "2.conv2",
    )


def test_depthwise_rows_are_those_of_what_they_read() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(3, 6, 1), separable(6, 4, 1), nn.Conv2d(4, 2, 1)))
    coupling = couple(model, torch.randn(2, 3, 6, 6, generator=generator()))
    assert torch.equal(coupling.channels["0"], coupling.channels["1.0"])
    assert coupling.channels["1.3"].tolist() == [6, 7, 8, 9]


def test_a_group_of_a_grouped_convolution_is_one_channel() -> None:
    model = shaken(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    )
    x = torch.randn(2, 3, 6, 6, generator=generator())
    coupling = couple(model, x)
    assert coupling.channels["0"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert coupling.channels["2"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    thinned = check(model, x, coupling, torch.tensor([1, 2]))
    assert (thinned[2].groups, thinned[2].in_channels, thinned[2].out_channels) == (2, 4, 6)


def test_a_part_that_comes_from_the_input_keeps_its_place() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([x, F.relu(self.a(x))], dim=1))

    model = shaken(Skip())
    x = torch.randn(2, 3, 4, 4, generator=generator())
    coupling = couple(model, x)
    kept = model.b.weight.detach().clone()[:, [0, 1, 2, 3, 5, 6, 7]]
    assert torch.equal(check(model, x, coupling, coupling.channels["a"][1:2]).b.weight, kept)


def test_flattening_behind_a_concatenation() -> None:
    model = shaken(nn.Sequential(Inception(3, 6), nn.Flatten(), nn.Linear(6 * 9, 2)))
    x = torch.randn(2, 3, 3, 3, generator=generator())
    coupling = couple(model, x)
    dead = coupling.channels["0.pooled.1"][:1]
    columns = model[2].weight.detach().clone()
    assert torch.equal(check(model, x, coupling, dead)[2].weight, torch.cat([columns[:, :36], columns[:, 45:]], 1))


def test_a_parameter_along_the_channels_is_cut_with_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x) + self.shift))

    model = shaken(Scaled())
    x = torch.randn(3, 4, generator=generator())
    coupling = couple(model, x)
    assert check(model, x, coupling, coupling.channels["a"][2:4]).shift.shape == (4,)


def test_gpt2_follows_the_sizes_its_code_keeps() -> None:
    """One projection for queries, keys and values, split by an attribute: the attribute is found and cut too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        model = shaken(GPT2LMHeadModel(config))
    batch = {"input_ids": torch.randint(50, (2, 5), generator=generator())}
    coupling = couple(model, batch)
    heads = [group for group in coupling.groups if group.heads]
    assert [len(group) for group in heads] == [4, 4]
    assert (
        coupling.channels["transformer.h.0.attn.c_attn"].tolist() == 3 * torch.arange(4).repeat_interleave(4).tolist()
    )
    thinned = check(model, batch, coupling, some(coupling, generator(3)))
    left = thinned.transformer.h[0].attn
    assert left.num_heads * left.head_dim == left.split_size == left.c_proj.weight.shape[0]


def test_a_block_that_is_called_twice_is_cut_once() -> None:
    """Layers shared by depth: every call's attention must follow."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.attention, self.end = (
                nn.Linear(5, 16),
                Attention(16, 4, 2, 4, False, True, False),
                nn.Linear(16, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for _ in range(2):
                x = x + self.attention(F.layer_norm(x, (16,)))
            return self.end(x)

    model = shaken(Twice())
    x = torch.randn(2, 6, 5, generator=generator())
    coupling = couple(model, x)
    assert [(group.kind, len(group)) for group in coupling.groups] == [("attention.q", 2)]
    assert not any("heads" in line for line in coupling.refused)
    check(model, x, coupling, torch.tensor([1]))


def test_attention_of_fixed_slices_is_mask_only_and_its_mlp_is_not() -> None:
    """Phi-3 slices its fused projection at numbers from its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Phi3Config(
            vocab_size=50, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = shaken(Phi3ForCausalLM(config))
    batch = {"input_ids": torch.randint(50, (2, 5), generator=generator())}
    coupling = couple(model, batch)
    assert [group.layers for group in coupling.groups] == [(f"model.layers.{i}.mlp.gate_up_proj",) for i in range(2)]
    assert coupling.channels["model.layers.0.mlp.gate_up_proj"].tolist() == 2 * list(range(12))
    assert any(
        line.startswith("model.layers.0.self_attn.qkv_proj: cutting it breaks the forward pass")
        for line in coupling.refused
    )
    check(model, batch, coupling, some(coupling, generator(4)))


@pytest.mark.parametrize(
    ("between", "width", "reason"),
    [
        (torch.sigmoid, 8, "first: cutting silent channels changes the output by .* SigmoidBackward0"),
        (lambda x: F.softplus(x), 8, "first: cutting silent channels changes the output by .* SoftplusBackward0"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 12, "first: .*ConstantPadNdBackward0"),
        (lambda x: x.roll(1, 1), 8, "first: cutting silent channels changes the output by .* RollBackward0"),
        (lambda x: x / x.std(1, keepdim=True), 8, "first: cutting silent channels changes the output by "),
        (lambda x: x[:, :4] * x[:, 4:], 4, "first: .*SliceOp"),
        (nn.LayerNorm([8, 4, 4]), 8, "first: between .LayerNorm. cannot be cut by channel"),
    ],
)  # fmt: skip
def test_refusals_say_why(between: Callable[[Tensor], Tensor], width: int, reason: str) -> None:
    model = shaken(Net(between, width))
    coupling = couple(model, torch.randn(3, 3, 4, 4, generator=generator()))
    assert coupling.groups == ()
    assert all((ids == -1).all() for ids in coupling.channels.values())
    assert any(re.match(reason, line) for line in coupling.refused), coupling.refused


@pytest.mark.parametrize("seed", range(6))
def test_a_failing_group_does_not_take_the_others_with_it(seed: int) -> None:
    """Whatever the weights: where a ReLU is dead on the example, the sigmoid's group is refused for that."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(3, 5, 1),
            nn.ReLU(),
            nn.Conv2d(5, 5, 1),
            nn.Sigmoid(),
            nn.Conv2d(5, 5, 1),
            nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        ]
    coupling = couple(shaken(nn.Sequential(*layers)), torch.randn(2, 3, 4, 4, generator=generator()))
    assert not any("2" in group.layers for group in coupling.groups)
    assert (coupling.channels["2"] == -1).all()


def test_a_group_that_the_example_does_not_reach_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[2].bias.fill_(-1e3)  # the second ReLU is dead whatever comes in
    coupling = couple(net, torch.randn(2, 3, generator=generator()))
    assert len(coupling) == 0
    assert any("does not change the output" in line for line in coupling.refused)


def test_what_is_normalised_over_channels_may_be_silent_but_not_unread() -> None:
    """A Euclidean norm hears a channel that no layer reads, so zeros in the columns are not enough there."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.b(x / (1 + x.norm(dim=-1, keepdim=True)))

    model = shaken(Normalised())
    x = torch.randn(5, 4, generator=generator())
    coupling = couple(model, x)
    assert [(len(group), group.by_input) for group in coupling.groups] == [(6, False)]
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    assert thin(model, x, coupling).a.out_features == 6
    check(model, x, coupling, torch.tensor([1]))


def test_torch_attention_is_refused_and_its_feed_forward_is_cut() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = shaken(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 12, batch_first=True), 2))
    x = torch.randn(2, 5, 16, generator=generator())
    coupling = couple(model, x)
    assert [(group.kind, len(group)) for group in coupling.groups] == 2 * [("layers.*.linear1", 12)]
    assert (
        "layers.0.self_attn: torch's MultiheadAttention fixes its own width, so its heads cannot be cut"
        in coupling.refused
    )
    check(model, x, coupling, some(coupling, generator(5)))


def test_layers_that_were_not_called_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    assert (
        "spare: its module was not called on the example"
        in couple(model, torch.randn(2, 4, generator=generator())).refused
    )


def test_data_dependent_control_flow_is_named() -> None:
    with pytest.raises(
        SurgeryError, match=r"Branching: Tensor\.__bool__ makes the computation depend .*\(thin=False in a search\)"
    ):
        couple(Branching(), torch.randn(3, 3, generator=generator()))


def test_a_model_that_fails_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    with pytest.raises(
        SurgeryError, match=r"1: no graph can be traced: RuntimeError: mat1 and mat2 .* masks without thinning"
    ):
        couple(model, torch.randn(2, 3, generator=generator()))


def test_missing_torch_pruning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SurgeryError, match=r"pip install 'laconic\[surgery\]'"):
        couple(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3, generator=generator()))


def test_nothing_to_cut() -> None:
    coupling = couple(nn.Linear(3, 2), torch.randn(2, 3, generator=generator()))
    assert isinstance(coupling, Coupling)
    assert len(coupling) == 0
    assert coupling.channels["weight"].tolist() == [-1, -1]


def test_couple_is_blind_to_the_values_of_the_weights() -> None:
    """A network of zeros hides every mistake; the private copy has moved weights."""
    model = Net(torch.sigmoid)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert couple(model, torch.zeros(2, 3, 4, 4)).groups == ()


def test_a_half_precision_model_on_a_dict_batch() -> None:
    model = shaken(Transformer(1, 4, 2, False, False, False, nn.RMSNorm)).to(torch.bfloat16)
    ids = torch.randint(20, (2, 6), generator=generator())
    coupling = couple(model, {"ids": ids})
    thinned = thin(model, {"ids": ids}, coupling)
    assert next(thinned.parameters()).dtype == torch.bfloat16
    assert torch.equal(output(thinned, ids), output(model, ids))


def test_sift_finds_every_item_that_fails() -> None:
    for bad in ((), (3,), (0, 5, 6), tuple(range(9))):
        good, wrong = sift(range(9), lambda items, bad=bad: "no" if set(items) & set(bad) else None)
        assert sorted(good) == [i for i in range(9) if i not in bad]
        assert sorted(wrong) == list(bad)


def test_sift_keeps_what_passes_together() -> None:
    good, wrong = sift(range(6), lambda items: "quarrel" if {1, 4} <= set(items) else None)
    assert good == [0, 1, 2, 3, 5]
    assert wrong == {4: "quarrel"}


def test_apart() -> None:
    a = torch.tensor([1.0, -4.0])
    assert apart([a], [a]) == 0
    assert apart([a], [torch.tensor([1.0, -3.0])]) == 0.25
    assert apart([a], [a[:1]]) == float("inf")
    assert apart([a], [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert apart([torch.zeros(2)], [torch.zeros(2)]) == 0


def test_few_takes_the_first_samples_of_everything() -> None:
    batch = few({"x": torch.arange(14.0).reshape(7, 2), "y": torch.arange(7), "flag": True})
    assert batch["x"].shape == (4, 2)
    assert batch["y"].tolist() == [0, 1, 2, 3]
    assert batch["flag"] is True
    assert few((torch.zeros(7, 2), torch.zeros(3)))[0].shape == (
        7,
        2,
    )  # lengths differ: nobody knows which is the batch
