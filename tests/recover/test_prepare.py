"""`prepare`, a loop of one's own, `convert`: one process, every wrapper of a forward pass that torch has."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import laconic as lc
from laconic.clustering import dkm_naive
from laconic.clustering.relax import SoftClusters
from laconic.disk.store import read_manifest
from laconic.errors import CheckpointError, DataError, LaconicError, SchemeError
from laconic.recover.prepare import relaxations
from laconic.weights import Codebook, Sparse, Uniform, Weight, installed
from tests.conftest import tiny_config
from tests.recover.nets import Words, conv, same, seeded, untouched, vectors, words_task

SCHEMES: dict[str, type[Weight]] = {
    "DKM(bits=2, tau=0.2, tau_end=0.02)": Codebook,
    "DKM(bits=2, dimension=2, rows=4, row_scale=True)": Codebook,
    "Magnitude(0.5) >> DKM(bits=2, zero=True)": Sparse,
    "RTN(3, 'channel')": Uniform,
    "Magnitude(0.5)": Sparse,
}
SCHEME = next(iter(SCHEMES))


def net() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 4)))


def llama(**changes: object) -> Any:
    return seeded(
        lambda: transformers.LlamaForCausalLM(
            tiny_config(hidden_size=32, num_hidden_layers=2, dtype="float32", **changes)
        )
    )


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(
    model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, first: int = 0, total: int = 20
) -> torch.optim.Optimizer:
    """A plain loop, as anybody writes it."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for step in range(first, first + steps):
        lc.advance(model, step / total)
        optimizer.zero_grad()
        loss_of(model, *vectors(64, step)).backward()
        optimizer.step()
    return optimizer


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.float().square().mean(), [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_plain_loop_trains_it_and_it_ends_in_stored_weights(scheme: str, tmp_path: Path) -> None:
    x, y = vectors(256, 100)
    direct = loss_of(lc.compress(net(), lc.parse(scheme))[0].eval(), x, y).detach()
    model = lc.prepare(net(), scheme)
    torch.testing.assert_close(
        loss_of(model.eval(), x, y).detach(), direct
    )  # in evaluation it is the compressed model from the start on
    train(model, 20)
    with torch.no_grad():
        shown = model.eval()(x)
    assert F.cross_entropy(shown, y) < direct - 0.1
    converted = lc.convert(model.train())
    assert converted is model
    assert not model.training
    assert torch.equal(model(x), shown)
    weights = installed(model)
    assert set(weights) == {"0.weight", "2.weight", "4.weight"}
    assert all(type(weight) is SCHEMES[scheme] for weight in weights.values())
    lc.save(model, tmp_path)
    assert torch.equal(lc.load_into(nn.Sequential(*map(copy.deepcopy, net())), tmp_path).eval()(x), shown)


@pytest.mark.parametrize("make", [conv, Words], ids=["convolutions and batch norms", "a tie and an LSTM"])
def test_matrices_of_every_shape(make: Any) -> None:
    model = lc.prepare(seeded(make), "DKM(bits=2)")
    inputs = vectors(32, 0)[0] if make is conv else words_task().train[0][0]  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name.endswith("original"))
    shown = model.eval()(inputs)
    assert torch.equal(lc.convert(model)(inputs), shown)


def test_transposed_layers_and_packed_experts() -> None:
    gpt = seeded(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        )
    )
    mixtral = seeded(
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                num_local_experts=3, max_position_embeddings=32,
            )
        )
    )  # fmt: skip
    tokens = torch.arange(16).view(1, 16)
    for model in (gpt, mixtral):
        lc.prepare(model.train(), "[('*', DKM(bits=2))]")
        model(tokens, labels=tokens).loss.backward()
        assert all(
            p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name.endswith("original")
        )
        shown = model.eval()(tokens).logits
        assert torch.equal(lc.convert(model)(tokens).logits, shown)


