"""Modules in memory: compressed in place, measured, saved and loaded again bit for bit; conv nets and language models alike."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import laconic as lc
from laconic.disk.store import MANIFEST, Compressed
from laconic.errors import CheckpointError, DataError, SchemeError
from laconic.weights.install import bake, installed


class Net(nn.Module):
    """A bit of everything: a plain, a grouped and a depthwise convolution, batch norms, a Conv1d, linear layers of which two are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.line = nn.Conv1d(32, 16, 3)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.depthwise(self.grouped(self.stem(x)))).relu()
        x = self.line(x.flatten(2)).relu().mean(2)
        return self.head(self.two(self.one(x).relu()).relu())


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for _ in range(4):
            net(images(64))  # running statistics of a net in use
    return net.eval()


def images(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


@pytest.fixture
def lm(tiny: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def token_batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 320, (4, 32), generator=generator), "use_cache": False} for _ in range(4)]


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images(8, 5)) if isinstance(model, Net) else model(**token_batches()[0]).logits


def mean_squares(output: Any, batch: Any) -> torch.Tensor:
    """A score that needs no labels: the mean square of every example's outputs."""
    return getattr(output, "logits", output).square().flatten(1).mean(1)


SCHEMES = {
    "RTN(4, 'channel')": True, "GPTQ(bits=4, group='channel')": True, "Magnitude(0.4) >> KMeans(bits=4)": False,
    "Magnitude(0.4, scope='model') >> KMeans(bits=4, weights='fisher')": True, "SparseGPT(0.4)": True, "Wanda(0.3)": True, "LowRank(0.5)": False,
    "LowRank(0.5, weighted=True) if rows != 32 else RTN(4, 'channel')": True, "GPTQ(rate=4.0)": True, "GPTQ(rate=4.0, over='matrix')": True,
    "Cast('float16')": False, "RTN(3, 'channel') + LowRank(2)": False, "Magnitude(0.4, scope='model') >> RTN(4, 'channel')": False,
    "BlockPrune(0.4, block=3) >> Cast('float16')": False, "BlockPrune(0.4, block=(2, 3), criterion='taylor')": True,
}  # fmt: skip
"""The scheme and whether it is given data."""


