"""Chains of blocks: which lists are one, and what is done with a model whose blocks are wired in another way."""

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laconic as lc
from laconic.disk.skeletons import build_skeleton
from laconic.engine.preflight import load_of, plan_directory, preflight
from laconic.engine.shelf import Shelf
from laconic.engine.survey import survey, survey_whole
from laconic.engine.walk import parameters_of
from laconic.host.progress import Log
from laconic.model.batches import examples_in
from laconic.model.blocks import BlockModel, InMemory, find_chain, open_chain
from laconic.model.calling import call
from laconic.model.sites import Site, Slot, Stats, find_slots
from laconic.pipeline import Options, compress_directory
from laconic.recover.projection import project_onto
from tests.conftest import tiny_config

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """A stem, blocks that `wiring` runs, a head."""

    def __init__(
        self, wiring: Callable[["Net", Tensor], Tensor], block: type[nn.Module] = Block, blocks: int = 3
    ) -> None:
        super().__init__()
        self.stem, self.head, self.extra = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wiring(self, self.stem(x)))


def straight(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return x


def by_another_name(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x=x)
    return x


def reading_on_the_way(net: Net, x: Tensor) -> Tensor:
    states = []
    for block in net.blocks:
        x = block(x)
        states.append(x)
    return torch.stack(states).sum(0)


def twice(net: Net, x: Tensor) -> Tensor:
    return straight(net, straight(net, x))


def skipping(net: Net, x: Tensor) -> Tensor:
    return net.blocks[2](net.blocks[0](x))


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
        x += 1
    return x


def backwards(net: Net, x: Tensor) -> Tensor:
    for block in reversed(list(net.blocks)):
        x = block(x)
    return x


class Beside(Block):
    """Returns the hidden state second."""

    def forward(self, x: Tensor) -> Any:
        return self.up(x), super().forward(x)


class Travelling(Block):
    """Gives something to the next block beside the hidden state."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        bias = torch.tanh(self.up(x)).mean() if bias is None else bias
        return super().forward(x) + bias, bias


class Writing(Block):
    """Writes to a dict that later blocks read."""

    def forward(self, x: Tensor, store: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x) + store.setdefault("first", torch.tanh(x).mean())


class Named(Block):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": super().forward(x)}


class Guided(Block):
    """Is given what weights outside the chain computed."""

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + guide


def second_of_two(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)[1]
    return x


def with_a_bias(net: Net, x: Tensor) -> Tensor:
    bias = None
    for block in net.blocks:
        x, bias = block(x, bias)
    return x


def with_a_store(net: Net, x: Tensor) -> Tensor:
    store: dict[str, Tensor] = {}
    for block in net.blocks:
        x = block(x, store)
    return x


def from_a_dict(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)["hidden"]
    return x


def guided(net: Net, x: Tensor) -> Tensor:
    guide = net.extra(x)
    for block in net.blocks:
        x = block(x, guide=guide)
    return x


NO_CHAINS: dict[str, tuple[Callable[[Net, Tensor], Tensor], type[nn.Module]]] = {
    "states read on the way": (reading_on_the_way, Block), "called twice": (twice, Block), "a block skipped": (skipping, Block),
    "changed in place between": (changed_in_place, Block), "backwards": (backwards, Block), "hidden state second": (second_of_two, Beside),
    "a bias travels": (with_a_bias, Travelling), "a store is shared": (with_a_store, Writing), "dicts": (from_a_dict, Named),
    "guided from outside": (guided, Guided),
}  # fmt: skip


def net(wiring: Callable[[Net, Tensor], Tensor], block: type[nn.Module] = Block, **sizes: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(wiring, block, **sizes).requires_grad_(False)


def inputs(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 6, 4, generator=generator) for _ in range(batches)]


@pytest.mark.parametrize("kind", NO_CHAINS)
@pytest.mark.parametrize("scheme", ["GPTQ(rate=5)", "GPTQ(bits=6, group='channel')"])
def test_blocks_wired_in_another_way_are_run_whole_and_the_notes_say_so(kind: str, scheme: str) -> None:
    """The check finds it without comparing outputs (all that is possible on disk), and the compressed model is close to the original."""
    wiring, block = NO_CHAINS[kind]
    model: nn.Module = net(wiring, block)
    blocks, why = open_chain(OnDisk(model), find_chain(model), inputs()[0])
    assert blocks is None
    assert "do not form a chain" in why
    before = model(inputs()[0])
    model, report = lc.compress(model, scheme, inputs())
    assert any("do not form a chain" in note for note in report.notes)
    assert float((model(inputs()[0]) - before).norm() / before.norm()) < 0.15


class OnDisk(InMemory):
    """A residency whose models are only looked at part by part."""

    whole = False


@pytest.mark.parametrize("wiring", [straight, by_another_name])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_chain_is_one_whatever_its_length_and_names(wiring: Callable[[Net, Tensor], Tensor], blocks: int) -> None:
    model = net(wiring, blocks=blocks)
    found, why = open_chain(InMemory(model), find_chain(model), inputs()[0])
    assert why == ""
    assert found is not None
    assert len(found) == blocks


def test_a_cache_that_blocks_write_to_is_empty_in_every_run() -> None:
    """A language model called without `use_cache=False` hands its blocks a cache; running a block twice gives the same twice."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32).eval()
    batch = {"input_ids": torch.arange(1, 25).view(1, 24)}
    blocks = BlockModel(InMemory(model), "model.layers")
    calls = blocks.capture([batch])[0]
    with torch.no_grad():
        assert torch.equal(blocks.run(1, calls.hidden, calls), blocks.run(1, calls.hidden, calls))


def test_output_heads_do_not_count_against_the_chain() -> None:
    """The shape of pythia-70m: 51 of 70 million entries are the two tables."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    config.architectures = ["GPTNeoXForCausalLM"]
    assert find_chain(build_skeleton(config)) == "gpt_neox.layers"

    class Plain(nn.Module):
        """A language model of plain PyTorch, which names no head."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks, self.out = (
                nn.Embedding(500, WIDTH),
                nn.ModuleList([Block()]),
                nn.Linear(WIDTH, 500),
            )

    assert find_chain(Plain()) == "blocks"