def test_a_tie_stays_one_parameter_one_relaxation_one_stored_weight(tmp_path: Path) -> None:
    model = llama()
    count = len(list(model.parameters()))
    lc.prepare(model, "[('*', DKM(bits=3))]")
    assert len(list(model.parameters())) == count
    assert model.lm_head.parametrizations.weight.original is model.model.embed_tokens.parametrizations.weight.original
    assert len(relaxations(model)) == 7 * 2 + 1
    tokens = torch.arange(32).view(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    shown = model.eval()(tokens).logits
    lc.convert(model)
    assert torch.equal(model(tokens).logits, shown)
    weights = installed(model)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    lc.save(model, tmp_path)
    manifest = read_manifest(tmp_path)
    assert [name for name in manifest["weights"] if "embed_tokens" in name] == ["model.embed_tokens.weight"]
    assert "lm_head" not in (tmp_path / "laconic.json").read_text()
    assert torch.equal(lc.load_into(llama(), tmp_path).eval()(tokens).logits, shown)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "scheme", ["DKM(bits=2, tau=0.3)", "Magnitude(0.5) >> DKM(bits=2, tau=0.3)", "RTN(3, 'channel')"]
)
def test_checkpointed_activations_change_no_gradient(scheme: str, reentrant: bool) -> None:
    """A block that is used twice runs again while its first use has had its gradient already; two steps, so that centroids have moved on."""
    x = vectors(32, 0)[0].requires_grad_()
    found = []
    for again in (False, True):
        model = lc.prepare(
            seeded(lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh())), scheme
        )
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        for _ in range(2):
            optimizer.zero_grad()
            h = x
            for _ in range(3):
                h = checkpoint(model, h, use_reentrant=reentrant) if again else model(h)
            h.square().mean().backward()
            optimizer.step()
        found.append(model)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert same(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers_too(reentrant: bool) -> None:
    tokens, found = torch.arange(32).view(2, 16), []
    for again in (False, True):
        model = lc.prepare(llama().train(), "DKM(bits=2, tau=0.3)")
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
        found.append(model)
    assert same(*found)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_step_of_two_halves_is_a_step_of_the_whole(scheme: str) -> None:
    x, y = vectors(64, 0)
    models = [lc.prepare(net().double(), scheme) for _ in range(2)]
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (loss_of(model, a, b) / parts).backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scheme", ["DKM(bits=2, tau=0.2)", "RTN(3, 'channel')"])
def test_compiled_it_computes_the_same(scheme: str) -> None:
    """Traced with gradients by `aot_eager`, which is what every backend starts from; generating code takes minutes on small machines."""
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not work with this Python")
    make = lambda: lc.prepare(seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).double()), scheme)  # noqa: E731
    plain, model = make(), make()
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (plain, model)]
    for step in range(3):
        for m, run, optimizer in ((plain, plain, optimizers[0]), (model, compiled, optimizers[1])):
            lc.advance(m, step / 3)
            optimizer.zero_grad()
            x, y = vectors(32, step)
            loss_of(run, x.double(), y).backward()
            optimizer.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    x = vectors(32, 9)[0].double()
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x), rtol=1e-6, atol=1e-7)  # type: ignore[attr-defined]


def test_a_deep_copy_is_another_model() -> None:
    for scheme in SCHEMES:
        model = lc.prepare(net(), scheme)
        train(model, 3)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        other = copy.deepcopy(model)
        train(other, 3)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        x = vectors(8, 0)[0]
        shown, kept = other.eval()(x), model.eval()(x)
        assert torch.equal(lc.convert(other)(x), shown)
        assert torch.equal(model(x), kept)
        assert torch.equal(lc.convert(model)(x), kept)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_state_dict_goes_on_where_it_was_saved(scheme: str, tmp_path: Path) -> None:
    """Into a module that was prepared at other values: masks, scales and temperatures come from the state."""
    model = lc.prepare(net(), scheme)
    optimizer = train(model, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, 5, optimizer, 5)
    other = lc.prepare(
        seeded(net, 1).apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None), scheme
    )
    resumed, state = torch.optim.Adam(other.parameters(), 5e-3), torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(other, 5, resumed, 5)
    assert same(model, other)
    assert same(lc.convert(model), lc.convert(other))


