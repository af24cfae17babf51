"""Objectives are counted by hand on tiny networks, and measured ones are only held to their form: no test reads the clock."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.disk import store
from laconic.errors import SearchError
from laconic.measure import objectives as o
from laconic.measure.layers import REST, count_macs, layers_table, per_layer, plain
from laconic.measure.timing import resized, side_by_side
from laconic.weights import Dense, LowRank, Permuted, Scaled, Shared, Sparse, Sum, Uniform, View, install


def convolutions() -> nn.Sequential:
    """8 x 8 images: 4 filters padded; 6 filters of two groups, stride 2 (3 x 3); transposed to 6 x 6; linear."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, groups=2),
        nn.ConvTranspose2d(6, 2, 2, 2),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


class Recurrent(nn.Module):
    """An embedding, two LSTM layers, a GRU in both directions, a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, 2, batch_first=True)
        self.gru, self.decoder = nn.GRU(8, 6, bidirectional=True), nn.Linear(12, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.gru(self.lstm(self.embedding(ids))[0])[0])


def candidate(model: nn.Module, example: Any = None, **fields: Any) -> o.Candidate:
    network = plain(model)
    return o.Candidate(model, network, torch.randn(2, 3, 8, 8) if example is None else example, network, fields)


def test_convolutions_by_hand() -> None:
    found = count_macs(convolutions(), torch.randn(2, 3, 8, 8))
    assert found == {"0": 64 * 4 * 27, "2": 9 * 6 * 2 * 9, "3": 9 * 6 * 2 * 4, "5": 72 * 5}


def test_zero_weights_make_no_macs() -> None:
    model = convolutions()
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[5].weight[:, 10:] = 0
    found = count_macs(model, torch.randn(2, 3, 8, 8))
    assert found["0"] == 64 * 27
    assert found["5"] == 10 * 5


def test_recurrent_layers_by_hand() -> None:
    """Every weight once per time step; the paper's s_F of a block-sparse LSTM is the ratio of these."""
    model, ids = Recurrent(), torch.randint(0, 20, (3, 7))
    assert count_macs(model, ids) == {
        "lstm": 7 * 2 * (2 * 8 * 32),
        "gru": 7 * 2 * (3 * 6 * 8 + 3 * 6 * 6),
        "decoder": 7 * 240,
    }
    with torch.no_grad():
        model.lstm.weight_hh_l1[:, 4:] = 0
    assert count_macs(model, ids)["lstm"] == 7 * (3 * 8 * 32 + 4 * 32)
    found = count_macs(Packing(model.lstm), {"x": torch.randn(2, 5, 8), "lengths": torch.tensor([5, 2])})
    assert found == {"layer": 7 / 2 * (3 * 8 * 32 + 4 * 32)}, "5 steps and 2 of two examples"


class Packing(nn.Module):
    """A recurrent layer over sequences of their own lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_without_weights_counts_in_full_and_is_listed(mode: Any) -> None:
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    with mode():
        found = count_macs(layer, x)
    assert found == {"self_attn": 5 * 16 * 48 + 5 * 256 + 2 * 5 * 5 * 16, "linear1": 5 * 512, "linear2": 5 * 512}
    assert [row["name"] for row in per_layer(layer, x, repeats=1) if row["products"]] == ["self_attn"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_functional_products_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bij,ijk->bik", x, self.w)

    model = Net()
    assert count_macs(model, torch.randn(2, 3, 4)) == {"": 3 * 4 * 5}
    with torch.no_grad():
        model.w[0] = 0
    assert count_macs(model, torch.randn(2, 3, 4)) == {"": 2 * 4 * 5}


def test_an_installed_weight_counts_as_what_it_decodes_to() -> None:
    layer = nn.Linear(8, 4, bias=False)
    weight = Sparse(Dense((4, 8), dtype="float16"))
    weight.right_inverse(layer.weight.detach())
    weight.set_mask(torch.arange(32).reshape(4, 8) % 4 == 0)
    install(layer, "weight", weight, View((4, 8)))
    assert count_macs(layer, torch.randn(3, 8)) == {"": 8}
    assert torch.equal(layer.weight, weight()), "the layer itself still decodes"
    assert not plain(layer)._parameters.keys() ^ {"weight", "bias"}


def test_pruned_and_cast_is_two_bytes_per_survivor() -> None:
    """Condensa's P+Q: half of 108 + 108 + 360 weights at 2 bytes; the transposed convolution (no site) and 17 biases at 4."""
    model, _ = lc.compress(convolutions(), lc.Magnitude(0.5) >> lc.Cast("float16"))
    assert o.nonzero_bytes(candidate(model)) == 2 * (54 + 54 + 180) + 4 * (48 + 17)
    assert o.parameters(candidate(model)) == 108 + 108 + 48 + 360 + 17
    assert o.macs(candidate(model)) == sum(count_macs(candidate(model).network, torch.randn(2, 3, 8, 8)).values())
    assert o.flops(candidate(model)) == 2 * o.macs(candidate(model))


