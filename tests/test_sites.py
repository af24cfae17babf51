"""Sites: what is one and what is not, what nobody measured, what is not finite."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import laconic as lc
from laconic.engine.statistics import Statistics
from laconic.errors import CheckpointError, DataError
from laconic.model.sites import Slot, Stats, find_slots, uses_of
from laconic.model.unmeasured import completed
from laconic.weights import View


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(build: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


class Partly(nn.Module):
    """A network one layer of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


CALIBRATED = [
    "GPTQ(rate=3.25)", "GPTQ(bits=4)", "GPTQ(rate=3.0, over='matrix')", "SparseGPT(0.5)", "SpQR()", "GPTVQ()", "AWQ(bits=4)", "Wanda(0.5)",
    "SmoothQuant()", "RTN(4) + EoRA(rank=4)", "Hadamard(GPTQ(bits=4))", "Hadamard(GPTQ(rate=3.0))", "SparseGPT(0.5) >> GPTQ(bits=3)",
    "KMeans(bits=3, weights='fisher')", "KMeans(bits=3, weights='hessian')", "DKM(bits=3, weights='fisher')", "LowRank(8, weighted=True)",
    "Magnitude(0.5, criterion='taylor', scope='model')", "BlockPrune(0.5, 4, criterion='hessian')",
]  # fmt: skip
FISHER = "KMeans(3, weights='fisher')"
SUMMARY = "of the parameters were rounded without statistics, since the calibration data did not reach them:"


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_a_layer_the_data_never_reach_is_rounded_and_named(scheme: str) -> None:
    net = seeded(Partly)
    _, report = lc.compress(net, scheme, [torch.randn(64, 64, generator=generator())])
    records = {record["name"]: record for record in report.sites}
    assert records["unused"]["unmeasured"] == 1.0
    assert [n for n in records["unused"]["notes"] if n.startswith("unused: no ")] == records["unused"]["notes"][:1]
    assert "unmeasured" not in records["first"]
    assert 0 <= records["unused"]["error"] < 1
    assert report.values["notes"] == [
        "32.8% of the parameters were rounded without statistics, since the calibration data did not reach them: unused"
    ]
    bits = {name: record["bits"] for name, record in records.items()}
    assert bits["unused"] <= 1.3 * max(bits["first"], bits["last"])


def test_a_rate_over_the_model_is_the_rate_of_what_nobody_measured() -> None:
    net = seeded(Partly)
    _, report = lc.compress(net, "GPTQ(rate=3.25)", [torch.randn(64, 64, generator=generator())])
    rates = {record["name"]: record["bits_per_weight"] for record in report.sites}
    assert 3.2 < rates["unused"] <= 3.25
    assert (rates["first"] + rates["last"]) / 2 <= 3.25


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize(
    "scheme",
    [
        "GPTQ(bits=4)",
        "SmoothQuant()",
        "Wanda(0.5)",
        "GPTVQ()",
        "GPTQ(rate=3)",
        "RTN(4)+EoRA(rank=4)",
        "KMeans(3, weights='fisher')",
    ],
)
def test_inputs_that_are_not_finite_are_refused_before_anything_changes(scheme: str, value: float) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    data = [torch.randn(8, 64, generator=generator(i)) for i in range(3)]
    data[1][0, 0] = value
    if value < float("inf") and scheme in ("SmoothQuant()", FISHER):
        return  # a peak of 3e38 is one, and no gradient comes through a saturated softmax
    with pytest.raises(DataError, match="not finite|NaN or infinity|the loss of the model's output is") as caught:
        lc.compress(net, scheme, data)
    assert value == 3e38 or "batch 1 of the calibration data" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_value_that_its_type_cannot_hold_is_refused() -> None:
    net = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        net[0].weight[0, 0] = 1e5
    with pytest.raises(lc.LaconicError, match="0: "):
        lc.compress(net, "Cast('float16')")


def test_a_score_that_is_not_a_number_is_said() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(16, 16)))
    data, score = [torch.ones(2, 16)], lambda output, batch: output.sum() * torch.nan
    _, report = lc.compress(net, "RTN(4, 'channel')", validation=data, score=score)
    assert report.values["notes"] == ["the score before compression is nan", "the score after compression is nan"]


