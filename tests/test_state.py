"""What `lc.save` stores of a module: all that is not ours, whatever makes it, or a refusal by name; never a part of it without a word."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import laconic as lc
from laconic.disk.store import MANIFEST
from laconic.errors import CheckpointError, SchemeError
from laconic.weights import bake
from tests.conftest import tiny_config

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))


class Doubled(nn.Module):
    """A user's parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(2.0))

    def forward(self, w: Tensor) -> Tensor:
        return w * self.by


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16))


def spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 16))


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 16)), nn.Linear(16, 16))


def beside_ours() -> nn.Module:
    """The bias of a compressed layer has a parametrization of the user's."""
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    parametrize.register_parametrization(net[0], "bias", Doubled())
    return net


class Tied(nn.Module):
    """A tie across two layers, and a buffer that is a view of a parameter's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(16, 16), nn.Linear(16, 16), nn.Parameter(torch.rand(32))
        self.two.weight = self.one.weight
        self.two.bias = self.one.bias
        self.register_buffer("head", self.scale.data[:16])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) * self.head + self.scale[16:]


class Odd(nn.Module):
    """Tensors of no entries, of one, of integers, complex ones, and a conjugate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        for name, value in {
            "none": torch.zeros(0, 3),
            "one": torch.rand(()),
            "ids": torch.arange(5),
            "waves": torch.rand(16) * (1 + 2j),
        }.items():
            self.register_buffer(name, value)
        self.register_buffer("conjugate", (torch.rand(16) * (1 + 2j)).conj())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.one + (self.waves * self.conjugate).imag


class Stateful(nn.Module):
    """Extra state that is a tensor, and one that is none."""

    def __init__(self, as_tensor: bool = True) -> None:
        super().__init__()
        self.fc, self.count, self.as_tensor = nn.Linear(16, 16), 3.0, as_tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.count

    def get_extra_state(self) -> Any:
        return torch.tensor(self.count) if self.as_tensor else {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = float(state)


class Turned(nn.Linear):
    """A layer whose state dict has its weight the other way round."""

    def __init__(self, takes: bool = True) -> None:
        super().__init__(16, 16)
        self.scale = nn.Parameter(torch.rand(16, 16))
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({prefix + "scale": state[prefix + "scale"].t().clone()})
        )
        if takes:
            self.register_load_state_dict_pre_hook(
                lambda module, state, prefix, *_: state.update({prefix + "scale": state[prefix + "scale"].t().clone()})
            )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.scale


