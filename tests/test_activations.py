"""Inputs rounded while the layer runs: the formula, and that every way to run, store, copy or calibrate a model keeps to it."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import laconic as lc
import laconic.engine.directory
from laconic.disk.load import open_source
from laconic.disk.store import MANIFEST, Compressed, write_manifest
from laconic.errors import CheckpointError, SchemeError, VerificationError
from laconic.measure.quality import evaluate_source, outputs
from laconic.methods.base import Method
from laconic.methods.rtn import RTN
from laconic.model.sites import Site, Stats
from laconic.pipeline import Options, compress_directory
from laconic.show.inspect import inspect_directory
from laconic.weights import Dense, Scaled, Uniform, View, Weight, bake, baked, install, installed
from laconic.weights.base import pack, unpack
from laconic.weights.demands import Demands, demands_of, set_demands
from laconic.weights.inputs import Inputs
from laconic.weights.inputs import round_input as round_by
from tests.conftest import tiny_config

IDS = torch.tensor([[5, 99, 17, 300, 42, 7, 7, 256], [1, 2, 3, 4, 5, 6, 7, 8]])


@dataclass(frozen=True, repr=False)
class Rounded(Method):
    """RTN of W diag(s), with inputs rounded: s grows over the columns from 1 to `spread`."""

    input_bits: int | None = 4
    spread: float = 1.0

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return RTN(8, "channel").expected_bits(shape)

    def __call__(self, site: Site) -> Weight:
        s = torch.linspace(1, self.spread, site.W.shape[1]).unsqueeze(0)
        weight: Weight = RTN(8, "channel")(site.having(W=site.W * s))
        if self.spread != 1:
            factors = Dense((1, site.W.shape[1]), dtype="float32")
            factors.right_inverse(1 / s)
            weight = Scaled(weight, column_scale=factors)
        weight.inputs = None if self.input_bits is None else Inputs(self.input_bits)
        return weight


class GaveUpError(SchemeError):
    """What a Spy raises."""


@dataclass(frozen=True, repr=False)
class Spy(Method):
    """RTN of a site whose inputs it looks at; `ends` is where it gives up."""

    ends: bool = False
    needs = Stats.SQUARES

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return RTN(8, "channel").expected_bits(shape)

    def give_up(self, site: Site) -> Weight:
        raise GaveUpError(f"{site.name}: gave up")

    def __call__(self, site: Site) -> Weight:
        assert site.squares is not None
        if self.ends:
            self.give_up(site)
        site.notes.append(repr(site.squares.flatten().tolist()))
        return RTN(8, "channel")(site)


def linear(weight: Weight) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    install(layer, "weight", weight, View(tuple(layer.weight.shape)))
    return layer.requires_grad_(False)


def stored(W: Tensor, scale: Tensor | None = None, bits: int | None = 4) -> Weight:
    inner = Dense((W.shape[0], W.shape[1]), dtype="float32")
    inner.right_inverse(W)
    weight: Weight = inner
    if scale is not None:
        factors = Dense((1, W.shape[1]), dtype="float32")
        factors.right_inverse(scale.unsqueeze(0))
        weight = Scaled(inner, column_scale=factors)
    weight.inputs = None if bits is None else Inputs(bits)
    return weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_input(x: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """Per token, dynamic and symmetric."""
    return round_by(x, Inputs(bits), scale)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# the formula


def test_by_hand() -> None:
    """3 bits: the levels are -3 to 3; a step is a third of the largest entry of the row."""
    x = torch.tensor([[0.6, -3.0, 1.4, 2.6], [0.0, 0.0, 0.0, 0.0], [0.3, 0.1, -0.04, -0.2]])
    expected = torch.tensor([[1.0, -3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.3, 0.1, 0.0, -0.2]])
    torch.testing.assert_close(round_input(x, 3), expected)
    # x diag(c) = [1.2, -3, 0.7, 0], whose step is 1: [1, -3, 1, 0], divided by c again; where c is 0 the weight's column is 0
    torch.testing.assert_close(
        round_input(x[:1], 3, torch.tensor([2.0, 1.0, 0.5, 0.0])), torch.tensor([[0.5, -3.0, 2.0, 0.0]])
    )


def eight_bits(W: Tensor, s: Tensor) -> tuple[Uniform, Weight]:
    """W diag(s) on a symmetric grid, and the weight that stands for W and rounds its inputs."""
    grid = Uniform((W.shape[0], W.shape[1]), bits=8, group="channel", symmetric=True)
    grid.fit(W * s)
    grid.right_inverse(W * s)
    weight = Scaled(grid, column_scale=stored((1 / s).unsqueeze(0), bits=None))
    weight.inputs = Inputs(8)
    return grid, weight


def test_it_is_the_integer_product() -> None:
    """y = d_x d_w q_x q_w^T with integers on both sides, the smoothing scale in neither: what an outlier of the inputs costs is less with it."""
    W, x = random(32, 64), random(48, 64, seed=1)
    x[:, 5] *= 60
    s = (x.abs().amax(0) / W.abs().amax(0)).sqrt()
    grid, weight = eight_bits(W, s)
    smooth = x / s
    d_x, d_w = smooth.abs().amax(1, keepdim=True) / 127, grid.scale.forward().flatten()
    q_x, q_w = (smooth / d_x).round().to(torch.int64), (grid.forward() / d_w.unsqueeze(1)).round().to(torch.int64)
    assert int(q_x.abs().max()) == 127
    torch.testing.assert_close(linear(weight)(x), (q_x @ q_w.t()).float() * d_x * d_w, rtol=1e-4, atol=1e-4)
    smoothed, plain = (((linear(w)(x) - x @ W.t()).norm()) for w in (weight, eight_bits(W, torch.ones(64))[1]))
    assert smoothed < 0.4 * plain


def test_the_limits() -> None:
    x = random(40, 64) * torch.logspace(-20, 20, 40).unsqueeze(1)
    assert ((round_input(x, 16) - x).abs() <= 1e-4 * x.abs().amax(1, keepdim=True)).all()
    assert torch.equal(round_input(torch.zeros(3, 4), 8), torch.zeros(3, 4))
    assert torch.equal(round_input(torch.full((1, 4), 1e-45), 8), torch.zeros(1, 4)), (
        "a step below what a float32 can hold"
    )
    assert round_input(torch.tensor([[1.0, torch.inf], [1.0, 2.0]]), 8).isnan().any(1).tolist() == [True, False]
    assert round_input(torch.ones(0, 4), 8).shape == (0, 4)
    for bits in (2, 3, 8):
        assert len(round_input(torch.linspace(-1, 1, 4096), bits).unique()) == 2**bits - 1
        assert torch.equal(round_input(round_input(x, bits), bits), round_input(x, bits)), (
            "the largest entry is a level"
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_alone_and_types_stay(dtype: torch.dtype) -> None:
    """Whatever else is in the batch, a token is rounded in the same way, in float32, and comes back in its own type."""
    x = random(2, 5, 32).to(dtype)
    found = round_input(x, 8, torch.linspace(0.5, 2, 32).to(torch.bfloat16))
    assert found.dtype == dtype
    assert torch.equal(found[1, 3], round_input(x[1, 3], 8, torch.linspace(0.5, 2, 32).to(torch.bfloat16)))
    assert torch.equal(round_input(x, 8), round_input(x.float(), 8).to(dtype))


def test_gradients_pass_straight_through() -> None:
    layer, x = linear(stored(random(3, 8), torch.linspace(0.5, 2, 8))), random(4, 8, seed=1).requires_grad_()
    layer(x).square().sum().backward()
    with torch.no_grad():
        seen = round_input(x, 4, torch.linspace(0.5, 2, 8))
        W = layer.weight
    torch.testing.assert_close(x.grad, 2 * (seen @ W.t()) @ W)
    assert torch.equal(layer(x), layer(x.detach())), "the value is the same with a gradient and without"


# layers


class Layers(nn.Module):
    """A tie of two layers, of which one is called by keyword, and GPT-2's kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(16, 16), nn.Linear(16, 16), Conv1D(12, 16)
        self.two.weight = self.one.weight
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=i))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(input=self.one(x).relu()).relu())

    def by_definition(self, x: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
        """By the layers' own products: a sum in another order may come to lie on the other side of a tie of the next rounding."""
        x = nn.functional.linear(round_input(x, bits, scale), self.one.weight, self.one.bias).relu()
        x = nn.functional.linear(round_input(x, bits, scale), self.two.weight, self.two.bias).relu()
        return torch.addmm(self.three.bias, round_input(x, bits, scale), self.three.weight)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_every_user_of_a_weight_rounds_and_it_is_stored_once(spread: float, tmp_path: Path) -> None:
    net, x = Layers().eval(), random(7, 16, seed=9)
    scale = 1 / torch.linspace(1, spread, 16) if spread != 1 else None
    lc.compress(net, Rounded(4, spread))
    with torch.no_grad():
        after, plain = net(x), net.by_definition(x, 16, scale)
        torch.testing.assert_close(after, net.by_definition(x, 4, scale), rtol=1e-5, atol=1e-5)
        assert (after - plain).norm() > 0.02 * plain.norm(), "4 bits can be told from none"
        lc.save(net, tmp_path)
        assert [Compressed(tmp_path).weights[name]["input_bits"] for name in ("one.weight", "three.weight")] == [4, 4]
        assert "two.weight" not in Compressed(tmp_path).weights
        again = lc.load_into(Layers(), tmp_path).eval()
        assert torch.equal(again(x), after)
        assert installed(again)["one.weight"] is installed(again)["two.weight"]
        bake(again)
        assert again.one.weight is again.two.weight
        torch.testing.assert_close(
            again(x), after, rtol=1e-5, atol=1e-5
        )  # a dense parameter lies in memory in another way than a decoded one
        assert type(again.one) is nn.Linear
        assert set(again.state_dict()) == set(Layers().state_dict()), "nothing of it is in a state dict"


def test_the_scale_of_an_installed_weight_is_read_at_every_call() -> None:
    """A scale that is trained is the one that rounds, as it will be after storing; a copy of the module has a scale of its own."""
    weight, x = stored(random(3, 8), torch.ones(8)), random(4, 8, seed=1)
    layer = linear(weight)
    twin = copy.deepcopy(layer)
    factors: Any = weight.column_scale
    with torch.no_grad():
        before = layer(x)
        factors.values.mul_(torch.linspace(0.5, 2, 8))
        torch.testing.assert_close(layer(x), round_input(x, 4, torch.linspace(0.5, 2, 8)) @ layer.weight.t())
        assert torch.equal(twin(x), before)


@pytest.mark.parametrize("dense", [False, True])
def test_copies_and_conversions(dense: bool) -> None:
    """A copy rounds by itself; in another float type a dense layer still rounds by the scale in float32."""
    layer, x = linear(stored(random(3, 8), torch.linspace(0.51, 1.93, 8))), random(4, 8, seed=1)
    before = layer(x)
    if dense:
        bake(layer)
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(layer)
    set_demands(layer, None)
    assert not layer._forward_pre_hooks
    assert not layer._forward_pre_hooks_with_kwargs
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(twin(x), before, rtol=1e-5, atol=1e-5)
    if dense:
        exact = round_input(x.double(), 4, torch.linspace(0.51, 1.93, 8))
        twin = twin.bfloat16().double()
        assert torch.equal(twin(x.double()), exact @ twin.weight.t())
        assert twin.to("meta")(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("dense", [False, True])
def test_it_compiles_as_one_graph(dense: bool) -> None:
    net, x = Layers().eval(), random(7, 16, seed=9)
    lc.compress(net, Rounded(8, 4.0))
    if dense:
        bake(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    if not dense:
        return
    gradients = []
    for run in (compiled, net):
        x = random(7, 16, seed=9).requires_grad_()
        run(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_a_fused_path_is_not_taken() -> None:
    """torch's encoder layer reads the weights of its linear layers without calling them, unless these have hooks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    lc.compress(net, [("linear*", Rounded(3)), ("*", lc.Keep())])
    bake(net)
    x = random(2, 5, 16)
    with torch.no_grad():
        fast = net(x)
    for layer in (net.linear1, net.linear2):
        set_demands(layer, None)
    with torch.no_grad():
        assert not torch.allclose(net(x), fast, atol=1e-3)


class Experts(nn.Module):
    is_transposed = False  # as transformers marks experts that compute W x

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(random(4, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.up)


REFUSED = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(8, 16)), "0: a look-up has no inputs"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "0: the inputs of Conv2d"),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(8, 8)), "0.weight_ih_l0: the inputs of LSTM"),
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        "0.in_proj_weight: the inputs of MultiheadAttention",
    ),
    "attention's output": (lambda: nn.MultiheadAttention(8, 2), "out_proj: its inputs cannot be rounded.*never called"),
    "experts": (lambda: nn.Sequential(Experts()), "0.up: the inputs of Experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_be_done_it_is_refused(case: str) -> None:
    net = REFUSED[case][0]()
    scheme = (
        [("*in_proj_weight", lc.Keep()), ("*", Rounded(8))] if case == "attention's output" else [("*", Rounded(8))]
    )
    with pytest.raises(SchemeError, match=REFUSED[case][1]):
        lc.compress(net, scheme)
    assert installed(net) == {}


@pytest.mark.parametrize("bits", [True, "8", 0, 1, 17, -1, 8.0])
def test_numbers_of_bits_that_are_none(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(
        SchemeError, match="(inputs: bits should be a whole number from 2 to 16|input_bits should be int or None)"
    ):
        lc.compress(nn.Sequential(nn.Linear(8, 8)), Rounded(bits))
    weight = stored(random(4, 8))
    spec, tensors = pack(weight)
    assert unpack(spec, tensors).inputs == Inputs(4)
    with pytest.raises(CheckpointError, match="dense: input_bits should be a whole number"):
        unpack(spec | {"input_bits": bits}, tensors)
    lc.save(linear(weight), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["specs"][0]["input_bits"] = bits
    write_manifest(tmp_path, manifest)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: spec 0: dense: input_bits should be"):
        Compressed(tmp_path)


def test_only_a_whole_weight_rounds_inputs(tmp_path: Path) -> None:
    """A part that asks for it, where nobody would look, is refused when it is made, stored, and read."""
    inside = "0: a uniform weight that rounds inputs inside a (sum|rotated) one"
    lost = "0: Rounded.* rounds inputs, which RTN.* would forget"
    composed = {
        Rounded(8) + lc.LowRank(2): inside,
        lc.Hadamard(Rounded(8)): inside,
    }
    for scheme, message in (composed | {Rounded(8) >> RTN(4, "channel"): lost}).items():
        net = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(SchemeError, match=message):
            lc.compress(net, scheme)
        assert installed(net) == {}
    for first in (lc.LowRank(4), lc.Magnitude(0.5)):
        net, report = lc.compress(nn.Sequential(nn.Linear(8, 8)), first >> Rounded(8))
        assert report.sites[0]["input_bits"] == 8
        assert [weight.inputs for weight in installed(net).values()] == [Inputs(8)]
    weight = stored(random(4, 8), torch.ones(8))
    weight.column_scale.inputs = Inputs(8)  # type: ignore[union-attr]
    with pytest.raises(SchemeError, match="inside a scaled one"):
        pack(weight)
    weight.column_scale.inputs = None  # type: ignore[union-attr]
    lc.save(linear(weight), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["specs"][0]["weight"]["input_bits"] = 8
    write_manifest(tmp_path, manifest)
    with pytest.raises(CheckpointError, match="input_bits in a part"):
        Compressed(tmp_path)


def test_without_it_nothing_is_said() -> None:
    """Files of methods that leave inputs alone are what they were, byte for byte."""
    weight = stored(random(4, 8), torch.ones(8), bits=None)
    assert pack(weight)[0] == weight.pack()[0]
    assert "input_bits" not in json.dumps(pack(weight)[0])
    assert demands_of(linear(weight)) is None


def test_compressed_again(tmp_path: Path) -> None:
    """The last weight of a layer decides; a plain tensor cannot say that inputs are rounded, so it is not stored as one."""
    net = Layers().eval()
    lc.compress(net, Rounded(4, 4.0))
    bake(net)
    with pytest.raises(SchemeError, match="one: rounds its inputs"):
        lc.save(net, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    lc.compress(net, "RTN(8, 'channel')")
    x = random(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.by_definition(x, 16), rtol=1e-3, atol=1e-2)
    assert not any(module._forward_pre_hooks or "input_rounding" in module._modules for module in net.modules())


def test_what_fails_leaves_no_rounding_behind() -> None:
    net = Layers().eval()
    before = net(random(3, 16))
    with pytest.raises(GaveUpError):
        lc.compress(net, [("three", Spy(ends=True)), ("*", Rounded(4))], [random(32, 16)])
    assert torch.equal(net(random(3, 16)), before)
    bake(lc.compress(net, [("three", lc.Keep()), ("*", Rounded(4))])[0])
    before = net(random(3, 16))
    with pytest.raises(GaveUpError):
        lc.compress(net, [("three", Spy(ends=True)), ("*", RTN(8, "channel"))], [random(32, 16)])
    assert torch.equal(net(random(3, 16)), before), "and puts back what was there"


# models on disk


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lc.Report]:
    out = tmp_path_factory.mktemp("rounded") / "model"
    return out, compress_directory(
        tiny, Rounded(4, 4.0), out, Options(data=str(text), samples=8, length=32, test_tokens=512)
    )


def test_every_way_to_run_it_is_one_model(made: tuple[Path, lc.Report], tiny: Path) -> None:
    """Streamed block by block, loaded dense, loaded with its Weights, by transformers, and compressed in memory: the same logits."""
    out, _ = made
    ours = lc.load(out, dtype=torch.float32)
    expected = logits(ours)
    batches = [{"input_ids": IDS, "use_cache": False}]
    (streamed,) = outputs(open_source(out), batches, torch.float32, torch.device("cpu"))
    assert torch.equal(streamed.logits, expected)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), expected)
    assert torch.equal(logits(copy.deepcopy(ours)), expected)
    installed_model = lc.load(out, dense=False, dtype=torch.float32)
    torch.testing.assert_close(logits(installed_model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(baked(installed_model)), expected, rtol=1e-5, atol=1e-5)
    memory = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lc.compress(memory, Rounded(4, 4.0))
    torch.testing.assert_close(logits(memory), expected, rtol=1e-5, atol=1e-5)
    for module in ours.modules():
        set_demands(module, None)
    assert (logits(ours) - expected).norm() > 0.05 * expected.norm()


def test_half_precision_and_generation(made: tuple[Path, lc.Report]) -> None:
    out, _ = made
    ours, theirs = lc.load(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    assert logits(ours).dtype == torch.bfloat16
    assert torch.equal(logits(ours), logits(theirs))
    ours = ours.float()
    found = ours.generate(IDS[:1], do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    assert found.shape == (1, IDS.shape[1] + 8)
    with torch.no_grad():  # a token that comes alone is rounded as it is among others, but for ties of its 15 levels
        past = ours(IDS[:1, :-1], use_cache=True).past_key_values
        alone, among = ours(IDS[:1, -1:], past_key_values=past).logits[0, -1], ours(IDS[:1]).logits[0, -1]
    assert (alone - among).norm() < 0.02 * among.norm(), "a twentieth is what the rounding itself changes, see above"


def test_the_report_measures_it_against_an_original_that_does_not_round(
    made: tuple[Path, lc.Report], tiny: Path, text: Path
) -> None:
    out, report = made
    tokens = dict(length=32, tokens=512)
    original = evaluate_source(tiny, data=str(text), **tokens)  # type: ignore[arg-type]
    found = evaluate_source(out, reference=tiny, data=str(text), **tokens)  # type: ignore[arg-type]
    assert found["reference_perplexity"] == pytest.approx(original["perplexity"])
    assert found["kl"] > 1e-3
    assert report.metrics["kl"] > 1e-3
    rounded = [site for site in report.sites if site["role"] == "body"]  # the tied table has a rule of its own
    assert len(rounded) == 3 * 7
    assert {site["input_bits"] for site in rounded} == {4}
    assert all(site["kind"].endswith(", inputs 4 bits") for site in rounded)
    kinds = {row["name"]: row["kind"] for row in inspect_directory(out)["weights"]}
    assert all(kinds[site["parameter"]].endswith(", inputs 4 bits") for site in rounded)
    assert ", inputs 4 bits" in (out / "report.html").read_text()


def test_a_calibrated_run_leaves_the_original_as_it_was(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The walk lets the original's skeleton round as its blocks are compressed; what is compared with afterwards does not."""
    plan = [("*.0.*", Rounded(3, 4.0)), ("*.1.*", Spy()), ("*", lc.Keep())]
    report = compress_directory(
        tiny, plan, tmp_path / "out", Options(data=str(text), test=str(text), samples=8, length=32, test_tokens=512)
    )
    original = evaluate_source(tiny, data=str(text), length=32, tokens=512)
    assert report.metrics["reference_perplexity"] == pytest.approx(original["perplexity"])
    assert report.metrics["kl"] > 1e-3


def test_what_cannot_be_saved_as_dense_is_refused(made: tuple[Path, lc.Report], tmp_path: Path) -> None:
    """A dense checkpoint would compute something else: in whatever way the model came to be, nothing is written."""
    decoded, baked = lc.load(made[0], dtype=torch.float32), lc.load(made[0], dense=False, dtype=torch.float32)
    with pytest.raises(SchemeError, match="is a compressed weight"):
        baked.save_pretrained(tmp_path / "dense")
    bake(baked)
    for model in (decoded, baked):
        with pytest.raises(SchemeError, match="rounds its inputs"):
            model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_look_up_in_a_manifest(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Nobody loads a directory whose manifest asks for what cannot be done."""
    out = tmp_path / "out"
    lc.compress(
        tiny, "[('lm_head', RTN(8, 32)), ('*', Keep())]", data=str(text), out=out, samples=8, length=32, evaluate=False
    )
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["specs"][0]["input_bits"] = 8
    write_manifest(out, manifest)
    fresh = transformers.LlamaForCausalLM(tiny_config())
    for load in (lc.load, transformers.AutoModelForCausalLM.from_pretrained, lambda path: lc.load_into(fresh, path)):
        with pytest.raises(CheckpointError, match="embed_tokens.weight is stored with input_bits: a look-up"):
            load(out)


def test_verification_notices_when_it_is_lost(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = laconic.engine.directory.pack_weights

    def forgetful(weights: Any) -> Any:
        tensors, specs = original(weights)
        return tensors, {
            name: {key: value for key, value in spec.items() if key != "input_bits"} for name, spec in specs.items()
        }

    monkeypatch.setattr(laconic.engine.directory, "pack_weights", forgetful)
    with pytest.raises(VerificationError, match="does not decode to what was computed"):
        compress_directory(tiny, Rounded(4), tmp_path / "out", Options(data=str(text), evaluate=False))


# calibration


def squares_of(report: lc.Report, name: str) -> Tensor:
    (note,) = next(site["notes"] for site in report.sites if site["name"] == name)
    return torch.tensor(json.loads(note))


class Watch:
    """Mean squares of a layer's inputs."""

    def __init__(self, layer: nn.Module) -> None:
        self.total, self.count = torch.zeros(()), 0
        layer.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0].detach().flatten(0, -2)
        self.total, self.count = self.total + x.square().sum(0), self.count + len(x)

    @property
    def squares(self) -> Tensor:
        return self.total / self.count


def expected_squares(path: Path, scheme: Any, layer: str, batches: list[dict[str, Any]]) -> Tensor:
    """Mean squares of a layer's input in a model whose other layers are compressed and round."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    lc.compress(model, scheme)
    watch = Watch(model.get_submodule(layer))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return watch.squares


@pytest.mark.parametrize("true_sequential", [False, True])
def test_later_layers_are_calibrated_on_what_the_compressed_model_computes(true_sequential: bool, tiny: Path) -> None:
    """Block 1's inputs come from a block 0 that rounds; with `true_sequential`, down_proj's from a gate and an up projection that do."""
    plan = [("*.0.*", Rounded(3, 4.0)), ("*.1.*.down_proj", Spy()), ("*.1.*", Rounded(3, 4.0)), ("*", lc.Keep())]
    others = Rounded(3, 4.0) if true_sequential else lc.Keep()
    before = [("*.0.*", Rounded(3, 4.0)), ("*.1.*.down_proj", lc.Keep()), ("*.1.*", others), ("*", lc.Keep())]
    layer = "model.layers.1.mlp.down_proj"
    batches = [
        {"input_ids": torch.randint(1, 320, (4, 32), generator=torch.Generator().manual_seed(i)), "use_cache": False}
        for i in range(2)
    ]
    expected = expected_squares(tiny, before, layer, batches)
    unrounded = [(name, Rounded(None, 4.0) if isinstance(method, Rounded) else method) for name, method in before]
    assert not torch.allclose(expected, expected_squares(tiny, unrounded, layer, batches), rtol=1e-2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    _, report = lc.compress(model, plan, batches, true_sequential=true_sequential)
    torch.testing.assert_close(squares_of(report, layer), expected, rtol=1e-4, atol=1e-6)


def test_a_run_from_disk_calibrates_as_one_in_memory_and_resumes(tokenizer: Any, text: Path, tmp_path: Path) -> None:
    """The head of a model without a chain sees blocks that round, also those that an interrupted run finished before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1, tie_word_embeddings=False)).save_pretrained(
            tmp_path / "model"
        )
    tokenizer.save_pretrained(tmp_path / "model")
    body = ("*.layers.*", Rounded(3, 4.0))
    options = Options(data=str(text), samples=8, length=32, evaluate=False)
    found = {}
    for name, plan in {"rounded": [body], "not": [("*.layers.*", Rounded(None, 4.0))]}.items():
        report = compress_directory(
            tmp_path / "model", [*plan, ("lm_head", Spy()), ("*", lc.Keep())], tmp_path / name, options
        )
        found[name] = squares_of(report, "lm_head")
    assert not torch.allclose(found["rounded"], found["not"], rtol=1e-3)
    scheme = [body, ("lm_head", Spy()), ("*", lc.Keep())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spy, "__call__", Spy.give_up)
        with pytest.raises(GaveUpError):
            compress_directory(tmp_path / "model", scheme, tmp_path / "again", options)
    assert (tmp_path / "again" / ".laconic").is_dir()
    report = compress_directory(
        tmp_path / "model", scheme, tmp_path / "again", Options(**(vars(options) | {"resume": True}))
    )
    assert torch.equal(squares_of(report, "lm_head"), found["rounded"])
    shutil.rmtree(tmp_path / "again" / ".laconic", ignore_errors=True)
    for file in ("model.safetensors", MANIFEST):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "rounded" / file).read_bytes()


def test_a_rounding_is_made_of_a_weight() -> None:
    assert Demands.of(stored(random(3, 8), bits=None)) is None
    made = Demands.of(stored(random(3, 8), torch.linspace(1, 2, 8)))
    assert made is not None
    assert made.inputs == Inputs(4)
    assert torch.equal(made.column_scale, torch.linspace(1, 2, 8))  # type: ignore[arg-type]
    assert not made.column_scale.requires_grad  # type: ignore[union-attr]


def test_what_cannot_round_its_inputs_is_refused_before_work_with_the_way_out() -> None:
    """A vision model begins with a convolution: the message is a plan, and both ways out that it names work."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 64))
    batches = [random(2, 3, 8, 8)]
    with pytest.raises(
        SchemeError,
        match=r"0: the inputs of Conv2d cannot be rounded.*--keep '0', or in a plan: \[\('0', Keep\(\)\), \('\*', Smooth",
    ):
        lc.compress(net, [("*", lc.SmoothQuant())], batches)
    assert installed(net) == {}
    assert set(installed(lc.compress(copy.deepcopy(net), [("*", lc.SmoothQuant())], batches, keep="0")[0])) == {
        "2.weight",
        "3.weight",
    }
    assert "0.weight" in installed(
        lc.compress(net, [("0", lc.SmoothQuant(activations=None)), ("*", lc.SmoothQuant())], batches)[0]
    )


def test_a_weight_replaces_one_that_is_installed() -> None:
    first, second = stored(random(4, 8)), stored(random(4, 8, seed=5))
    second.inputs = None
    net = linear(first)
    install(net, "weight", second, View((4, 8)))
    assert list(installed(net).values()) == [second]
    assert demands_of(net) is None
    assert torch.equal(net.weight, second.forward())
    bake(net)
    assert torch.equal(net.weight, second.forward())
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    with pytest.raises(SchemeError, match="has a parametrization of its own"):
        install(normed, "weight", second, View((4, 8)))
    assert normed(torch.ones(1, 8)).shape == (1, 4)
