"""The law of the one loop: the same scheme, data and named statistics give the same weights in a module, a directory and a projection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.disk.store import Compressed
from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.model.sites import Stats
from laconic.recover.projection import project_onto
from laconic.weights import installed
from tests.methods.laws_methods import method  # noqa: F401 - a fixture: every method of the folder

STATISTICS = ("compressed", "original")
BATCHES, TOKENS = 4, 8


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Chain(nn.Module):
    """Two blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.tail = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64, bias=False),
        nn.Tanh(),
        nn.Linear(64, 32, bias=False),
        nn.Tanh(),
        nn.Linear(32, 16, bias=False),
    )


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(32, 32, generator=generator)
    return [torch.randn(16, 32, generator=generator) @ mixed for _ in range(BATCHES)]


def decoded(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.forward() for name, weight in installed(model).items()}


def needs_channels(one: Method) -> bool:
    allocation = one.allocation()
    return bool((one.wants | (allocation.wants if allocation is not None else Stats(0))) & Stats.CHANNELS)


def refused(work: Callable[[], object]) -> str:
    """What a scheme was refused for, if it was: shapes that a method cannot treat."""
    try:
        work()
    except SchemeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("make", [plain, Chain])
def test_a_module_and_the_projection_find_the_same_weights(
    make: Callable[[], nn.Module],
    statistics: Any,
    method: Method,  # noqa: F811
) -> None:
    """Exactly: the sums run over the same batches in the same order, and one loop solves both.

    Methods of structures are refused where a module is compressed; a projection alone can look for channels.
    """
    scheme, model = [("*", method)], seeded(make)
    if needs_channels(method):
        with pytest.raises(SchemeError, match="one channel"):
            lc.compress(model, scheme, batches(), statistics=statistics)
        return
    if refusal := refused(lambda: project_onto(model, scheme, data=batches(), statistics=statistics)):
        assert refused(lambda: lc.compress(model, scheme, batches(), statistics=statistics)) == refusal
        return
    projection = project_onto(model, scheme, data=batches(), statistics=statistics)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in seeded(make).state_dict().items())
    values = {slot: model.get_submodule(slot.users[0][0]).get_parameter("weight").detach() for slot in projection.slots}
    weights = {slot.parameter: weight.forward() for slot, weight in projection.compress(values).items()}
    found = decoded(lc.compress(model, scheme, batches(), statistics=statistics)[0])
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("statistics", STATISTICS)
def test_direct_compression_is_that_of_the_same_statistics(statistics: Any) -> None:
    """`recover` with `Direct` gives what `compress` gives, if both are told the same."""
    scheme, model, data = lc.parse("[('*', GPTQ(bits=3, group=16))]"), seeded(Chain), batches()
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in data]
    held_out = [(batch + 1, labels) for batch, labels in labelled]
    recovered, found = lc.recover(
        model, scheme, lc.Direct(), train=labelled, validation=held_out, statistics=statistics
    )
    ours, theirs = decoded(recovered), decoded(lc.compress(seeded(Chain), scheme, data, statistics=statistics)[0])
    assert found.statistics == statistics
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_the_two_statistics_differ_behind_the_first_layer() -> None:
    """The option does something: the first layer's inputs are the data in both, every later one's are not."""
    found = [
        decoded(lc.compress(seeded(Chain), "[('*', GPTQ(bits=2, group=16))]", batches(), statistics=statistics)[0])
        for statistics in STATISTICS
    ]
    assert torch.equal(found[0]["front.weight"], found[1]["front.weight"])
    assert not torch.equal(found[0]["tail.weight"], found[1]["tail.weight"])


def test_what_the_statistics_are_of_is_checked_before_the_work() -> None:
    with pytest.raises(SchemeError, match="expected 'compressed' or 'original', got 'both'"):
        lc.compress(seeded(plain), "RTN(4, 'channel')", statistics="both")
    with pytest.raises(SchemeError, match="give one of the two"):
        lc.compress(seeded(plain), "RTN(4, 'channel')", statistics="original", true_sequential=True)
    with pytest.raises(SchemeError, match="expected 'compressed' or 'original'"):
        project_onto(seeded(plain), lc.parse("RTN(4, 'channel')"), statistics="neither")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks in a directory."""
    folder = tmp_path_factory.mktemp("language")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def windows() -> list[dict[str, Any]]:
    """One batch, so that the directory, the module and the projection sum over the same tokens in the same order."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(64, (BATCHES, TOKENS), generator=generator), "use_cache": False}]


DIRECTORY = (
    "GPTQ(bits=3, group=16)",
    "RTN(bits=3, group=16)",
    "Wanda(0.5)",
    "AWQ(bits=3, group=16)",
    "GPTQ(bits=2, group=16) + EoRA(rank=2)",
)


@pytest.mark.parametrize("scheme", DIRECTORY)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_a_directory_gives_what_a_module_gives(scheme: str, statistics: Any, language: Path, tmp_path: Path) -> None:
    """A block at a time from files, or whole in memory: the hidden states are the same to the order of a few sums.

    So a value may fall on the other side of a rounding boundary, as an error of 1e-7 can decide: nearly all entries are equal, the rest a
    step apart.
    """
    plan = f"[('lm_head', Keep()), ('*embed*', Keep()), ('*', {scheme})]"
    lc.compress(
        language, plan, windows(), out=tmp_path / "out", samples=BATCHES, length=TOKENS, statistics=statistics, evaluate=False
    )  # fmt: skip
    stored = Compressed(tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(language)
    found = decoded(lc.compress(model, plan, windows(), statistics=statistics)[0])
    assert found.keys() == set(stored.weights)
    for name, expected in found.items():
        same = (stored.weight(name).forward() - expected).abs() <= 1e-5 * expected.abs().max()
        assert same.float().mean() > 0.98, name


def test_an_interrupted_directory_with_statistics_of_the_original_goes_on_to_the_same_bytes(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that are finished are not what the inputs of later ones have passed through."""
    import laconic.disk.output as output

    scheme = "[('lm_head', Keep()), ('*embed*', Keep()), ('*', GPTQ(bits=2, group=16))]"
    options = {"samples": BATCHES, "length": TOKENS, "statistics": "original", "evaluate": False}
    lc.compress(language, scheme, windows(), out=tmp_path / "whole", **options)
    written, atomically = [], output.atomically

    def dying(*arguments: Any) -> None:
        written.append(arguments[0])
        if len(written) == 2:
            raise KeyboardInterrupt
        atomically(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output, "atomically", dying)
        with pytest.raises(KeyboardInterrupt):
            lc.compress(language, scheme, windows(), out=tmp_path / "cut", **options)
    for file in (tmp_path / "cut" / ".laconic").glob("hidden-*"):
        file.unlink()
    with pytest.raises(lc.OutputError, match="another kind"):
        lc.compress(
            language, scheme, windows(), out=tmp_path / "cut", resume=True, **options | {"statistics": "compressed"}
        )
    lc.compress(language, scheme, windows(), out=tmp_path / "cut", resume=True, **options)
    for name in ("model.safetensors", "laconic.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