class Used(nn.Module):
    """A raw parameter of three matrices, multiplied in one of several ways, beside parameters that multiply nothing."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.experts = nn.Parameter(torch.randn(3, *((8, 12) if way in ("bmm", "einsum xW", "loop xW") else (12, 8))))
        self.position, self.token = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x [3, 5, 8]."""
        x = x + self.position + self.token
        w = self.experts
        found = {
            "bmm": lambda: torch.bmm(x, w),
            "einsum xW": lambda: torch.einsum("etd,edh->eth", x, w),
            "loop xW": lambda: torch.stack([x[e] @ w[e] for e in range(3)]),
            "einsum Wx": lambda: torch.einsum("...td,...hd->...th", x, w),
            "linear": lambda: torch.stack([F.linear(x[e], w[e]) for e in range(3)]),
            "left": lambda: (w @ x.mT).mT,
            "matmul": lambda: x.matmul(w.transpose(1, 2)),
        }[self.way]()
        return self.head(found.float())


WAYS = ["bmm", "einsum xW", "loop xW", "einsum Wx", "linear", "left", "matmul"]


@pytest.mark.parametrize("way", WAYS)
def test_a_raw_parameter_is_the_matrix_that_products_show(way: str, tmp_path: Path) -> None:
    """Every way to multiply gives the same site, the same sums per expert, and comes back exactly."""
    net = seeded(lambda: Used(way))
    fresh, x = copy.deepcopy(net), torch.randn(3, 5, 8, generator=generator())
    dense = net.experts.detach().mT if way in ("bmm", "einsum xW", "loop xW") else net.experts.detach()
    slots = find_slots(net, uses_of(net, lambda: net(x)).found())
    assert [(slot.name, slot.shape, slot.groups) for slot in slots] == [("experts", (36, 8), 3), ("head", (4, 12), 1)]
    assert torch.equal(slots[0].view.matrix(net.experts.detach()), dense.reshape(36, 8))
    statistics = Statistics({slots[0]: net.experts}, {slots[0]: Stats.HESSIAN | Stats.FISHER | Stats.OUTPUT_FISHER})
    net.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    with statistics.watch():
        net(leaf).square().sum().backward()
    site = statistics.describe(slots[0], dense.reshape(36, 8), 0)
    inputs = (x + net.position + net.token).detach()
    assert site.hessian is not None
    assert torch.allclose(site.hessian, inputs.mT @ inputs / 5, rtol=1e-4, atol=1e-5)
    net.experts.requires_grad_(True)
    net(x).square().sum().backward()
    gradient = slots[0].view.matrix(net.experts.grad)
    assert site.fisher is not None
    assert torch.allclose(site.fisher, gradient.square(), rtol=1e-3, atol=1e-4)
    _, report = lc.compress(net, "[('head', Keep()), ('*', GPTQ(bits=4, group='channel'))]", [x])
    assert [record["name"] for record in report.sites] == ["experts"]
    assert {entry["name"] for entry in report["coverage"]["untreated"]} == {"position", "token"}
    lc.save(net, tmp_path / "model")
    assert torch.equal(lc.load_into(fresh, tmp_path / "model").experts, net.experts)
    assert torch.allclose(fresh(x), net(x), rtol=1e-4, atol=1e-5)


def test_torch_s_grouped_kernel_is_seen() -> None:
    """Rows up to an offset belong to an expert: the sums are those of a loop."""
    x, w = (
        torch.randn(15, 8, generator=generator()).bfloat16(),
        nn.Parameter(torch.randn(3, 8, 16, generator=generator(1)).bfloat16()),
    )
    slot = Slot("w", (("", "w"),), View((3, 8, 16), lead=2, transposed=True), 3)
    statistics = Statistics({slot: w}, {slot: Stats.HESSIAN})
    with torch.no_grad(), statistics.watch():
        F.grouped_mm(x, w, offs=torch.tensor([2, 2, 15], dtype=torch.int32))
    site = completed(statistics.describe(slot, slot.view.matrix(w.detach()), 0), Stats.HESSIAN)
    assert site.tokens is not None
    assert site.tokens.tolist() == [2, 0, 13]
    assert site.notes == [
        "w: experts 1 of 3 (33% of the site) saw no token; rounded to nearest or pruned by size, all its inputs counting alike"
    ]