@pytest.mark.parametrize("kind", ["net", "lm"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_saved_and_loaded_it_is_the_same_model(
    scheme: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The module runs on its stored weights; the report's numbers are the file's; a fresh module loads to the same outputs, bit for bit."""
    model = request.getfixturevalue(kind)
    before, fresh = outputs(model), copy.deepcopy(model)
    data: Any = ([images(16)] * 2 if kind == "net" else token_batches()) if SCHEMES[scheme] else None
    validation: Any = [images(8, 5)] if kind == "net" else token_batches()[:1]
    same, report = lc.compress(model, scheme, data, validation=validation, score=mean_squares)
    assert same is model
    after = outputs(model)
    assert 0 < float((after - before).square().mean() / before.square().mean()) < (1 if kind == "net" else 2)
    assert report.metrics.keys() == {"score", "reference_score"}
    assert report.metrics["score"] == pytest.approx(float(after.square().mean()), rel=1e-5)
    assert report.metrics["reference_score"] == pytest.approx(float(before.square().mean()), rel=1e-5)

    weights = installed(model)
    assert {site["parameter"] for site in report.sites} <= set(weights)
    assert sum(site["bits"] for site in report.sites) == sum(
        w.bits() for w in {id(w): w for w in weights.values()}.values()
    )
    size = lc.save(model, tmp_path, scheme=report["scheme"])
    stored = Compressed(tmp_path)
    assert {site["parameter"]: site["bits"] for site in report.sites} == {
        name: 8 * stored.nbytes(name) for name in stored.weights
    }
    assert report.stored_bytes == sum(tensor.bytes for tensor in stored.files.tensors.values()), "all but the headers"
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir()) > report.stored_bytes
    assert json.loads((tmp_path / MANIFEST).read_text())["scheme"] == report["scheme"]

    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    loaded = lc.load_into(fresh, tmp_path).eval()
    assert torch.equal(outputs(loaded), after)
    assert {name: w.bits() for name, w in installed(loaded).items()} == {name: w.bits() for name, w in weights.items()}


def test_what_was_there_before_is_kept(net: Net) -> None:
    """Mode, gradient flags, buffers, biases and the user's random state are as they were; the values of matrices are not: it is in place."""
    net.train()
    net.norm.eval()  # as in fine-tuning with frozen statistics
    net.head.bias.requires_grad_(False)
    modes = {name: module.training for name, module in net.named_modules()}
    others = {
        name: tensor.clone()
        for name, tensor in net.state_dict().items()
        if not name.endswith("weight") or "norm" in name or "stem.1" in name
    }
    flags = {name: p.requires_grad for name, p in net.named_parameters() if name in others}
    state = torch.get_rng_state()
    lc.compress(net, "GPTQ(bits=4, group='channel')", [images(16)])
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: net.get_submodule(name).training for name in modes} == modes
    now = net.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in others.items())
    assert {name: p.requires_grad for name, p in net.named_parameters() if name in flags} == flags


def test_a_deep_copy_made_before_is_untouched(net: Net) -> None:
    kept = copy.deepcopy(net)
    expected = outputs(net)
    lc.compress(net, "SparseGPT(0.5) >> GPTQ(bits=3, group='channel')", [images(16)])
    assert torch.equal(outputs(kept), expected)


def test_state_that_changes_after_compression_is_saved(net: Net, tmp_path: Path) -> None:
    """Batch-norm statistics re-estimated and biases trained after compression are what is stored and loaded."""
    lc.compress(net, "GPTQ(rate=3.0)", [images(32)])
    net.train()
    with torch.no_grad():
        net(images(64, 7))
        net.head.bias.add_(1)
    net.eval()
    lc.save(net, tmp_path)
    loaded = lc.load_into(Net(), tmp_path).eval()
    for name, buffer in net.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    assert torch.equal(outputs(loaded), outputs(net))


def test_a_float_state_can_be_trained_and_saved(net: Net, tmp_path: Path) -> None:
    """Gradients reach a code book's entries through every use of it; a step down lowers the loss, and what is saved is what was trained."""
    lc.compress(net, "KMeans(bits=3)")
    x, y = images(32), torch.arange(32) % 5
    tables = [p for name, p in net.named_parameters() if "table" in name]
    assert len(tables) == 6, "one per matrix, the tie once"
    optimizer = torch.optim.SGD([p.requires_grad_() for p in tables], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lc.save(net, tmp_path)
    loaded = lc.load_into(Net(), tmp_path).eval()
    assert torch.allclose(outputs(loaded), outputs(net), atol=1e-2), "tables are stored in 16 bits"
    again = tmp_path / "again"
    lc.save(loaded, again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_tie_stays_one_object(net: Net, lm: nn.Module, tmp_path: Path) -> None:
    for name, model, scheme in (("net", net, "RTN(4, 'channel')"), ("lm", lm, "[('*', GPTQ(bits=4, group=32))]")):
        data = None if model is net else token_batches()
        fresh = copy.deepcopy(model)
        _, report = lc.compress(model, scheme, data)
        first, second = (
            ("one.weight", "two.weight") if name == "net" else ("model.embed_tokens.weight", "lm_head.weight")
        )
        (tied,) = [site for site in report.sites if site["aliases"]]
        assert tied["parameter"] == first
        lc.save(model, tmp_path / name)
        assert second not in Compressed(tmp_path / name).weights
        for one in (model, lc.load_into(fresh, tmp_path / name)):
            weights = installed(one)
            assert weights[first] is weights[second]
        bake(model)
        assert model.get_parameter(first) is model.get_parameter(second)


def test_baked_it_computes_the_same_without_laconic(net: Net) -> None:
    lc.compress(net, "GPTQ(rate=3.0)", [images(32)])
    after = outputs(net)
    bake(net)
    assert installed(net) == {}
    assert torch.equal(outputs(net), after)
    plain = Net().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(outputs(plain), after)


def test_data_come_in_any_shape_and_only_as_many_as_asked_for(net: Net) -> None:
    """A loader of (input, label) pairs calibrates as its inputs do, and no batch beyond `samples` examples is taken."""
    labels = torch.zeros(8, dtype=torch.long)
    taken = []

    def loader() -> Any:
        for seed in range(100):
            taken.append(seed)
            yield images(8, seed), labels

    nets = [copy.deepcopy(net) for _ in range(2)]
    lc.compress(nets[0], "GPTQ(bits=3, group='channel')", loader(), samples=24)
    lc.compress(nets[1], "GPTQ(bits=3, group='channel')", [images(8, seed) for seed in range(3)])
    assert taken == [0, 1, 2]
    assert torch.equal(outputs(nets[0]), outputs(nets[1]))


def test_calibration_makes_the_outputs_better(net: Net) -> None:
    """What the statistics are for: on held-out images GPTQ's error is clearly below plain rounding's at the same size."""
    before, errors, sizes = outputs(net), {}, {}
    for scheme in ("RTN(bits=3, group='channel', clip='mse')", "GPTQ(bits=3, group='channel')"):
        model, report = lc.compress(copy.deepcopy(net), scheme, [images(256, 1)])
        errors[scheme], sizes[scheme] = float((outputs(model) - before).square().mean()), report.stored_bytes
    rtn, gptq = errors.values()
    assert gptq < 0.8 * rtn
    assert len(set(sizes.values())) == 1


def test_the_loss_of_the_user_decides_which_outputs_matter(net: Net) -> None:
    """A loss that looks at one output only gives other Fisher weights, and so another code, than the default."""
    found = []
    for loss in (None, lambda output, batch: output[:, 0].mean() * 10):
        model, _ = lc.compress(
            copy.deepcopy(net), "KMeans(bits=3, weights='fisher')", [images(8, i) for i in range(8)], loss=loss
        )
        found.append(outputs(model))
    assert not torch.equal(*found)


def test_loss_and_score_are_of_output_and_batch_here_too(net: Net) -> None:
    """On validation data, before and after, as `lc.recover` judges; by default whether the class is right, and cross-entropy."""
    x, y = images(24, 3), torch.arange(24) % 4
    validation, fresh = [(x[:16], y[:16]), (x[16:], y[16:])], copy.deepcopy(net)
    _, report = lc.compress(net, "RTN(3, 'channel')", validation=validation)
    task = lc.Task([], validation)
    for name, model in (("", net), ("reference_", fresh)):
        found = task.judge(model, validation)
        assert report.metrics[f"{name}score"] == pytest.approx(found.score)
        assert report.metrics[f"{name}loss"] == pytest.approx(found.loss, rel=1e-5)
    assert report.metrics["loss"] != report.metrics["reference_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda model: 0.0}, r"score: expected a function score\(output, batch\) of the model.*this one takes \(model\)"),
        ({"loss": lambda output, generator: output.sum()}, r"loss: expected a function loss\(output, batch\).*random numbers are its own to make"),
        ({"score": lambda output, batch: output.sum()}, "score: is measured on batches with their answers.*pass validation="),
        ({"loss": lambda output, batch: output}, "loss: fails on batch 0 of the calibration data: .*a tensor with one number"),
        ({"loss": lambda output, batch: output[batch]}, "loss: fails on batch 0 of the calibration data"),
        ({"validation": iter([images(2)]), "score": lambda output, batch: output.sum()}, "validation: expected data that can be gone through again"),
        ({"validation": [images(2)]}, "pass loss="), ({"score": 3}, "score: expected a function.* got a int"),
    ],
    ids=[
        "a score of the model", "a loss of a generator", "a score without data", "a loss of many numbers", "a loss that fails",
        "data for once", "a loss nobody can guess", "no function",
    ],
)  # fmt: skip
def test_functions_of_another_kind_are_refused_before_work(options: dict[str, Any], message: str, net: Net) -> None:
    before = outputs(net)
    with pytest.raises(DataError, match=message):
        lc.compress(net, "KMeans(bits=3, weights='fisher')", [images(8)], **options)
    assert installed(net) == {}
    assert torch.equal(outputs(net), before)


@pytest.mark.parametrize(
    ("scheme", "data", "error", "message"),
    [
        ("GPTQ(bits=4, group='channel')", None, DataError, "needs calibration data"),
        ("GPTQ(bits=4, group='channel')", [], DataError, "needs calibration data"),
        ("GPTQ(rate=3.0)", None, DataError, "needs calibration data"),
        ("GPTQ(bits=4, group='channel')", "text.txt", DataError, "calibrated with batches"),
        ("SparseGPT(pattern='2:4')", [images(8)], SchemeError, "stem.0: pattern '2:4' does not tile"),
        ("[('*.conv', RTN(4, 'channel')), ('*', Keep())]", None, SchemeError, "matches no site"),
        ("LowRank(0.5, weighted=True)", [images(8)], SchemeError, "grouped: weighted low rank needs one Hessian"),
        ("GPTQ(bits=4, group='channel')", [images(8)[:, :1]], DataError, "channels"),
        ("RTM(4)", None, SchemeError, "did you mean 'RTN'"),
        ("Magnitude(Free(0, 1))", None, SchemeError, "stem.0: .*sparsity is still free"),
        ("Magnitude(0.5, criterion='taylor')", None, DataError, "needs calibration data"),
    ],
)  # fmt: skip
def test_bad_inputs_change_nothing(scheme: str, data: Any, error: type[Exception], message: str, net: Net) -> None:
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(error, match=message):
        lc.compress(net, scheme, data)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert installed(net) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_weight_that_is_not_finite_is_named(net: Net) -> None:
    with torch.no_grad():
        net.line.weight[0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="line.weight: holds NaN or infinity"):
        lc.compress(net, "RTN(4, 'channel')")


def test_a_module_of_another_architecture_is_refused(net: Net, tmp_path: Path) -> None:
    lc.compress(net, "RTN(4, 'channel')")
    lc.save(net, tmp_path)
    others: list[tuple[str, Any, str]] = [
        ("head", nn.Linear(16, 6), "head.weight as .*5, 16.*6, 16"), ("norm", nn.Identity(), "stores norm.bias, which the module does not have"),
        ("norm", nn.BatchNorm2d(1), r"norm.* \(32,\)|norm.*\[32\]"), ("line", nn.Identity(), "stores line.weight as .*no such weight"),
        ("extra", nn.LayerNorm(4), "does not store extra.weight"), ("extra", nn.Linear(4, 4), "does not store extra.weight"),
    ]  # fmt: skip
    for name, module, message in others:
        model = Net()
        setattr(model, name, module)
        with pytest.raises(CheckpointError, match=message):
            lc.load_into(model, tmp_path)
    with pytest.raises(CheckpointError, match=MANIFEST):
        lc.load_into(Net(), tmp_path / "nowhere")


@pytest.mark.parametrize("batch", [torch.randn(8, 3), torch.zeros(8, 64, dtype=torch.int64), {"x": torch.randn(8, 64)}])
def test_data_that_the_module_does_not_take(batch: object) -> None:
    """One error that names the batch, before anything is changed; the module's own error is its cause."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(lc.DataError, match=r"batch 0 of the calibration data: Sequential cannot be called with"):
        lc.compress(net, "GPTQ(bits=4)", [batch])
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_extra_state_of_any_kind_is_no_obstacle_to_compressing(tmp_path: Path) -> None:
    """It is refused where it would have to be stored, by name, and nothing is written."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.factor = nn.Linear(64, 64), 3.0

        def get_extra_state(self) -> dict[str, float]:
            return {"factor": self.factor}

        def set_extra_state(self, state: dict[str, float]) -> None:
            self.factor = state["factor"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.factor

    net, report = lc.compress(Scaled(), "RTN(bits=4)")
    assert len(report.sites) == 1
    with pytest.raises(lc.SchemeError, match="_extra_state"):
        lc.save(net, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