def test_a_state_dict_of_another_scheme_is_refused() -> None:
    state = lc.prepare(net(), "RTN(3, 'channel')").state_dict()
    with pytest.raises(CheckpointError, match="another scheme"):
        lc.prepare(net(), "RTN(4, 'channel')").load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        lc.prepare(net(), "DKM(bits=2)").load_state_dict(state)


@pytest.mark.parametrize(
    ("scheme", "error", "message"),
    [
        ("LowRank(99)", SchemeError, "rank 99 of a"),
        ("DKM(bits=2) + LowRank(2)", SchemeError, "term of a sum"),
        ("DKM(bits=8)", SchemeError, "256 centroids for 64 weights"),
        ("Magnitude(0.99) >> DKM(bits=3)", SchemeError, "8 centroids for 4 weights that survive"),
        ("GPTQ(4, 'channel')", DataError, "needs data"),
        ("FilterPrune(0.5)", DataError, "example input"),
    ],
)
def test_what_is_refused_changes_nothing(scheme: str, error: type[LaconicError], message: str) -> None:
    model = net()
    with untouched(model), pytest.raises(error, match=message):
        lc.prepare(model, scheme)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_parametrizations_of_others_are_left_alone() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Flatten(), nn.Linear(16, 4))
    )
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    before = model[0](x)
    lc.prepare(model, "[('*', DKM(bits=2))]")
    assert len(relaxations(model)) == 1
    shown = model.eval()(x)
    assert torch.equal(lc.convert(model)(x), shown)
    assert torch.equal(model[0](x), before)
    assert set(installed(model)) == {"2.weight"}


def test_prepared_twice_or_not_at_all_is_refused() -> None:
    model = net()
    for call in (lc.convert, lambda m: lc.advance(m, 0.5)):
        with untouched(model), pytest.raises(SchemeError, match="expected a module that lc.prepare was called on"):
            call(model)
    lc.prepare(model, "DKM(bits=2)")
    with untouched(model), pytest.raises(SchemeError, match="prepared already"):
        lc.prepare(model, "RTN(4, 'channel')")
    lc.convert(model)
    with pytest.raises(SchemeError, match="expected a module that"):
        lc.convert(model)
    with pytest.raises(SchemeError, match="progress from 0 to 1"):
        lc.advance(lc.prepare(net(), "DKM(bits=2)"), 1.5)


def test_an_optimizer_sees_the_parameters_there_were() -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    before = list(model.parameters())
    lc.prepare(model, SCHEME)
    assert [id(p) for p in sorted(model.parameters(), key=id)] == [id(p) for p in sorted(before, key=id)]
    frozen = model[2].parametrizations.weight.original
    assert not frozen.requires_grad
    value = frozen.detach().clone()
    train(model, 3)
    assert torch.equal(frozen, value)
    assert torch.equal(
        lc.convert(model)[2].weight.unique().sort().values, installed(model)["2.weight"].tables().flatten().unique()
    )  # type: ignore[operator]


