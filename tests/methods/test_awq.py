"""AWQ against its equations written out over the inputs themselves, scales that sites share, and the paper's claims on a trained model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import laconic as lc
from laconic.data.text import evaluation_windows
from laconic.disk.load import load_tokenizer
from laconic.disk.store import Compressed
from laconic.errors import SchemeError
from laconic.methods.awq import AWQ
from laconic.methods.base import Method
from laconic.methods.rtn import RTN
from laconic.model.sites import Site, Slot
from laconic.recover.projection import project_onto
from laconic.solvers.output_error import output_error
from laconic.weights import Scaled, Sum, Weight
from laconic.weights.install import installed
from tests.conftest import make_site, output_loss


def inputs(tokens: int = 256, columns: int = 32, seed: int = 0) -> Tensor:
    """X [tokens, in] with correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    return (torch.randn(tokens, columns, generator=generator) @ mix) * torch.exp(
        1.5 * torch.randn(columns, generator=generator)
    )


def site_of(X: Tensor, rows: int, seed: int, name: str = "layer") -> Site:
    W = torch.randn(rows, X.shape[1], generator=torch.Generator().manual_seed(seed))
    return Site(
        name,
        W,
        hessian=(X.T @ X / len(X)).unsqueeze(0),
        magnitude=X.abs().mean(0, keepdim=True),
        tokens=torch.tensor([len(X)]),
    )


def scale_of(weight: Weight) -> Tensor:
    """The s of W_hat = Q(W diag(s)) diag(s)^-1, as it is stored."""
    assert isinstance(weight, Scaled)
    assert weight.column_scale is not None
    return 1 / weight.column_scale().flatten()


def powers(X: Tensor) -> list[Tensor]:
    """The paper's candidates for s: 20 powers of the mean |x|, centred geometrically."""
    mean = X.abs().mean(0)
    raw = [mean ** (k / 20) for k in range(20)]
    return [s / (s.max() * s.min()).sqrt() for s in raw]


def test_the_scale_is_the_power_with_the_least_error_of_the_outputs_themselves() -> None:
    """Two sites that read one X; the errors are those of their outputs, summed over both, not of a Hessian."""
    X = inputs()
    sites = [site_of(X, 24, 1), site_of(X, 8, 2)]
    losses = []
    for s in powers(X):
        rounded = [RTN(bits=3, group=8)(Site("x", site.W * s))() / s for site in sites]
        losses.append(sum(float(((site.W - Q) @ X.T).square().sum()) for site, Q in zip(sites, rounded, strict=True)))
    best = powers(X)[min(range(20), key=losses.__getitem__)]
    assert min(losses) < 0.7 * losses[0], "these inputs make scales worth their while"
    for weight in AWQ(bits=3, group=8).together(sites):
        assert torch.allclose(scale_of(weight), best, rtol=2**-8), "up to the bfloat16 that is stored"


def test_one_exponent_and_full_ranges_are_rounding_to_nearest() -> None:
    site = make_site()
    assert torch.equal(AWQ(bits=3, group=16, grid=1, clip=False)(site)(), RTN(bits=3, group=16)(site)())


def test_inputs_of_equal_size_need_no_scale() -> None:
    site = make_site().having(magnitude=torch.full((1, 64), 0.7))
    weight = AWQ(bits=3, group=16, clip=False)(site)
    assert torch.equal(scale_of(weight), torch.ones(64))
    assert torch.equal(weight(), RTN(bits=3, group=16)(site)())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_of_each_row_is_the_best_of_ten(symmetric: bool) -> None:
    """Of a site that is one group, by the error of every row's own output; entries beyond the range are rounded to its end."""
    X = inputs()
    site, rounding = site_of(X, 12, 3), RTN(bits=2, group="channel", symmetric=symmetric)
    found = AWQ(bits=2, group="channel", symmetric=symmetric, grid=1)(site)()
    errors = []
    for k in range(10):
        limit = site.W.abs().amax(1, keepdim=True) * (1 - k / 20)
        weight = rounding(Site("x", site.W.clamp(-limit, limit)))
        weight.right_inverse(site.W)
        errors.append(((site.W - weight()) @ X.T).square().sum(1))
    least = torch.stack(errors).amin(0)
    assert (least < 0.9 * errors[0]).any(), "shrinking a range helps"
    assert torch.allclose(((site.W - found) @ X.T).square().sum(1), least, rtol=1e-3)