def test_zeros_of_plain_parameters_do_not_count() -> None:
    model = nn.BatchNorm1d(6)
    with torch.no_grad():
        model.weight[:2] = 0
    assert o.nonzero_bytes_of(model) == 4 * 4, "the biases are zero, running statistics are no parameters"
    assert o.nonzero_bytes_of(nn.Linear(4, 4, bias=False).bfloat16()) == 32


def test_ties_count_once() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    assert o.nonzero_bytes_of(model) == 6 * 4 * 4
    weight = Dense((6, 4), dtype="float16")
    weight.right_inverse(torch.ones(6, 4))
    for layer in model:
        install(layer, "weight", weight, View((6, 4)))
    assert o.nonzero_bytes_of(model) == 6 * 4 * 2


def ones(*shape: int, zeros: int = 0) -> Dense:
    made, W = Dense((shape[0], shape[1]), dtype="float16"), torch.ones(shape)
    W.view(-1)[:zeros] = 0
    made.right_inverse(W)
    return made


def test_every_kind_of_weight_has_its_bits() -> None:
    grid = Uniform((4, 8), bits=4)
    grid.fit(torch.randn(4, 8))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :6] = True
    pruned, codes = Sparse(ones(4, 8, zeros=2)), Sparse(copy.deepcopy(grid))
    pruned.set_mask(mask)
    codes.set_mask(mask)
    side = grid.bits() - 4 * 32
    factors = LowRank(ones(4, 2, zeros=1), ones(2, 8))
    assert ones(4, 8, zeros=3).nonzero_bits() == 16 * 29
    assert grid.nonzero_bits() == grid.bits()
    assert pruned.nonzero_bits() == 16 * 4, "six survive, two of them are zero"
    assert codes.nonzero_bits() == 4 * 6 + side, "six codes, and all scales"
    assert factors.nonzero_bits() == 16 * (7 + 16)
    assert Sum(pruned, factors).nonzero_bits() == 16 * (4 + 23)
    assert Permuted(pruned, torch.arange(8).flip(0)).nonzero_bits() == 16 * 4, "the order is an index"
    assert Scaled(pruned, row_scale=ones(1, 4, zeros=1)).nonzero_bits() == 16 * (4 + 3)
    assert Shared(pruned).nonzero_bits() == 0
    rotated = lc.weights.Rotated(pruned, column_signs=torch.ones(8))
    assert rotated.nonzero_bits() == 16 * 4 + 8, "a sign is a bit"


def test_stored_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    model, _ = lc.compress(convolutions(), "Magnitude(0.9) >> Cast('float16')")
    made = candidate(model, scheme="a scheme whose text is part of the manifest")
    size = lc.save(model, tmp_path / "model", **made.fields)
    assert o.stored_bytes(made) == size == store.stored_bytes(tmp_path / "model")
    assert o.stored_bytes(o.Candidate(model, model, None, model, path=tmp_path / "model")) == size
    assert o.stored_bytes(candidate(model)) < size


def test_goals_are_called_as_their_objectives() -> None:
    assert [o.Minimize(o.latency).name, o.Maximize(o.throughput).name, o.Minimize(o.macs).name] == [
        "latency",
        "throughput",
        "macs",
    ]


def test_objectives_as_text() -> None:
    for text, kind, name in (
        ("throughput", o.Maximize, "throughput"), ("stored_bytes", o.Minimize, "stored_bytes"), ("min throughput", o.Minimize, "throughput"),
        ("Maximise parameters", o.Maximize, "parameters"),
    ):  # fmt: skip
        goal = o.parse_objective(text)
        assert (type(goal), goal.name) == (kind, name)
    with pytest.raises(SearchError, match="did you mean 'throughput'"):
        o.parse_objective("max thruput")
    for text in ("", "best throughput", "min max flops"):
        with pytest.raises(SearchError, match="objective"):
            o.parse_objective(text)


