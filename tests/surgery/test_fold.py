"""Folding: which norms and rows feed whose columns, on architectures nobody listed; and models that compute the same with less stored."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import laconic as lc
from laconic.command.cli import app
from laconic.errors import SurgeryError
from laconic.model.sites import find_slots
from laconic.recover.text import complete_directory
from laconic.show.inspect import inspect_directory
from laconic.surgery import Fold, find_folds, folds
from laconic.surgery.feeds import Feed, Refused, feeds
from laconic.surgery.folds import bench, search
from laconic.surgery.verify import answers, apart
from laconic.weights import Dense, Scaled, Uniform, baked, install, installed
from laconic.weights.demands import demands_of
from laconic.weights.inputs import Inputs
from tests.test_models import SIZE, build

BERT = transformers.BertConfig(**(SIZE | {"num_hidden_layers": 2}), intermediate_size=96, hidden_act="relu")
MORE: dict[str, Any] = {
    "qwen2": transformers.Qwen2Config(**SIZE, intermediate_size=96, num_key_value_heads=2),
    "gemma": transformers.GemmaConfig(**SIZE, intermediate_size=96, num_key_value_heads=1, head_dim=16),
}


def ids(high: int = 320) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, high, (2, 16), generator=torch.Generator().manual_seed(3))}


def model_of(name: str) -> nn.Module:
    if name not in MORE and name != "bert":
        return build(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            transformers.BertModel(BERT)
            if name == "bert"
            else transformers.AutoModelForCausalLM.from_config(MORE[name], dtype=torch.float32)
        )
    return model.eval().requires_grad_(False)


def of_block(folds: list[Fold], block: str) -> dict[str, tuple[str, list[str]]]:
    """Source -> kind and readers, of the folds whose source is in a block, without the block's name."""
    short = {fold.source.path: fold for fold in folds if fold.source.path.startswith(block)}
    return {
        path[len(block) :]: (fold.kind, [slot.name[len(block) :] for slot in fold.readers])
        for path, fold in short.items()
    }