PRODUCTS: dict[str, Any] = {
    "W @ x": lambda w, x: w @ x.T, "matmul(W, x)": lambda w, x: torch.matmul(w, x.T), "W.mm": lambda w, x: w.mm(x.T),
    "W.mv": lambda w, x: torch.stack([w.mv(row) for row in x]), "einsum": lambda w, x: torch.einsum("oi,ti->to", w, x),
    "x @ W.T": lambda w, x: x @ w.T, "addmm": lambda w, x: torch.addmm(torch.zeros(6), x, w.t()), "inner": lambda w, x: torch.inner(x, w),
    "halves": lambda w, x: (F.linear(x, w[:3]), F.linear(x, w[3:])), "columns": lambda w, x: (x[:, :2] @ w[:, :2].T, x[:, 2:] @ w[:, 2:].T),
    "heads": lambda w, x: torch.einsum("td,hkd->thk", x, w.view(2, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("way", PRODUCTS)
def test_inputs_are_seen_whichever_way_a_weight_is_multiplied(way: str) -> None:
    """A square weight, so that only the direction of the product tells inputs from outputs."""
    layer, x = nn.Linear(6, 6, bias=False), torch.randn(20, 6, generator=generator())
    (slot,) = find_slots(layer)
    statistics = Statistics({slot: layer.weight}, {slot: Stats.HESSIAN})
    with torch.no_grad(), statistics.watch():
        PRODUCTS[way](layer.weight, x)
    H = statistics.describe(slot, layer.weight.detach(), 0).hessian
    assert H is not None
    expected = x.T @ x / 20
    if way == "columns":  # each of the two products sees half of the columns
        expected = torch.block_diag(expected[:2, :2], expected[2:, 2:]) / 2
    assert torch.allclose(H[0], expected, rtol=1e-4, atol=1e-6)


class Flattened(nn.Module):
    """Two layers whose weights are views of one buffer, as optimizers and sharding make them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        flat = torch.randn(2, 8, 8, generator=generator())
        self.first.weight, self.second.weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_parameters_in_one_storage_are_told_apart() -> None:
    net, x = Flattened(), torch.randn(20, 8, generator=generator(1))
    first, second = find_slots(net)
    statistics = Statistics(
        {first: net.first.weight, second: net.second.weight}, dict.fromkeys((first, second), Stats.HESSIAN)
    )
    with torch.no_grad(), statistics.watch():
        net(x)
        hidden = torch.relu(net.first(x))
    for slot, fed, times in ((first, x, 2), (second, hidden, 1)):
        site = statistics.describe(slot, torch.empty(8, 8), 0)
        assert site.tokens is not None
        assert site.hessian is not None
        assert site.tokens.tolist() == [20 * times]
        assert torch.allclose(site.hessian[0], fed.T @ fed / 20, rtol=1e-4, atol=1e-6)


def test_a_tensor_that_is_written_to_between_two_layers_is_two_inputs() -> None:
    net, x = Flattened(), torch.randn(20, 8, generator=generator(1))
    first, second = find_slots(net)
    statistics = Statistics(
        {first: net.first.weight, second: net.second.weight}, dict.fromkeys((first, second), Stats.HESSIAN)
    )
    before = x.clone()
    with torch.no_grad(), statistics.watch():
        net.first(x)
        net.second(x.relu_())
    for slot, fed in ((first, before), (second, before.relu())):
        hessian = statistics.describe(slot, torch.empty(8, 8), 0).hessian
        assert hessian is not None
        assert torch.allclose(hessian[0], fed.T @ fed / 20, rtol=1e-4, atol=1e-6)
    assert statistics.input_of(first) != statistics.input_of(second)


class Autoencoder(nn.Module):
    """One weight, W x on the way in and x W on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.only_back = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x)) @ self.encoder.weight @ self.only_back.weight


def test_a_weight_that_is_used_both_ways_says_which_it_looks_at() -> None:
    net, x = seeded(Autoencoder), torch.randn(50, 16, generator=generator())
    records = {record["name"]: record for record in lc.compress(net, "GPTQ(bits=4, group='channel')", [x])[1].sites}
    assert records["encoder"]["notes"] == [
        "encoder: its transpose is multiplied with something too; only the inputs of the matrix itself are looked at"
    ]
    assert records["only_back"]["unmeasured"] == 1.0
    assert records["only_back"]["notes"][0].startswith("only_back: only its transpose is multiplied with anything")


def test_what_no_product_shows_is_listed_and_not_compressed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear, self.up, self.body = nn.Bilinear(4, 4, 6), nn.ConvTranspose1d(2, 3, 3), nn.Linear(6, 6)
            self.position, self.latents = nn.Parameter(torch.randn(1, 7, 6)), nn.Parameter(torch.randn(7, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.bilinear(x, x) + self.position + self.latents)

    net = seeded(Net)
    _, report = lc.compress(net, "RTN(4, 'channel')", [torch.randn(2, 7, 4, generator=generator())])
    assert [record["name"] for record in report.sites] == ["body"]
    assert [(entry["name"], entry["entries"], entry["reason"]) for entry in report["coverage"]["untreated"]] == [
        ("bilinear.weight", 96, "of a layer that is not supported, Bilinear"),
        ("position", 42, "a parameter of Net that no product was seen with"),
        ("latents", 42, "a parameter of Net that no product was seen with"),
        ("up.weight", 18, "of a layer that is not supported, ConvTranspose1d"),
    ]


TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 2}
EIGHT: dict[str, Any] = {"head_dim": 8}
FOUR: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 1}