def test_one_range_for_the_whole_matrix() -> None:
    site = make_site(groups=2)
    clipped, full = AWQ(bits=3, group="tensor")(site), AWQ(bits=3, group="tensor", clip=False)(site)
    assert torch.equal(scale_of(clipped), scale_of(full))
    assert output_loss(site, clipped()) < 0.9 * output_loss(site, full())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_rounding_where_inputs_differ_in_size(bits: int) -> None:
    site = site_of(inputs(columns=128), 96, 4)
    plain, scaled, clipped = RTN(bits, 32)(site), AWQ(bits, 32, clip=False)(site), AWQ(bits, 32)(site)
    assert output_error(site, scaled) < 0.6 * output_error(site, plain)
    assert output_error(site, clipped) < 0.95 * output_error(site, scaled)


def test_bits_are_those_of_rounding_and_16_per_column() -> None:
    site = make_site(rows=64, columns=128)
    weight = AWQ(bits=4, group=32)(site)
    assert (
        weight.bits() == RTN(bits=4, group=32)(site).bits() + 16 * 128 == AWQ(bits=4, group=32).expected_bits((64, 128))
    )


def test_many_rows_are_decided_by_some_of_them() -> None:
    """2,200 rows of one kind: every second one is looked at, and the same exponent found as of half of them."""
    X = inputs(columns=16)
    site = site_of(X, 2200, 5)
    half = site.having(W=site.W[::2])
    assert torch.equal(scale_of(AWQ(3, 8, clip=False)(site)), scale_of(AWQ(3, 8, clip=False)(half)))


def test_columns_without_inputs_are_rounded_as_they_are() -> None:
    X = inputs()
    X[:, 5] = 0
    X[:, 6] *= 1e-12
    site = site_of(X, 24, 6)
    s = scale_of(AWQ(bits=4, group=8)(site))
    assert s[5] == pytest.approx(float(s[torch.arange(32) != 5].log().mean().exp()), rel=0.5)
    assert s.max() / s.min() < 1.1e4, "a column that is hardly used does not blow up the others"
    assert not site.notes


def test_a_site_that_no_input_reached_is_rounded_and_says_so() -> None:
    site = make_site().having(
        hessian=torch.zeros(1, 64, 64), magnitude=torch.zeros(1, 64), tokens=torch.zeros(1, dtype=torch.int64)
    )
    assert torch.equal(AWQ(bits=3, group=16)(site)(), RTN(bits=3, group=16)(site)())
    assert site.notes == ["block.0.layer: no input was seen; rounded to nearest"]


def test_statistics_that_are_not_finite_are_left_out_and_named() -> None:
    site = make_site()
    assert site.hessian is not None
    broken = site.hessian.clone()
    broken[0, 3, 3] = torch.inf
    site = site.having(hessian=broken)
    assert torch.isfinite(AWQ(bits=3, group=16)(site)()).all()
    assert site.notes == ["block.0.layer: input statistics are not finite; rounded to nearest"]


def test_bad_arguments_and_compositions_without_a_meaning_are_refused() -> None:
    with pytest.raises(SchemeError, match="grid is the number of exponents"):
        AWQ(grid=0)
    with pytest.raises(SchemeError, match="group 48 does not divide 64 columns"):
        AWQ(group=48)(make_site())
    with pytest.raises(SchemeError, match="block.0.layer: AWQ needs the mean magnitude"):
        AWQ(group=16)(make_site().having(magnitude=None))
    with pytest.raises(SchemeError, match="block.0.layer: AWQ needs the Hessian"):
        AWQ(group=16)(make_site().having(hessian=None))
    with pytest.raises(SchemeError, match="scales whole columns"):
        lc.parse("Magnitude(0.5) >> AWQ(bits=4)")
    with pytest.raises(SchemeError, match="not known in a rotated basis"):
        lc.parse("Hadamard(AWQ(bits=4))")