ATTENTION = {
    "input_layernorm": ("norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    "self_attn.v_proj": ("rows", ["self_attn.o_proj"]),
}
GATED = {
    "post_attention_layernorm": ("norm", ["mlp.gate_proj", "mlp.up_proj"]),
    "mlp.up_proj": ("rows", ["mlp.down_proj"]),
}
EXPECTED: dict[str, tuple[str, dict[str, tuple[str, list[str]]]]] = {
    "llama": ("model.layers.1.", ATTENTION | GATED),
    "qwen2": ("model.layers.1.", ATTENTION | GATED),
    "gemma": ("model.layers.1.", ATTENTION | GATED),
    "mixtral": (
        "model.layers.1.",
        ATTENTION
        | {"mlp.experts": ("rows", ["mlp.experts.down_proj"]), "post_attention_layernorm": ("norm", ["mlp.gate", "mlp.experts.gate_up_proj"])},
    ),
    "opt": (
        "model.decoder.layers.1.",
        {
            "self_attn_layer_norm": ("norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            "self_attn.v_proj": ("rows", ["self_attn.out_proj"]), "final_layer_norm": ("norm", ["fc1"]), "fc1": ("rows", ["fc2"]),
        },
    ),
    "gpt2": (
        "transformer.h.1.",
        {"ln_1": ("norm", ["attn.c_attn"]), "attn.c_attn": ("rows", ["attn.c_proj"]), "ln_2": ("norm", ["mlp.c_fc"])},
    ),
    "phi3": (
        "model.layers.1.",
        {
            "input_layernorm": ("norm", ["self_attn.qkv_proj"]), "self_attn.qkv_proj": ("rows", ["self_attn.o_proj"]),
            "post_attention_layernorm": ("norm", ["mlp.gate_up_proj"]), "mlp.gate_up_proj": ("rows", ["mlp.down_proj"]),
        },
    ),
    "bert": (
        "encoder.layer.1.",
        {"attention.self.value": ("rows", ["attention.output.dense"]), "intermediate.dense": ("rows", ["output.dense"])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_feeds_what(name: str) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    block, expected = EXPECTED[name]
    assert of_block(find_folds(model, ids()), block) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_which_channel_feeds_which_column() -> None:
    """Grouped queries: 4 heads of 16 read 2 value heads; fused projections: values lie behind queries and keys, up behind gate."""

    def index(name: str, source: str) -> list[int]:
        return next(
            fold.index.tolist()
            for fold in find_folds(model_of(name), ids())
            if fold.source.path.endswith(f"1.{source}")
        )

    shared = [16 * (head // 2) + i for head in range(4) for i in range(16)]
    assert index("qwen2", "self_attn.v_proj") == shared
    assert index("phi3", "self_attn.qkv_proj") == [96 + i for i in shared]
    assert index("phi3", "mlp.gate_up_proj") == list(range(96, 192))
    assert index("gpt2", "attn.c_attn") == list(range(128, 192))
    assert index("mixtral", "mlp.experts") == list(range(48, 96))


def test_what_else_reads_a_source_is_named() -> None:
    def reason(model: nn.Module, source: str) -> str:
        return next(entry.reason for entry in search(model, ids())[1] if entry.source.path.endswith(source))

    residual = reason(model_of("bert"), "layer.0.output.LayerNorm")
    assert "encoder.layer.1.attention.output.LayerNorm (read by encoder.layer.1.attention.output)" in residual
    assert "the model's output" in reason(model_of("bert"), "layer.1.output.LayerNorm")


class Net(nn.Module):
    """norm -> two readers -> activation -> a last layer; with `used`, the last layer reads the norm too."""

    def __init__(self, activation: Any, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.activation = norm if norm is not None else nn.LayerNorm(8), activation
        self.a, self.b, self.last = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(self.activation(self.a(y), self.b(y)))


def net(activation: Any, norm: nn.Module | None = None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(activation, norm).eval()


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("activation", "rows"),
    [
        (lambda a, b: F.relu(a) + 0 * b, ["a"]),
        (lambda a, b: F.leaky_relu(a) + 0 * b, ["a"]),
        (lambda a, b: F.gelu(a) + 0 * b, []),
        (lambda a, b: F.relu6(a) + 0 * b, []),
        (lambda a, b: 30 * torch.tanh(a / 30) * F.silu(b), []),
        (lambda a, b: F.gelu(a) * b, ["b"]),
        (lambda a, b: F.relu(a) * b, ["a", "b"]),  # either can take the scales, each feeds the columns one by one
        (lambda a, b: a + b, []),
        (lambda a, b: a.flip(-1) * torch.tanh(b), ["a"]),
        (lambda a, b: torch.sqrt(a.abs()) * b.sign(), []),
    ],
)  # fmt: skip
def test_rows_pass_what_multiplies_and_nothing_else(activation: Any, rows: list[str]) -> None:
    folds = find_folds(net(activation), X)
    assert [fold.source.path for fold in folds if fold.kind == "rows"] == rows
    assert [fold.source.path for fold in folds if fold.kind == "norm"] == ["norm"]
    flipped = [fold.index.tolist() for fold in folds if fold.source.path == "a"]
    assert not flipped or flipped[0] in (list(range(12)), list(range(12))[::-1])


def test_decisions_that_no_graph_shows_are_found_by_running() -> None:
    """The greatest channel picks a layer: nothing of the norm's output flows there, but scaling it picks another one."""

    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.last(torch.where((y.argmax(-1, keepdim=True) % 2).bool(), self.a(y).tanh(), self.b(y).tanh()))

    folds, refused = search(Routed(None), X)
    assert folds == []
    assert [entry.source.path for entry in refused] == ["norm"]
    assert "scaling it changes the output" in refused[0].reason


def test_a_wrong_channel_does_not_pass_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured, off by one channel: the fold is refused, and no other one."""

    def confused(*given: Any) -> tuple[list[Feed], list[Refused]]:
        found, refused = feeds(*given)
        return [*found[:-1], replace(found[-1], index=found[-1].index.roll(1))], refused

    model = net(lambda a, b: F.gelu(a) * b)
    assert [fold.source.path for fold in find_folds(model, X)] == ["norm", "b"]
    monkeypatch.setattr(folds, "feeds", confused)
    good, refused = search(model, X)
    assert [fold.source.path for fold in good] == ["norm"]
    assert [entry.source.path for entry in refused] == ["b"]


def scaled(W: Tensor, s: Tensor, *, bits: int = 8, rows: Tensor | None = None) -> Scaled:
    """W rounded with its columns divided by s, which are multiplied by s when it is decoded."""
    columns = Dense((1, len(s)))
    columns.right_inverse(s.unsqueeze(0))
    grid = Uniform((W.shape[0], W.shape[1]), bits=bits)
    row_scale = None
    if rows is not None:
        row_scale = Dense((1, len(rows)))
        row_scale.right_inverse(rows.unsqueeze(0))
    weight = Scaled(grid, row_scale=row_scale, column_scale=columns)
    grid.fit(W / weight._factor(0, W.shape[0]))
    weight.right_inverse(W)
    return weight


def random_scale(n: int, seed: int = 0) -> Tensor:
    return torch.exp2(4 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 2).bfloat16().float()


def scale_all(model: nn.Module, example: Any, kinds: tuple[str, ...] = ("norm", "rows")) -> dict[str, Scaled]:
    """Give every reader of every fold a column scale that can be folded; returns the weights by name."""
    made: dict[str, Scaled] = {}
    with torch.no_grad():
        for seed, fold in enumerate(find_folds(model, example)):
            s = random_scale(fold.source.channels, seed)[fold.index]
            for slot in fold.readers:
                taken = slot.name in made or slot.parameter in installed(model)
                if fold.kind in kinds and not taken and slot.role in ("body", "router"):
                    path, name = slot.users[0]
                    weight = scaled(slot.view.matrix(getattr(model.get_submodule(path), name)), s)
                    install(model.get_submodule(path), name, weight, slot.view)
                    made[slot.name] = weight
    return made


@pytest.mark.parametrize("name", ["llama", "opt", "gemma", "mixtral", "gpt2"])
def test_the_folded_model_computes_the_same_without_a_column_scale(name: str) -> None:
    model = model_of(name)
    weights = scale_all(model, ids())
    codes = {key: weight.weight.codes.clone() for key, weight in weights.items()}
    expected, bits = answers(baked(model), ids()), sum(weight.bits() for weight in weights.values())
    notes = lc.fold(model, ids())
    now = installed(model)
    assert apart(expected, answers(model, ids())) < 1e-5
    assert not any(isinstance(weight, Scaled) and weight.column_scale is not None for weight in now.values())
    assert len(weights) >= 9
    assert all("takes the column scales of" in note for note in notes)
    assert sum(note.count(", ") + 1 for note in notes) == len(weights)
    found = {
        key.removesuffix(".weight"): weight.weight if isinstance(weight, Scaled) else weight
        for key, weight in now.items()
    }
    assert all(torch.equal(found[key].codes, codes[key]) for key in codes), "what was solved is not solved again"
    assert name == "gpt2" or sum(weight.bits() for weight in now.values()) < bits


def test_a_norm_takes_the_scale_exactly() -> None:
    model = net(lambda a, b: F.silu(a) * b)
    s = random_scale(8)
    for layer in (model.a, model.b):
        install(layer, "weight", scaled(layer.weight.detach(), s), find_slots(net(None))[0].view)
    weight, bias = (model.norm.weight.detach() + 0.3, model.norm.bias.detach() + 0.1)
    model.norm.load_state_dict({"weight": weight, "bias": bias})
    assert lc.fold(model, X) == ["norm: takes the column scales of a, b"]
    assert torch.equal(model.norm.weight, weight * s)
    assert torch.equal(model.norm.bias, bias * s)
    assert isinstance(installed(model)["a.weight"], Uniform)
    assert lc.fold(model, X) == ["no installed weight has a column scale"]


def test_rows_take_the_scale_with_what_is_there() -> None:
    """v's own row scale and column scale, its bias, and the bits of its inputs."""
    model = net(lambda a, b: F.relu(a) + 0 * b)
    view, rows, s = find_slots(model)[0].view, random_scale(12, 1), random_scale(12, 2)
    source, reader = (
        scaled(model.a.weight.detach(), random_scale(8, 3), rows=rows),
        scaled(model.last.weight.detach(), s),
    )
    source.inputs = reader.inputs = Inputs(8)
    install(model.a, "weight", source, view)
    install(model.last, "weight", reader, find_slots(net(None))[2].view)
    bias, columns = model.a.bias.detach().clone(), source.column_scale
    notes = lc.fold(model, X)
    assert notes == [
        "a: takes the column scales of last",
        "a: keeps its column scale: norm: b reads it too and has no column scale",
    ]
    now = installed(model)
    assert isinstance(now["a.weight"], Scaled)
    assert now["a.weight"].row_scale is not None
    assert torch.equal(now["a.weight"].row_scale.forward()[0], rows * s)
    assert now["a.weight"].column_scale is columns
    assert torch.equal(model.a.bias, bias * s)
    assert isinstance(now["last.weight"], Uniform)
    for name in ("a", "last"):
        assert now[f"{name}.weight"].inputs == Inputs(8)
        assert demands_of(model.get_submodule(name)) is now[f"{name}.weight"]
    assert source.inputs is None, "parts of a weight ask for nothing"


def test_what_is_kept_says_why() -> None:
    def notes(a: Tensor, b: Tensor | None, norm: nn.Module | None = None) -> list[str]:
        model = net(lambda a, b: F.silu(a) * b, norm)
        for layer, s in ((model.a, a), (model.b, b)):
            if s is not None:
                install(layer, "weight", scaled(layer.weight.detach(), s), find_slots(net(None))[0].view)
        before = answers(model, X)
        found = lc.fold(model, X)
        assert apart(before, answers(model, X)) == 0
        return found

    s = random_scale(8)
    assert notes(s, None) == ["a: keeps its column scale: norm: b reads it too and has no column scale"]
    assert all("differs" in note for note in notes(s, random_scale(8, 1)))
    assert all("negative" in note for note in notes(-s, -s))
    assert all(
        "nothing before it feeds its columns one by one" in note
        for note in notes(s, s, nn.LayerNorm(8, elementwise_affine=False))
    )


def test_shared_value_heads_need_equal_scales() -> None:
    model = model_of("llama")
    layer = model.model.layers[0].self_attn.o_proj
    view = next(slot for slot in find_slots(model) if slot.name.endswith("0.self_attn.o_proj")).view
    install(layer, "weight", scaled(layer.weight, random_scale(64)), view)
    (note,) = lc.fold(model, ids())
    assert note.endswith("self_attn.v_proj: columns that share one of its channels have different scales")


def test_nothing_changes_when_the_outputs_differ() -> None:
    model = model_of("llama")
    weights = scale_all(model, ids())
    weights["model.layers.0.self_attn.v_proj"].inputs = None
    before, state = installed(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="everything was put back"):
        lc.fold(model, ids(), tolerance=0.0)
    after = installed(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad is False for parameter in model.parameters())


def test_half_precision_is_never_rounded() -> None:
    """A product that needs more than 16 bits stays where it is; one with powers of two moves."""
    for s, done in ((random_scale(8), False), (torch.exp2(torch.arange(8) - 4.0), True)):
        model = net(lambda a, b: F.silu(a) * b)
        model.norm.weight.data += 0.1 * torch.arange(8)
        for layer in (model.a, model.b):
            install(layer, "weight", scaled(layer.weight.detach(), s), find_slots(net(None))[0].view)
        model.norm.bfloat16()
        notes = lc.fold(model, X)
        assert model.norm.weight.dtype == torch.bfloat16
        assert done == ("takes" in notes[0])
        assert done or all("its weight is bfloat16 and would be rounded" in note for note in notes)
    install(model.last, "weight", scaled(model.last.weight.detach(), random_scale(12)), find_slots(net(None))[2].view)
    model.last.bfloat16()
    with pytest.raises(SurgeryError, match=r"^last.weight: .* convert the model to float32"):
        lc.fold(model, X)


def test_rounded_inputs_are_the_same_numbers() -> None:
    """A layer that rounds x diag(s) before the fold rounds what arrives after it: with powers of two, bit for bit."""
    model = net(lambda a, b: F.silu(a) * b)
    s = torch.exp2(torch.randint(-3, 4, (8,), generator=torch.Generator().manual_seed(0)).float())
    for layer in (model.a, model.b):
        weight = scaled(layer.weight.detach(), s)
        weight.inputs = Inputs(4)
        install(layer, "weight", weight, find_slots(net(None))[0].view)
    before, plain = answers(model, X), answers(bench(model), X)
    assert apart(plain, before) > 1e-3
    lc.fold(model, X)
    assert apart(before, answers(model, X)) < 1e-6


def test_a_tie_stays_a_tie() -> None:
    model = net(lambda a, b: F.silu(a) * b)
    model.b.weight = model.a.weight
    shared = scaled(model.a.weight.detach(), random_scale(8))
    for layer in (model.a, model.b):
        install(layer, "weight", shared, find_slots(net(None))[0].view)
    expected = answers(model, X)
    lc.fold(model, X)
    now = installed(model)
    assert now["a.weight"] is now["b.weight"]
    assert isinstance(now["a.weight"], Uniform)
    assert apart(expected, answers(model, X)) < 1e-5


def test_convolutions_share_a_factor_per_channel() -> None:
    def build_net() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 4, 3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 5),
            ]
        return nn.Sequential(*layers).eval()

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {fold.source.path: fold for fold in find_folds(build_net(), x)}
    assert {path: (fold.kind, fold.readers[0].name) for path, fold in found.items()} == {
        "1": ("norm", "3"),
        "3": ("rows", "6"),
    }
    assert found["3"].index.tolist() == [i // 16 for i in range(64)]
    per_channel = random_scale(6).repeat_interleave(9)
    for s, done in ((per_channel, True), (random_scale(54), False)):
        model = build_net()
        layer, slot = model.get_submodule("3"), find_slots(model)[1]
        install(layer, "weight", scaled(slot.view.matrix(layer.weight).detach(), s), slot.view)
        expected = answers(model, x)
        (note,) = lc.fold(model, x)
        assert note == "1: takes the column scales of 3" if done else note.endswith("or within a channel")
        assert apart(expected, answers(model, x)) < 1e-5


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(SurgeryError, match="breaks on the example"):
        find_folds(net(lambda a, b: a * b), torch.randn(6, 7))


def test_a_language_model_of_the_team(shared: Path) -> None:
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / "books-llama-7m", dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    few = {"input_ids": ids(4096)["input_ids"][:1]}
    weights = scale_all(model, few)
    assert len(weights) == 7 * 8
    expected = answers(baked(model), ids(4096))
    assert len(lc.fold(model, few)) == 4 * 8
    assert apart(expected, answers(baked(model), ids(4096))) < 1e-5


@pytest.fixture(scope="module")
def directory(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed language model whose body has column scales, all of which can be folded but that of one o_proj."""
    folder = tmp_path_factory.mktemp("fold") / "scaled"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).requires_grad_(False)
    kept = model.model.layers[2].self_attn.o_proj
    view = next(slot for slot in find_slots(model) if slot.name.endswith("layers.2.self_attn.o_proj")).view
    install(kept, "weight", scaled(kept.weight.float(), random_scale(64)), view)
    scale_all(model.float(), ids())
    model.bfloat16()
    lc.save(model, folder, scheme="by hand", source={"parameters": 1})
    complete_directory(folder, model, tiny)
    return folder


def fold(*words: object) -> Any:
    return CliRunner().invoke(app, ["fold", *map(str, words)])


def test_the_command_writes_a_smaller_directory(directory: Path, tmp_path: Path) -> None:
    result = fold(directory, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["folded"]) == 11
    assert [line.split(":")[0] for line in found["kept"]] == ["model.layers.2.self_attn.o_proj"]
    assert found["stored_bytes"] < found["source_bytes"]
    assert found["difference"] < 1e-5
    assert found["stored_bytes"] == inspect_directory(tmp_path / "out")["bytes"]
    before, after = (lc.load(folder, dtype=torch.float32) for folder in (directory, tmp_path / "out"))
    assert apart(answers(before, ids()), answers(after, ids())) < 1e-5
    plain = {row["name"]: row["kind"] for row in inspect_directory(tmp_path / "out")["plain"]}
    assert plain["model.embed_tokens.weight"] == "bf16"
    assert plain["model.norm.weight"] == "bf16"
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert apart(answers(after, ids()), answers(stock, ids())) == 0
    again = fold(tmp_path / "out", tmp_path / "again")
    assert again.exit_code == SurgeryError.exit_code
    assert "nothing to fold: model.layers.2.self_attn.o_proj" in " ".join(again.stderr.split())
    assert not (tmp_path / "again").exists()


def test_directories_that_cannot_be_folded(directory: Path, tiny: Path, tmp_path: Path) -> None:
    assert fold(directory, directory, "--overwrite").exit_code == lc.OutputError.exit_code
    assert fold(tiny, tmp_path / "out").exit_code == lc.CheckpointError.exit_code
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep me")
    assert fold(directory, tmp_path / "mine").exit_code == lc.OutputError.exit_code
    assert (tmp_path / "mine" / "file").read_text() == "keep me"
    before = copy.copy(sorted(directory.iterdir()))
    assert fold(directory, tmp_path / "strict", "--tolerance", "0").exit_code == SurgeryError.exit_code
    assert sorted(directory.iterdir()) == before