def moe(kind: str) -> Any:
    config = {
        "llama4": lambda: transformers.Llama4TextConfig(**TINY, **HEADS, **EIGHT, intermediate_size_mlp=32, **FOUR),
        "gpt_oss": lambda: transformers.GptOssConfig(**TINY, **HEADS, **EIGHT, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TINY, **HEADS, **EIGHT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
        "dbrx": lambda: transformers.DbrxConfig(
            d_model=32, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "jetmoe": lambda: transformers.JetMoeConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48, num_local_experts=4
        ),
    }[kind]()  # fmt: skip
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()


EXPERTS = {
    "llama4": ("feed_forward.experts.gate_up_proj", (4 * 96, 32), "feed_forward.experts.down_proj", (4 * 32, 48)),
    "gpt_oss": ("mlp.experts.gate_up_proj", (4 * 96, 32), "mlp.experts.down_proj", (4 * 32, 48)),
    "qwen3_moe": ("mlp.experts.gate_up_proj", (4 * 48, 32), "mlp.experts.down_proj", (4 * 32, 24)),
    "dbrx": ("ffn.experts.mlp.w1", (4 * 48, 32), "ffn.experts.mlp.w2", (4 * 32, 48)),
    "jetmoe": ("mlp.input_linear.weight", (4 * 96, 32), "mlp.output_linear.weight", (4 * 32, 48)),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_of_transformers_are_rows_of_outputs_by_inputs(kind: str) -> None:
    """In memory and on the meta device, with and without data, in every implementation of the experts."""
    model = moe(kind)
    up, up_shape, down, down_shape = EXPERTS[kind]
    batch = {"input_ids": torch.randint(3, 90, (2, 24), generator=generator())}
    with torch.no_grad():
        before = model(**batch).logits
    shapes = {slot.parameter: slot.shape for slot in find_slots(model)}
    assert [shapes[name] for name in shapes if name.endswith(up)] == [up_shape] * 2
    assert [shapes[name] for name in shapes if name.endswith(down)] == [down_shape] * 2
    roles = {slot.role for slot in find_slots(model) if slot.rows == 4}
    assert roles == {"router"}
    settings = model.config.use_cache, getattr(model.config, "_experts_implementation", None)
    _, report = lc.compress(model, "GPTQ(bits=8, group='channel')", [batch])
    assert (model.config.use_cache, getattr(model.config, "_experts_implementation", None)) == settings
    experts = [record for record in report.sites if record["parameter"].endswith((up, down))]
    assert len(experts) == 4
    assert all(record.get("unmeasured", 0) < 1 for record in report.sites)
    with torch.no_grad():
        after = model(**batch).logits
    assert float((after - before).norm() / before.norm()) < 0.02


@pytest.mark.parametrize("kind", ["llama4", "dbrx"])
def test_experts_told_by_use_are_read_back_three_ways(kind: str, tmp_path: Path) -> None:
    model = moe(kind)
    model.save_pretrained(tmp_path / "original")
    lc.compress(str(tmp_path / "original"), "RTN(bits=8, group='channel')", out=str(tmp_path / "out"), evaluate=False)
    up, _, down, _ = EXPERTS[kind]
    views = json.loads((tmp_path / "out" / "laconic.json").read_text())["views"]
    assert sum(name.endswith((up, down)) for name in views) == 4
    ids = torch.randint(3, 90, (1, 12), generator=generator())
    with torch.no_grad():
        dense = lc.load(tmp_path / "out", dtype=torch.float32)(ids).logits
        held = lc.load(tmp_path / "out", dense=False, dtype=torch.float32)(ids).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        original = model(ids).logits
    assert torch.allclose(dense, held, atol=1e-5)
    assert torch.allclose(dense, theirs, atol=1e-5)
    assert float((dense - original).norm() / original.norm()) < 0.05


@pytest.mark.parametrize(
    "damage", [{"lead": 3, "transposed": False}, {"lead": 1}, [], {"lead": 1, "transposed": True, "dims": [3, 5]}]
)
def test_a_damaged_view_is_refused(damage: Any, tmp_path: Path) -> None:
    net, x = seeded(lambda: Used("bmm")), torch.randn(3, 5, 8, generator=generator())
    fresh = copy.deepcopy(net)
    lc.compress(net, "RTN(4, 'channel')", [x])
    lc.save(net, tmp_path / "model")
    file = tmp_path / "model" / "laconic.json"
    manifest = json.loads(file.read_text())
    assert manifest["views"] == {"experts": {"lead": 2, "transposed": True}}
    manifest["views"]["experts"] = damage
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="changed by hand"):
        lc.load_into(fresh, tmp_path / "model")
    with pytest.raises(CheckpointError, match="experts: the manifest's view .* does not fit"):
        lc.load_into(fresh, tmp_path / "model", verify=False)


def test_heads_and_routers_stay_by_default_and_are_known_by_structure() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(**size, image_size=16, patch_size=8, num_labels=5)
    )
    roles = {slot.name: slot.role for slot in find_slots(vit)}
    assert roles["classifier"] == "head"
    assert not any("position" in name or "token" in name for name in roles)
    plain = {slot.name: slot.role for slot in find_slots(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))}
    assert plain == {"0": "body", "1": "body"}