def deep() -> nn.Module:
    """A parametrization that holds a layer, which is compressed."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, w: Tensor) -> Tensor:
            return w + self.fc(w)

    net = nn.Sequential(nn.Linear(16, 16))
    parametrize.register_parametrization(net[0], "weight", Through())
    return net


NETS = [
    weight_norm,
    spectral_norm,
    orthogonal,
    beside_ours,
    Tied,
    Odd,
    Stateful,
    lambda: nn.Sequential(Turned()),
    deep,
    lambda: nn.LSTM(16, 16, 2),
]


def build(make: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        found = net(X)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("scheme", ["RTN(4, 'channel')", "Keep()"])
def test_everything_comes_back(make: Any, scheme: str, tmp_path: Path) -> None:
    net = build(make, 0)
    if isinstance(net, Stateful):
        net.count = 0.5
    lc.compress(net, scheme)
    lc.save(net, tmp_path)
    other = build(make, 1)
    before = output(other)
    lc.load_into(other, tmp_path)
    assert torch.equal(output(other), output(net))
    assert not torch.equal(before, output(net)), "it was another net"


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    def with_buffer(value: Any) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4))
        net[0].register_buffer("odd", value)
        return net

    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            destination[prefix + "weight"] = self.weight

    beside = nn.Sequential(nn.Linear(4, 4))
    lc.compress(beside, "RTN(4, 'channel')")
    parametrize.register_parametrization(beside[0], "weight", nn.Identity())
    named = nn.Sequential(nn.Linear(4, 4))
    named.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({"0.weight.codes": torch.zeros(2)})
    )
    numbered = nn.Sequential(nn.Linear(4, 4))
    numbered.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({5: torch.zeros(2)}))
    refused = {
        "extra state": (Stateful(as_tensor=False), "_extra_state.*dict"), "lazy": (nn.Sequential(nn.LazyLinear(4)), "lazy"),
        "meta": (nn.Sequential(nn.Linear(4, 4, device="meta")), "meta device"),
        "sparse": (with_buffer(torch.eye(4).to_sparse()), "0.odd.*sparse"), "complex": (with_buffer(torch.zeros(2).cdouble()), "complex128"),
        "left out": (nn.Sequential(Packed(4, 4)), "0.bias.*leaves it out"), "on top": (beside, "beside its compressed weight"),
        "name": (numbered, "5"),
    }  # fmt: skip
    for what, (net, message) in refused.items():
        with pytest.raises(SchemeError, match=message):
            lc.save(net, tmp_path / what)
        assert not (tmp_path / what).exists(), what
    lc.compress(named, "RTN(4, 'channel')")
    with pytest.raises(SchemeError, match="beside the compressed weight 0.weight"):
        lc.save(named, tmp_path / "collision")


def test_a_module_that_does_not_take_what_was_stored(tmp_path: Path) -> None:
    lc.save(build(lambda: nn.Sequential(Turned()), 0), tmp_path / "turned")
    with pytest.raises(CheckpointError, match="did not take the stored 0.scale"):
        lc.load_into(build(lambda: nn.Sequential(Turned(takes=False)), 1), tmp_path / "turned")
    lc.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="to_empty"):
        lc.load_into(nn.Sequential(nn.Linear(4, 4, device="meta")), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="lazy"):
        lc.load_into(nn.Sequential(nn.LazyLinear(4)), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="int64"):
        lc.load_into(
            nn.Sequential(nn.Linear(4, 4)), _with(tmp_path / "plain", tmp_path / "typed", {"0.bias": torch.arange(4)})
        )
    with pytest.raises(CheckpointError, match="does not store 0.bias"):
        lc.load_into(nn.Sequential(nn.Linear(4, 4)), _with(tmp_path / "plain", tmp_path / "less", {"0.bias": None}))
    with pytest.raises(CheckpointError, match="stores more, which"):
        lc.load_into(
            nn.Sequential(nn.Linear(4, 4)), _with(tmp_path / "plain", tmp_path / "more", {"more": torch.zeros(2)})
        )


def _with(source: Path, out: Path, changes: dict[str, Tensor | None]) -> Path:
    """A saved directory with other tensors in it, as a writer that gives no checksums would have made it."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, out / "model.safetensors")
    manifest = json.loads((source / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({key: manifest[key] for key in ("format", "schema", "weights", "specs")}))
    return out


def test_a_tie_in_the_module_and_none_in_the_file(tmp_path: Path) -> None:
    """One value for both, or a refusal; and the other way round."""

    def pair(tied: bool) -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        if tied:
            net[1].weight = net[0].weight
        return net

    for scheme in ("Keep()", "RTN(4, 'channel')"):
        apart = pair(False)
        lc.compress(apart, scheme)
        lc.save(apart, tmp_path / f"apart {scheme}")
        with pytest.raises(CheckpointError, match="as two tensors, the module has one"):
            lc.load_into(pair(True), tmp_path / f"apart {scheme}")
        tied = pair(True)
        lc.compress(tied, scheme)
        lc.save(tied, tmp_path / f"tied {scheme}")
        with pytest.raises(CheckpointError, match="does not store 1.weight"):
            lc.load_into(pair(False), tmp_path / f"tied {scheme}")
    same = pair(False)
    same[1].weight.data = same[0].weight.data
    lc.save(same, tmp_path / "equal")
    loaded = lc.load_into(pair(True), tmp_path / "equal")
    assert torch.equal(loaded[1].weight, same[0].weight)


def test_buffers_that_are_not_stored_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Masked(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4,), by), persistent=False)

    net = Masked(1.0)
    lc.save(net, tmp_path)
    with caplog.at_level(logging.WARNING, "laconic"):
        lc.load_into(Masked(1.0), tmp_path)
        assert "not persistent" not in caplog.text
        lc.load_into(Masked(0.5), tmp_path)
    assert "mask is not persistent" in caplog.text


def test_a_folder_is_saved_into_again(tmp_path: Path) -> None:
    """What an earlier model left there, ours or another's, is not read in its place."""
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    for _ in range(2):
        net = nn.Sequential(nn.Linear(8, 8))
        lc.compress(net, "RTN(4, 'channel')")
        lc.save(net, tmp_path)
        loaded = lc.load_into(nn.Sequential(nn.Linear(8, 8)), tmp_path)
        assert torch.equal(loaded[0].weight, net[0].weight)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_save_pretrained_of_a_compressed_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    """transformers would read such a directory with every matrix made up anew; a baked model is an ordinary one again."""
    made = transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    lc.compress(made, "RTN(4, 32)")
    lc.save(made, tmp_path / "ours")
    loaded = lc.load_into(transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1)), tmp_path / "ours")
    inside = nn.Sequential()
    inside.add_module("lm", copy.deepcopy(made))
    for model in (made, loaded, copy.deepcopy(made), inside.lm):
        with pytest.raises(SchemeError, match="weight is a compressed weight"):
            model.save_pretrained(tmp_path / "theirs")
        assert not (tmp_path / "theirs").exists()
    bake(made)
    made.save_pretrained(tmp_path / "dense")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made(ids).logits)