def test_compensation_of_what_it_leaves_over() -> None:
    """AWQ + EoRA, for sites of one input: scales are shared, each residual is compensated for itself."""
    X = inputs(columns=64)
    sites = [site_of(X, 48, 7, "a"), site_of(X, 24, 8, "b")]
    method = lc.parse("AWQ(bits=3, group=16) + EoRA(rank=8)")
    assert isinstance(method, Method)
    assert method.joint
    weights, alone = method.together(sites), AWQ(bits=3, group=16).together(sites)
    for site, both, one in zip(sites, weights, alone, strict=True):
        assert isinstance(both, Sum)
        assert torch.equal(both.terms[0](), one())
        assert output_error(site, both) < 0.8 * output_error(site, one)
    assert torch.equal(scale_of(weights[0].terms[0]), scale_of(weights[1].terms[0]))  # type: ignore[attr-defined]


class Attention(nn.Module):
    """Three layers that read one input, one of another shape, and one that reads what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cat([self.q(x)[:, :16] * self.k(x), self.v(x)[:, :16]], 1).tanh())


@pytest.fixture
def attention() -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention()


def test_layers_that_read_one_input_are_scaled_alike(attention: Attention) -> None:
    X = inputs()
    net, report = lc.compress(nn.Sequential(copy.deepcopy(attention)), "AWQ(bits=3, group=8)", data=[X])
    s = {name.split(".")[1]: scale_of(weight) for name, weight in installed(net).items()}
    assert torch.equal(s["q"], s["k"])
    assert torch.equal(s["q"], s["v"])
    assert not torch.equal(s["q"], s["o"])
    expected = AWQ(bits=3, group=8).together(
        [site_of(X, 1, 0).having(W=getattr(attention, name).weight.detach()) for name in "qkv"]
    )
    assert torch.allclose(s["q"], scale_of(expected[0]), rtol=2**-7)
    assert [site["name"] for site in report.sites] == ["0.q", "0.k", "0.v", "0.o"]
    assert all(0 < site["error"] < 0.2 for site in report.sites), "every site has a record of its own"


def test_only_sites_under_one_method_are_scaled_alike(attention: Attention) -> None:
    X, alone = inputs(), {}
    for name, method in (("k", AWQ(bits=4, group=8)), ("v", AWQ(bits=3, group=8))):
        alone[name] = scale_of(method(site_of(X, 1, 0).having(W=getattr(attention, name).weight.detach())))
    plan = "[('*.q', GPTQ(bits=3, group=8)), ('*.k', AWQ(bits=4, group=8)), ('*', AWQ(bits=3, group=8))]"
    net, _ = lc.compress(nn.Sequential(copy.deepcopy(attention)), plan, data=[X])
    weights = installed(net)
    assert not isinstance(weights["0.q.weight"], Scaled)
    for name, s in alone.items():
        assert torch.allclose(scale_of(weights[f"0.{name}.weight"]), s, rtol=2**-7)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_in_a_directory_queries_keys_and_values_share_a_scale(
    true_sequential: bool, tiny: Path, text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"samples": 8, "length": 32, "evaluate": False, "true_sequential": true_sequential}
    report = lc.compress(tiny, "AWQ(bits=4, group=16) + EoRA(rank=2)", str(text), out=tmp_path / "out", **options)
    stored = Compressed(tmp_path / "out")
    s = {
        name.removesuffix("_proj.weight"): stored.weight(name).terms[0].column_scale()
        for name in stored.weights
        if ".layers." in name
    }  # type: ignore[attr-defined]
    assert len(report.sites) == len(s) + 1 == 3 * 7 + 1, "and the embedding, rounded"
    for block in range(3):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert torch.equal(s[f"{attention}.q"], s[f"{attention}.k"])
        assert torch.equal(s[f"{attention}.q"], s[f"{attention}.v"])
        assert torch.equal(s[f"{mlp}.gate"], s[f"{mlp}.up"])
        assert not torch.equal(s[f"{attention}.q"], s[f"{mlp}.gate"])


class Refusing(AWQ):
    """Finds nothing for anybody."""

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        raise SchemeError("no")


def test_an_error_names_its_sites(attention: Attention) -> None:
    with pytest.raises(SchemeError, match="q: group 24 does not divide 32 columns"):
        lc.compress(attention, "AWQ(group=24)", data=[inputs()], group="strict")
    with pytest.raises(SchemeError, match="0.q, 0.k, 0.v: no"):
        lc.compress(nn.Sequential(attention), Refusing(group=8), data=[inputs()])


def test_the_compression_step_of_a_recovery_scales_alike_too(attention: Attention) -> None:
    projection = project_onto(attention, AWQ(bits=3, group=8), data=[inputs()])
    values = {slot: getattr(attention, slot.name).weight.detach() for slot in projection.slots}
    found = {slot.name: scale_of(weight) for slot, weight in projection.compress(values).items()}
    assert list(found) == ["q", "k", "v", "o"]
    assert torch.equal(found["q"], found["v"])
    assert not torch.equal(found["q"], found["o"])


@pytest.fixture(scope="module")
def two_blocks(shared: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The first two blocks of the language model with its head, windows it is calibrated with, and windows of a novel it never saw."""
    folder = shared / "models" / "books-llama-7m"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers = model.model.layers[:2]
    tokenizer, texts = load_tokenizer(folder), (("books-train.txt", 32), ("dracula.txt", 16))
    windows = [
        evaluation_windows((shared / "data" / name).read_text()[:200_000], tokenizer, 128, 128 * n, name).tokens for name, n in texts
    ]  # fmt: skip
    return model, windows[0], windows[1]