def test_gradients_reach_what_lies_before_the_chain() -> None:
    """Statistics of a survey block by block are those of one backward pass over the whole model, stem and head included."""
    model, batches = net(straight), inputs(4)
    slots = find_slots(model)
    slots = [slot for slot in slots if not slot.name.startswith("extra")]
    needs = dict.fromkeys(slots, Stats.HESSIAN | Stats.OUTPUT_FISHER | Stats.FISHER)

    def probe(output: Tensor, *_: object) -> Tensor:
        return output.square().sum()

    surveyed: dict[Slot, Site] = {}
    for stage in survey(
        BlockModel(InMemory(model), "blocks"), batches, slots, needs, seed=0, shelf=Shelf(), probe=probe
    ):
        assert stage.statistics is not None
        surveyed |= {slot: stage.statistics.describe(slot, torch.empty(slot.shape), 0) for slot in stage.slots}
    whole = survey_whole(model, batches, slots, needs, torch.device("cpu"), seed=0, probe=probe).statistics
    assert whole is not None
    assert set(surveyed) == set(slots)
    for slot in slots:
        site = whole.describe(slot, torch.empty(slot.shape), 0)
        for name in ("hessian", "output_fisher", "fisher"):
            value, expected = getattr(surveyed[slot], name), getattr(site, name)
            assert value is not None, f"{slot.name} {name}"
            assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), (
                f"{slot.name} {name}"
            )
    assert all(not p.requires_grad for p in model.parameters())


def test_sites_before_the_chain_are_compressed_before_it() -> None:
    """The blocks' statistics are those of hidden states that passed through the compressed stem."""
    model: nn.Module = net(straight)
    model, report = lc.compress(model, "GPTQ(bits=2, group='channel')", inputs())
    names = [site["name"] for site in report.sites]
    assert names.index("stem") < names.index("blocks.0.up") < names.index("head")


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda ids: {"input_ids": ids, "use_cache": False}, "user dict": lambda ids: UserDict(input_ids=ids),
    "batch encoding": lambda ids: transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    "tensor": lambda ids: ids, "tuple": lambda ids: (ids, torch.zeros(1)), "list": lambda ids: [ids],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["GPTQ(rate=3)", "KMeans(bits=3, weights='fisher')"])
def test_gradient_statistics_of_a_language_model_under_any_kind_of_batch(way: str, scheme: str) -> None:
    """A projection (what `recover` and `search` compress with) runs the model whole, on integer ids, under no trained parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            tiny_config(num_hidden_layers=1), dtype=torch.float32
        ).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [WAYS[way](torch.randint(1, 320, (2, 16), generator=generator)) for _ in range(2)]
    assert examples_in(batches[0]) == 2
    assert call(model, batches[0]).logits.shape == (2, 16, 320)
    flags = [p.requires_grad for p in model.parameters()]
    projection = project_onto(model, lc.parse(scheme), data=batches)
    weights = projection.compress({slot: p.detach() for slot, p in parameters_of(model, projection.slots).items()})
    assert set(weights) == set(projection.slots)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


class Planned(Log):
    """Keeps the plan that is told."""

    def plan(self, preflight: dict[str, Any]) -> None:
        self.told = preflight


def test_a_model_that_is_run_whole_is_told_with_the_memory_of_that(tmp_path: Path) -> None:
    """The list of blocks of an encoder-decoder is no chain, which the data shows before the plan is told."""
    size = dict(
        vocab_size=64,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    config = transformers.BartConfig(**size, encoder_layers=1, decoder_layers=6, max_position_embeddings=64)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    ids = torch.arange(32).reshape(2, 16)
    options = Options(data=[{"input_ids": ids, "decoder_input_ids": ids + 1}] * 4, samples=4, length=16)
    source, scheme = tmp_path / "model", lc.parse("GPTQ(4, 'channel')")
    checkpoint, chosen, plan = plan_directory(source, scheme, options, Log())
    assert find_chain(checkpoint.skeleton) == "model.decoder.layers"
    progress = Planned()
    compress_directory(source, scheme, tmp_path / "out", options, progress)
    expected = preflight(checkpoint, chosen, load_of(checkpoint, chosen, options), None)["stages"]
    told = {name: stage["bytes"] for name, stage in progress.told["stages"].items()}
    assert told == {name: stage["bytes"] for name, stage in expected.items()}
    assert told["compression"] > plan["stages"]["compression"]["bytes"]
    assert told["evaluation"] > plan["stages"]["evaluation"]["bytes"]
