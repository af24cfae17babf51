"""AFM: principal components of what layers put out, centred, with the bias that restores the mean; on the way to disk and back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.disk.load import open_source
from laconic.disk.store import MANIFEST, Compressed
from laconic.engine.statistics import Statistics
from laconic.errors import CheckpointError, SchemeError
from laconic.measure.quality import outputs as streamed
from laconic.methods.afm import AFM, output_components, table_components
from laconic.methods.lowrank import LowRank
from laconic.model.sites import Site, Stats, find_slots
from laconic.solvers.output_error import output_error
from laconic.weights import baked, installed, unpack
from laconic.weights.demands import Demands, demands_of

EXACT = lc.Cast("float32")


def inputs(tokens: int = 400, columns: int = 24, mean: float = 2.0, seed: int = 0) -> Tensor:
    """Correlated inputs X [tokens, columns] with a mean of their own."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) * torch.logspace(0, -1.5, columns)
    return torch.randn(tokens, columns, generator=g) @ mix + mean * torch.randn(columns, generator=g)


def site_of(W: Tensor, X: Tensor) -> Site:
    return Site("layer", W, hessian=(X.T @ X / len(X)).unsqueeze(0), centre=X.mean(0, keepdim=True))


def matrix(rows: int = 16, columns: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "r"), [(16, 1), (16, 7), (16, 15), (40, 9), (40, 23)])
def test_the_error_is_the_sum_of_the_eigenvalues_dropped(rows: int, r: int) -> None:
    """On real outputs, Y = X W^T + b: the covariance of Y is diagonalised here by itself, and the mean squared error is its tail."""
    X, W = inputs().double(), matrix(rows).double()
    b = torch.linspace(-3, 3, rows, dtype=torch.float64)
    Y = X @ W.T + b
    eigenvalues = torch.linalg.eigvalsh((Y - Y.mean(0)).T @ (Y - Y.mean(0)) / len(Y)).flip(0)
    U, B, bias, e = output_components(W, X.T @ X / len(X), X.mean(0), r)
    found = X @ (U @ B).T + b + bias
    assert float((Y - found).square().sum(1).mean()) == pytest.approx(float(eigenvalues[r:].sum()), rel=1e-6, abs=1e-9)
    assert e[: min(rows, 24)].tolist() == pytest.approx(
        eigenvalues[: min(rows, 24)].tolist(), rel=1e-6, abs=1e-6 * float(eigenvalues[0])
    )
    torch.testing.assert_close(found.mean(0), Y.mean(0))  # (I - U U^T) mu is what the mean lacks
    torch.testing.assert_close(U.T @ U, torch.eye(r, dtype=torch.float64))