def distance(model: nn.Module, weights: dict[Slot, Weight], tokens: Tensor) -> float:
    """KL(original || compressed) in nats per token."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for slot, weight in weights.items():
            other.get_parameter(slot.parameter).copy_(weight())
        first, second = (net(input_ids=tokens, use_cache=False).logits.log_softmax(-1) for net in (model, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def injured(model: nn.Module) -> nn.Module:
    """The same function, but every eighth input of what two norms feed is 16 times as large, and its column of weights a sixteenth."""
    other: Any = copy.deepcopy(model)
    for layer in other.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, fed in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[::8] *= 16
            for linear in fed:
                linear.weight[:, ::8] /= 16
    return other


@pytest.mark.shared
def test_on_a_language_model_it_is_closer_than_rounding(two_blocks: tuple[nn.Module, Tensor, Tensor]) -> None:
    """3 bits, groups of 64: less output error at every input and less KL on unseen text (measured: 0.036 and 0.046 nats per token)."""
    model, calibration, unseen = two_blocks
    projection = project_onto(model, AWQ(bits=3), data=[calibration])
    values = {slot: model.get_parameter(slot.parameter) for slot in projection.slots}
    awq = projection.compress(values)
    rtn = {slot: RTN(bits=3)(site) for slot, site in projection.sites.items()}
    errors = [[output_error(site, weights[slot]) for slot, site in projection.sites.items()] for weights in (awq, rtn)]
    assert all(ours < 0.9 * plain for ours, plain in zip(*errors, strict=True))
    assert distance(model, awq, unseen) < 0.9 * distance(model, rtn, unseen)


@pytest.mark.shared
def test_outlier_channels_hurt_rounding_and_not_awq(two_blocks: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The paper's reason for scales: some inputs are much larger than the others (measured: 0.048 and 0.189 nats per token)."""
    model, calibration, unseen = two_blocks
    other = injured(model)
    projection = project_onto(other, AWQ(bits=3, clip=False), data=[calibration])
    values = {slot: other.get_parameter(slot.parameter) for slot in projection.slots}
    awq, rtn = projection.compress(values), {slot: RTN(bits=3)(site) for slot, site in projection.sites.items()}
    assert distance(other, awq, unseen) < 0.4 * distance(other, rtn, unseen)