@pytest.mark.parametrize("cast_first", [True, False])
def test_16_bit_master_weights_are_clustered_as_they_are(cast_first: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 512, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(512, 64, generator=torch.Generator().manual_seed(0)))
    model = (
        lc.prepare(model.bfloat16(), "DKM(bits=2, tau=0.1)")
        if cast_first
        else lc.prepare(model, "DKM(bits=2, tau=0.1)").to(torch.bfloat16)
    )
    (relaxation,) = relaxations(model)
    assert isinstance(relaxation, SoftClusters)
    assert relaxation.start.dtype == torch.float32  # the cast leaves what is carried alone
    w, start = model[0].parametrizations.weight.original, relaxation.start.clone()
    expected, last = dkm_naive(w.detach().double(), start.double(), tau=float(relaxation.tau), iterations=5)
    x = torch.eye(64, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    shown = model(x)
    wanted = (
        expected.bfloat16().t()
    )  # decoded in float32: once in a thousand values that is on the other side of a tie of bfloat16
    assert float((shown != wanted).float().mean()) < 0.01
    torch.testing.assert_close(shown, wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert torch.allclose(relaxation.centroids.double(), last, atol=1e-6)
    shown.float().square().sum().backward()
    optimizer.step()
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16
    shown = model.eval()(x)
    assert torch.equal(lc.convert(model)(x), shown)
    assert shown.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_of_every_kind(dtype: torch.dtype, tmp_path: Path) -> None:
    x = vectors(32, 0)[0].to(dtype)
    for scheme in SCHEMES:
        model = lc.prepare(net().to(dtype), scheme)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).float().square().mean().backward()
        optimizer.step()
        shown = model.eval()(x)
        assert shown.dtype == dtype
        assert torch.equal(lc.convert(model)(x), shown)
        lc.save(model, tmp_path / scheme)
        torch.testing.assert_close(lc.load_into(net().to(dtype), tmp_path / scheme)(x), shown)


def test_inputs_are_rounded_as_they_will_be() -> None:
    model, x = net(), vectors(64, 0)[0]
    data = [x]
    plain = lc.prepare(net(), "RTN(8, 'channel')").eval()(x)
    lc.prepare(model, "SmoothQuant(alpha=0.5, activations=4)", data)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model.train(), x, vectors(64, 0)[1]).backward()
    optimizer.step()
    shown = model.eval()(x)
    assert not torch.allclose(shown, plain, atol=1e-2)
    assert torch.equal(copy.deepcopy(model)(x), shown)
    assert torch.equal(lc.convert(model)(x), shown)
    tied = nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 4, bias=False))
    tied[1].weight = tied[0].weight
    with untouched(tied), pytest.raises(SchemeError, match="no inputs to round"):
        lc.prepare(tied, "[('*', SmoothQuant(alpha=0.5, activations=4))]", [torch.tensor([[0, 1, 2, 3]])])


def test_methods_that_read_statistics_read_data() -> None:
    x = vectors(64, 0)[0]
    model = lc.prepare(net(), "GPTQ(2, 'channel')", [x])
    direct, _ = lc.compress(net(), lc.parse("GPTQ(2, 'channel')"), [x])
    scale = relaxations(model)[0].weight.scale  # type: ignore[union-attr]
    assert torch.equal(scale.forward(), installed(direct)["0.weight"].scale.forward())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    "scheme", ["RTN(3, 'channel')", "KMeans(bits=2)", "Magnitude(0.5) >> KMeans(bits=2)", "LowRank(4)"]
)
def test_what_is_beside_the_codes_can_train_in_anybodys_loop(scheme: str, tmp_path: Path) -> None:
    """Scales, tables and factors are parameters of the module that an optimizer finds; w, codes and masks stay."""
    x, y = vectors(256, 100)
    model = lc.prepare(net(), scheme, trains="side")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    originals = {name for name in before if name.endswith(".original")}
    carried = {name for name in before if ".carried." in name}
    assert len(originals) == 3
    assert len(carried) >= 3
    start, _ = loss_of(model.eval(), x, y).detach(), model.train()
    train(model, 20)
    assert loss_of(model.eval(), x, y) < start - 0.01
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in originals), name
    again = lc.prepare(net(), scheme, trains="side")
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        shown = model.eval()(x)
        converted = lc.convert(again)
        assert torch.equal(converted(x), shown)
    codes = {name: weight.pack()[1] for name, weight in installed(converted).items()}
    direct = {name: weight.pack()[1] for name, weight in installed(lc.convert(lc.prepare(net(), scheme))).items()}
    for name, tensors in codes.items():
        moved = [part for part, tensor in tensors.items() if not torch.equal(tensor, direct[name][part])]
        assert moved
        assert not any(part in ("codes", "mask") or part.endswith(".codes") for part in moved), (name, moved)
    lc.save(converted, tmp_path)
    assert torch.equal(lc.load_into(net(), tmp_path).eval()(x), shown)


def test_what_can_train_is_named() -> None:
    with pytest.raises(SchemeError, match="prepare: trains should be 'w' or 'side', got 'all'"):
        lc.prepare(net(), "RTN(3, 'channel')", trains="all")  # type: ignore[arg-type]