def test_a_tiny_case_by_hand() -> None:
    """Outputs (1, 0), (5, 0), (3, 4), (3, -4) about their mean (3, 0): variances 2 and 8. Rank one keeps the second axis and the mean."""
    X = torch.tensor([[1.0, 0.0], [5.0, 0.0], [3.0, 4.0], [3.0, -4.0]])
    weight = AFM(1, factors=EXACT)(site_of(torch.eye(2), X))
    torch.testing.assert_close(weight(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(weight.output_bias(), torch.tensor([3.0, 0.0]))
    uncentred = LowRank(1, weighted=True, factors=EXACT)(
        site_of(torch.eye(2), X)
    )  # second moments 11 and 8: the mean takes the rank
    torch.testing.assert_close(uncentred(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_at_full_rank_it_is_the_layer_itself() -> None:
    for rows, columns in ((16, 24), (24, 24), (40, 24)):
        X, W = inputs(columns=columns), matrix(rows, columns)
        weight = AFM(min(rows, columns), factors=EXACT)(site_of(W, X))
        torch.testing.assert_close(weight(), W, rtol=1e-4, atol=1e-5)
        assert weight.output_bias().abs().max() < 1e-3  # type: ignore[union-attr]
    X = inputs()
    X[:, 7:] = 0  # inputs that never come: what the matrix does with them stays where the rank allows it
    torch.testing.assert_close(AFM(24, factors=EXACT)(site_of(matrix(40), X))(), matrix(40), rtol=1e-4, atol=1e-4)


def test_centred_beats_uncentred_beats_plain() -> None:
    """The claim in miniature, at equal rank, on inputs that have a mean; and what the report calls its error is what was measured."""
    X, W = inputs(mean=1.0), matrix()
    site = site_of(W, X)
    found = {}
    for method in (AFM(4, factors=EXACT), LowRank(4, weighted=True, factors=EXACT), LowRank(4, factors=EXACT)):
        weight = method(site)
        bias = weight.output_bias()
        Y = X @ weight().T + (bias if bias is not None else 0)
        found[method] = float((Y - X @ W.T).square().sum() / (X @ W.T).square().sum())
        assert output_error(site, weight) == pytest.approx(found[method], rel=1e-3)
    centred, uncentred, plain = found.values()
    assert centred < 0.9 * uncentred < 0.9 * 0.9 * plain


@pytest.mark.parametrize("r", [1, 5, 11])
def test_a_table_counts_its_rows_as_they_are_looked_up(r: int) -> None:
    """sum_v p_v |E_v - E^_v|^2 is the tail of the eigenvalues of the weighted covariance; equal weights do worse on what is looked up."""
    g = torch.Generator().manual_seed(0)
    E, uses = (
        torch.randn(50, 12, generator=g).double() * torch.logspace(0, -1, 12) + 1,
        torch.rand(50, generator=g) ** 6 * 100,
    )
    p = uses.double() / uses.double().sum()
    A, B, e = table_components(E, uses, r)
    error = float((p * (E - A @ B).square().sum(1)).sum())
    assert error == pytest.approx(float(e[r:].sum()), rel=1e-8)
    alike = table_components(E, None, r)
    assert error < float((p * (E - alike[0] @ alike[1]).square().sum(1)).sum())
    torch.testing.assert_close(p @ (A @ B), p @ E)


def test_ranks_that_save_nothing_are_noted() -> None:
    site = site_of(matrix(), inputs()).having(notes=[])
    assert AFM(0.5)(site).bits() == AFM(0.5).expected_bits((16, 24)) == 16 * 5 * 40 + 32 * 16
    assert site.notes == []
    for method, bits in ((AFM(10), 16.7), (LowRank(10), 16.7), (LowRank(10, weighted=True), 16.7)):
        noted = site.having(notes=[])
        method(noted)
        assert noted.notes == [
            f"layer: rank 10 takes {bits} bits per weight, no less than the matrix itself; below 10 it saves"
        ]
    LowRank(10, factors=lc.RTN(4, "channel"))(site)
    assert site.notes == []


class Net(nn.Module):
    """Every kind of layer that can take an output bias, and a table: with a bias of its own and without."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(30, 16), nn.Conv1d(16, 12, 3, padding=1)
        self.plain, self.turned = nn.Linear(12, 20, bias=False), transformers.pytorch_utils.Conv1D(14, 20)
        self.image = nn.Conv2d(1, 6, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2).relu()
        h = self.turned(self.plain(h).relu() + 1)
        return self.image(h.unsqueeze(1)).flatten(1)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def tokens(seed: int = 0) -> Tensor:
    return (30 * torch.rand(8, 9, generator=torch.Generator().manual_seed(seed)) ** 3).long()


PLAN = "[('*image', AFM(3)), ('*', AFM(0.6))]"


def test_every_layer_adds_it_and_every_way_back_gives_the_same(tmp_path: Path) -> None:
    model, given = net(), [tokens(0), tokens(1)]
    before = model(tokens(2)).detach()
    lc.compress(model, lc.parse(PLAN), given)
    biases = {name: weight.output_bias() is not None for name, weight in installed(model).items()}
    assert biases == {
        "table.weight": False,
        "conv.weight": True,
        "plain.weight": True,
        "turned.weight": True,
        "image.weight": True,
    }
    with torch.no_grad():
        after = model(tokens(2))
        assert 0 < float((after - before).square().sum() / before.square().sum()) < 0.5
        weight = installed(model)["conv.weight"]
        bare = nn.functional.conv1d(
            model.table(tokens(2)).transpose(1, 2), model.conv.weight, model.conv.bias, padding=1
        )
        expected = bare + weight.output_bias()[None, :, None]  # type: ignore[index]
        torch.testing.assert_close(model.conv(model.table(tokens(2)).transpose(1, 2)), expected)
        lc.save(model, tmp_path)
        assert torch.equal(lc.load_into(net(1), tmp_path).eval()(tokens(2)), after)
        assert torch.equal(copy.deepcopy(model)(tokens(2)), after)
        dense = baked(model)
        torch.testing.assert_close(dense(tokens(2)), after)
    assert demands_of(dense.conv) is None, "it went into the layer's own bias"
    assert isinstance(demands_of(dense.plain), Demands)
    with pytest.raises(SchemeError, match="plain: adds a bias to its outputs and .* would forget it"):
        lc.save(dense, tmp_path / "dense")
    sizes = {name: weight.bits() for name, weight in installed(model).items()}
    assert sizes == {name: 8 * Compressed(tmp_path).nbytes(name) for name in sizes}
    again = unpack(*weight.pack())
    assert torch.equal(again.output_bias(), weight.output_bias())  # type: ignore[arg-type]
    damaged = (tmp_path / MANIFEST).read_text().replace('"left"', '"bias"', 1)
    (tmp_path / MANIFEST).write_text(damaged)
    with pytest.raises(CheckpointError):
        lc.load_into(net(1), tmp_path)


def test_a_bias_that_two_layers_share_takes_up_neither_of_theirs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    model[2].bias = model[0].bias
    x = inputs()
    lc.compress(model, AFM(6), [x])
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(baked(model)(x), expected)


def test_a_layer_behind_others_is_measured_behind_them() -> None:
    """The mean that reaches the second layer is the one after the first one's bias: the network's mean output comes out right."""
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12, bias=False))
    X = inputs()
    with torch.no_grad():
        expected = model(X).mean(0)
        lc.compress(model, lc.parse("[('*', AFM(3))]"), [X])
        torch.testing.assert_close(model(X).mean(0), expected, rtol=2e-2, atol=2e-2)  # the factors are bfloat16


def test_signed_means_and_look_ups_are_what_they_say() -> None:
    model, given = net(), tokens(3)
    slots = {slot.name: slot for slot in find_slots(model)}
    parameters = {slot: getattr(model.get_submodule(slot.users[0][0]), slot.users[0][1]) for slot in slots.values()}
    statistics = Statistics(parameters, dict.fromkeys(parameters, AFM().wants))
    seen: list[Tensor] = []
    model.plain.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad(), statistics.watch():
        model(given)
        model(given)
    site = statistics.describe(slots["plain"], model.plain.weight.detach(), 0)
    torch.testing.assert_close(site.centre[0], seen[0].flatten(0, 1).mean(0))  # type: ignore[index]
    table = statistics.describe(slots["table"], model.table.weight.detach(), 0)
    assert table.uses is not None
    assert table.uses.tolist() == (2 * torch.bincount(given.flatten(), minlength=30)).tolist()
    assert AFM().wants == Stats.HESSIAN | Stats.CENTRE | Stats.USES


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_on_disk(tied: bool, tiny: Path, text: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Layers without a bias of their own, a table counted over the calibration text; streamed, loaded, by transformers: the same logits."""
    if not tied:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        model.config.tie_word_embeddings, source = False, tmp_path / "source"
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.01)
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    else:
        source = tiny
    out = tmp_path / "out"
    lc.compress(source, "[('*', AFM(0.8))]", data=str(text), out=out, samples=8, length=32, test_tokens=256)
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        ours = lc.load(out, dtype=torch.float32)
        expected = ours(ids, use_cache=False).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(theirs(ids, use_cache=False).logits, expected)
        (found,) = streamed(
            open_source(out), [{"input_ids": ids, "use_cache": False}], torch.float32, torch.device("cpu")
        )
        assert torch.equal(found.logits, expected)
        live = lc.load(out, dense=False, dtype=torch.float32)
        torch.testing.assert_close(live(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    stored = Compressed(out)
    assert "bias" in stored.weights["model.layers.1.mlp.up_proj.weight"]
    assert "bias" not in stored.weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_before_a_chain_is_counted_once_over_the_data(tied: bool, tiny: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.01)
    E = model.model.embed_tokens.weight.detach().clone()
    batches = [
        {"input_ids": (320 * torch.rand(4, 24, generator=torch.Generator().manual_seed(i)) ** 3).long()}
        for i in range(3)
    ]
    lc.compress(model, lc.parse("[('*embed_tokens', AFM(12, factors=Cast('float32'))), ('*', AFM(0.8))]"), batches)
    counted = torch.bincount(torch.cat([batch["input_ids"].flatten() for batch in batches]), minlength=320)
    A, B, _ = table_components(E, counted, 12)
    torch.testing.assert_close(model.model.embed_tokens.weight, (A @ B).float())


def test_what_cannot_be_carried_out_is_refused_by_name() -> None:
    for text in (
        "AFM(8) + RTN(4)",
        "RTN(4) + AFM(8)",
        "AFM(8) >> RTN(4)",
        "Hadamard(AFM(8))",
        "RTN(4) + (RTN(8) >> AFM(8))",
    ):
        with pytest.raises(SchemeError, match="cannot be a part|not known in a rotated basis"):
            lc.parse(text)
    grouped = Site("experts", matrix(), 2, hessian=torch.eye(24).repeat(2, 1, 1), centre=torch.zeros(2, 24))
    with pytest.raises(SchemeError, match=r"experts: AFM needs one covariance for the whole matrix \(groups: 2\)"):
        AFM(4)(grouped)
    with pytest.raises(SchemeError, match="rank 17 of a 16 x 24 matrix"):
        AFM(17)(site_of(matrix(), inputs()))