def test_measures_have_their_form_and_leave_no_trace() -> None:
    model = convolutions().train()
    model[2].eval()
    threads, state = torch.get_num_threads(), copy.deepcopy(model.state_dict())
    made = o.Candidate(model, model, torch.randn(2, 3, 8, 8), model)
    rng = torch.get_rng_state()
    low, middle, high = o.Throughput(batch=5, repeats=3, threads=2, channels_last=True).spread(made)
    assert 0 < low <= middle <= high
    assert len(o.Latency(repeats=4, warmup=0).seconds(made)) == 4
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model[2].training
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    assert model[0].weight.is_contiguous()


def test_bad_measures_are_refused() -> None:
    made = candidate(nn.Linear(2, 2), torch.randn(1, 2))
    for bad in (o.Latency(repeats=0), o.Latency(warmup=-1), o.Latency(threads=0), o.Latency(batch=0)):
        with pytest.raises(SearchError):
            bad(made)
    with pytest.raises(SearchError, match="one network or more"):
        side_by_side({}, torch.randn(1, 2))


def test_side_by_side_measures_in_turn() -> None:
    order: list[str] = []

    class Spy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            order.append(str(self.out_features))
            return super().forward(input)

    first, second = side_by_side({"a": Spy(8, 4), "b": Spy(8, 2)}, torch.randn(6, 8), batch=4, repeats=4, warmup=1)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["4", "2", "4", "2", "4", "2", "4"], (
        "warmed up one after the other, then a round 4 2, a round 2 4, and again"
    )
    assert (first["speedup"], first["speedup_quartiles"]) == (1.0, [1.0, 1.0])
    assert second["rounds"] == 4
    assert second["batch"] == 4
    assert second["speedup_quartiles"][0] <= second["speedup"] <= second["speedup_quartiles"][1]
    assert second["throughput"] == pytest.approx(4 / second["seconds"])


class Drifting:
    """Stands in for the module `time` on a machine that gets slower: work takes longer the later it is done."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, amount: float) -> None:
        self.now += amount * (1 + self.now)


def test_measures_of_one_search_are_ratios_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Drifting()
    monkeypatch.setattr("laconic.measure.timing.time", clock)

    class Work(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            clock.work(self.out_features / 100)
            return super().forward(input)

    reference, small = Work(8, 8), Work(8, 2)
    made = o.Candidate(small, small, torch.randn(6, 8), reference)
    early = o.Latency(repeats=1)(made)
    for goal, ratio in ((o.Maximize(o.Throughput(repeats=9)), 4.0), (o.Minimize(o.Latency(repeats=9)), 0.25)):
        assert [goal.beside(made, 10.0) for _ in range(3)] == pytest.approx([10 * ratio] * 3, rel=0.1)
        assert goal.beside(o.Candidate(reference, reference, made.example, reference), 10.0) == pytest.approx(
            10, rel=0.1
        )
    assert o.Latency(repeats=1)(made) > 2 * early, "the same network, a slower machine"
    assert o.Minimize(o.parameters).beside(made, 10.0) == 18, "what does not depend on the machine is what it is"


def test_batches_are_cut_and_repeated() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    assert resized(x, 2).tolist() == [[0, 1], [2, 3]]
    assert resized({"a": x, "flag": True}, 4)["a"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert [len(t) for t in resized((x, torch.zeros(3)), 7)] == [7, 7]
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert resized(images, 9).is_contiguous(memory_format=torch.channels_last)


def test_rows_of_layers() -> None:
    model, x = nn.Sequential(convolutions(), nn.Softmax(1)), torch.randn(2, 3, 8, 8)
    rows = per_layer(model, x, repeats=3, warmup=1)
    assert [row["name"] for row in rows] == ["0.0", "0.2", "0.3", "0.5", REST]
    assert [row["entries"] for row in rows] == [108, 108, 48, 360, 0]
    assert [row["macs"] for row in rows] == [6912, 972, 432, 360, 0]
    assert all(row["ms"] > 0 for row in rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_before_and_after() -> None:
    before, after = convolutions(), convolutions()
    with torch.no_grad():
        after[0].weight[2:] = 0
    after[5] = nn.Identity()
    rows = {row["name"]: row for row in layers_table(before, after, torch.randn(2, 3, 8, 8), repeats=1)}
    assert (rows["0"]["entries_before"], rows["0"]["nonzero"], rows["0"]["macs_before"], rows["0"]["macs_after"]) == (
        108,
        54,
        6912,
        3456,
    )
    assert (
        rows["5"]["entries_before"],
        rows["5"]["entries_after"],
        rows["5"]["macs_after"],
        rows["5"]["ms_after"],
    ) == (360, 0, 0, 0)
