"""What a caller has set for all of torch changes no byte, and nothing of it is changed."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laconic as lc
from laconic.errors import CheckpointError


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def moved_generators() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        yield


STATES: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16), "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16), "no_grad": torch.no_grad, "inference": torch.inference_mode,
    "meta": lambda: torch.device("meta"), "deterministic": deterministic, "generators": moved_generators,
}  # fmt: skip
SCHEMES = [
    "GPTQ(rate=4.0)", "GPTQ(bits=3, group=16)", "Hadamard(GPTQ(bits=4, group=16)) + EoRA(rank=4)", "KMeans(bits=3, weights='fisher')",
    "AWQ(bits=4, group=16)", "SparseGPT(0.5, '2:4') >> RTN(4, 'channel')", "LowRank(8, factors=RTN(8, 'channel'))",
]  # fmt: skip


class Net(nn.Module):
    """Layers of several kinds, one of which draws numbers when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(32, 64), nn.Conv1d(64, 48, 3, padding=1), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) + 0.01 * torch.rand(x.shape[0], 64)
        return self.last(self.conv(y.t()).t())


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def batches() -> list[Tensor]:
    return [torch.randn(40, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "laconic.json")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The bytes of every scheme with nothing set."""
    found = {}
    for i, scheme in enumerate(SCHEMES):
        folder = tmp_path_factory.mktemp(f"expected{i}")
        lc.save(lc.compress(net(), scheme, batches())[0], folder)
        found[scheme] = files(folder)
    return found


@pytest.mark.parametrize("state", STATES)
def test_a_module_is_compressed_to_the_same_bytes(
    state: str, expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for i, scheme in enumerate(SCHEMES):
        model, data, fresh = net(), batches(), net()
        with STATES[state]():
            before = generators(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            lc.compress(model, scheme, data)
            lc.save(model, tmp_path / str(i))
            lc.load_into(fresh, tmp_path / str(i))
            assert before == (
                generators(),
                torch.get_default_dtype(),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
            )
        assert files(tmp_path / str(i)) == expected[scheme], scheme
        assert all(
            torch.equal(fresh.get_submodule(name).weight, model.get_submodule(name).weight)
            for name in ("first", "conv", "last")
        )  # type: ignore[arg-type]
        assert not any(p.is_inference() for p in (*model.parameters(), *fresh.parameters()))


FEW: dict[str, Any] = {"samples": 2, "length": 32, "test_tokens": 128}


@pytest.fixture(scope="module")
def directory(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory compressed with nothing set, and its report."""
    folder = tmp_path_factory.mktemp("directory") / "out"
    return folder, lc.compress(str(tiny), "GPTQ(rate=4.0)", out=str(folder), data=str(text), **FEW)


@pytest.mark.parametrize(
    "states", [["bfloat16", "autocast", "no_grad"], ["float64", "inference"], ["meta", "deterministic"]], ids=" ".join
)
def test_a_directory_is_compressed_and_loaded_to_the_same_bytes(
    states: list[str], tiny: Path, text: Path, directory: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, plain = directory
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(STATES[state]())
        before = generators()
        report = lc.compress(str(tiny), "GPTQ(rate=4.0)", out=str(tmp_path / "out"), data=str(text), **FEW)
        loaded = lc.load(tmp_path / "out", dtype=torch.float32)
        assert generators() == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert report.metrics == plain.metrics
    again = lc.load(folder, dtype=torch.float32)
    assert all(
        torch.equal(one, two)
        for one, two in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("data", ["self", "none"])
def test_a_directory_leaves_the_random_generators_alone(data: str, tiny: Path, tmp_path: Path) -> None:
    before = generators()
    scheme = "GPTQ(bits=4, group=32)" if data == "self" else "RTN(4, 32)"
    lc.compress(str(tiny), scheme, out=str(tmp_path / "out"), samples=2, length=16, evaluate=False)
    lc.load(tmp_path / "out")
    assert generators() == before


def test_an_installed_weight_decodes_to_the_same_under_autocast() -> None:
    model, _ = lc.compress(net(), "LowRank(8) + RTN(3, 16)")
    plain = model.first.weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.first.weight, plain)


def test_batches_made_in_inference_mode_are_usable() -> None:
    with torch.inference_mode():
        data = batches()
    first, second = (lc.compress(net(), "KMeans(bits=3, weights='fisher')", given)[0] for given in (data, batches()))
    assert torch.equal(first.first.weight, second.first.weight)


def test_a_module_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"first.weight: was made under torch.inference_mode"):
        lc.compress(model, "RTN(4, 16)")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