class Volumes(nn.Module):
    """Layers of which less is known: volumes and bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.volume, self.last = nn.EmbeddingBag(30, 8), nn.Conv3d(2, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x: dict[str, Tensor] | Tensor) -> Tensor:
        ids = torch.arange(12).view(3, 4)
        assert isinstance(x, Tensor)
        return self.last(self.words(ids) + self.volume(x).mean((2, 3, 4)))


@pytest.mark.parametrize(
    "scheme", ["RTN(4, 'channel')", "GPTQ(bits=4, group='channel')", "Magnitude(0.5)", "Wanda(0.5)"]
)
def test_volumes_and_bags_are_sites_and_come_back(scheme: str, tmp_path: Path) -> None:
    net = seeded(Volumes).eval()
    fresh, x = copy.deepcopy(net), torch.randn(3, 2, 5, 6, 4, generator=generator())
    with torch.no_grad():
        before = net(x)
    assert {slot.name: slot.role for slot in find_slots(net)} == {
        "words": "embedding",
        "volume": "body",
        "last": "body",
    }
    _, report = lc.compress(net, f"[('*', {scheme})]", [x])
    assert all("unmeasured" not in record for record in report.sites)
    lc.save(net, tmp_path / "model")
    with torch.no_grad():
        after = net(x)
        assert torch.allclose(lc.load_into(fresh, tmp_path / "model")(x), after, atol=1e-5)
    assert torch.equal(fresh.volume.weight, net.volume.weight)
    assert torch.equal(fresh.words.weight, net.words.weight)
    assert 0 < float((after - before).norm() / before.norm()) < 0.9
