"""Architectures nobody listed: sites, chains, statistics and block-by-block running, against the models' own forward passes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from laconic.disk.originals import Checkpoint
from laconic.disk.skeletons import build_skeleton
from laconic.engine.losses import sampled_labels
from laconic.engine.shelf import Shelf
from laconic.engine.statistics import Statistics
from laconic.engine.survey import survey, survey_whole
from laconic.engine.walk import parameters_of, units, walk
from laconic.errors import CheckpointError
from laconic.model.blocks import BlockModel, InMemory, find_chain
from laconic.model.residence import Residence
from laconic.model.sites import NONE, Slot, Stats, find_slots
from tests.conftest import tiny_config

SIZE = dict(vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512)
EXPERTS = dict(num_experts_per_tok=2, intermediate_size=48, moe_intermediate_size=48, num_key_value_heads=2)
CONFIGS: dict[str, Any] = {
    "llama": lambda: tiny_config(),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "opt": lambda: transformers.OPTConfig(**SIZE, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZE, intermediate_size=96),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE, intermediate_size=96, num_key_value_heads=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZE, intermediate_size=96, num_key_value_heads=2, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZE, intermediate_size=96, num_key_value_heads=2, pad_token_id=0),
    "mamba": lambda: transformers.MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=3, state_size=8),
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48, num_key_value_heads=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZE, **EXPERTS, num_experts=4, head_dim=16),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZE, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48, num_key_value_heads=2, head_dim=16
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    config = CONFIGS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def batches(number: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 320, (2, 24), generator=generator), "use_cache": False} for _ in range(number)
    ]


def blocks_of(model: nn.Module) -> BlockModel:
    path = find_chain(model)
    assert path is not None
    return BlockModel(InMemory(model), path)


def test_the_blocks_are_found_and_compute_what_the_model_does(model: nn.Module) -> None:
    blocks = blocks_of(model)
    assert len(blocks) == 3
    before = [type(block) for block in blocks.blocks]
    calls = blocks.capture(batches())
    with torch.no_grad():
        for batch, call in zip(batches(), calls, strict=True):
            hidden = call.hidden
            for i in range(len(blocks)):
                hidden = blocks.run(i, hidden, call)
            assert torch.equal(blocks.tail(hidden, batch).logits, model(**batch).logits)
    assert [type(block) for block in blocks.blocks] == before, "the blocks are back in their places"


def test_every_matrix_of_a_block_is_a_site(model: nn.Module) -> None:
    slots = find_slots(model)
    found = {user for slot in slots for user in slot.users}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            matrix = (
                tensor.dim() == 2
                and min(tensor.shape) > 1
                and ("proj" in path or "attn" in path or "mlp" in path)
                and name == "weight"
            )
            if matrix and not path.endswith(("gate", "router", "x_proj")):
                assert (path, name) in found, f"{path}.{name} was not found"
    for slot in slots:
        W = slot.view.matrix(parameters_of(model, [slot])[slot])
        assert W.shape == slot.shape
        assert torch.equal(slot.view.restore(W), parameters_of(model, [slot])[slot])
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        tied = next(slot for slot in slots if slot.role == "embedding" and len(slot.users) > 1)
        assert len(tied.names) == 2


def reference_inputs(model: nn.Module, slots: list[Slot]) -> dict[Slot, torch.Tensor]:
    """X^T X / n of every linear site, from plain hooks on modules (the only kind of site hooks can see)."""
    sums: dict[Slot, torch.Tensor] = {}
    counts: dict[Slot, int] = {}
    handles = []
    for slot in slots:
        module = model.get_submodule(slot.users[0][0])
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], slot: Slot = slot) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                sums[slot] = sums.get(slot, 0) + x.T @ x
                counts[slot] = counts.get(slot, 0) + len(x)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {slot: sums[slot] / counts[slot] for slot in sums}


def test_statistics_are_those_of_the_inputs(model: nn.Module) -> None:
    blocks = blocks_of(model)
    slots = [slot for slot in find_slots(model) if slot.role == "body"]
    expected = reference_inputs(model, slots)
    needs = dict.fromkeys(slots, Stats.HESSIAN)
    seen = set()
    for stage in walk(blocks, batches(), slots, needs):
        for slot in stage.slots:
            assert stage.statistics is not None
            W = slot.view.matrix(parameters_of(model, [slot])[slot])
            site = stage.statistics.describe(slot, W, 0)
            if slot in expected:
                assert site.hessian is not None
                assert torch.allclose(site.hessian[0], expected[slot], rtol=1e-3, atol=1e-5), slot.name
                seen.add(slot)
    assert seen == set(expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_packed_experts_are_seen_one_by_one(name: str) -> None:
    """Each expert's Hessian is over the tokens routed to it; the counts of all experts add up to tokens x experts per token."""
    model = build(name)
    experts = [slot for slot in find_slots(model) if slot.view.lead == 2]
    assert len(experts) == 6
    blocks = blocks_of(model)
    for stage in walk(blocks, batches(), experts, dict.fromkeys(experts, Stats.HESSIAN)):
        for slot in stage.slots:
            assert stage.statistics is not None
            site = stage.statistics.describe(slot, slot.view.matrix(parameters_of(model, [slot])[slot]), 0)
            assert site.hessian is not None
            assert site.tokens is not None
            assert site.hessian.shape == (4, slot.columns, slot.columns)
            assert int(site.tokens.sum()) == 2 * 48 * 2
            used = site.tokens > 0
            assert (site.hessian.diagonal(dim1=1, dim2=2).sum(1)[used] > 0).all()
            assert (site.hessian[~used] == 0).all()


def test_the_output_of_a_matrix_view_is_the_layers_own() -> None:
    """y = W x with W [out, in] for every kind of layer, so a Hessian of x is the Hessian of W's rows."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    layer = transformers.pytorch_utils.Conv1D(8, 12)
    model = nn.Sequential(layer)
    slot = find_slots(model)[0]
    assert slot.shape == (8, 12)
    assert torch.allclose(layer(x), x @ slot.view.matrix(layer.weight).T + layer.bias, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 1, "same", "valid"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_the_patches_of_a_convolution(padding: Any, groups: int, dimensions: int) -> None:
    """W X^T of the patches is the convolution, for strides, paddings, dilations and groups; so X^T X / n is its Hessian."""
    kind, function = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}[dimensions]
    stride, dilation = (1 if isinstance(padding, str) else 2), 2
    layer = kind(8, 12, 3, padding=padding, groups=groups, stride=stride, dilation=dilation, bias=False)
    x = torch.randn(2, 8, *(11,) * dimensions, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer).requires_grad_(False)
    slot = find_slots(model)[0]
    seen: list[torch.Tensor] = []
    statistics = Statistics(parameters_of(model, [slot]), {slot: Stats.HESSIAN})
    original = statistics._seen
    statistics._seen = lambda s, p, *rest: (seen.append(p.inputs()), original(s, p, *rest))  # type: ignore[assignment, method-assign, func-returns-value]
    with torch.no_grad(), statistics.watch():
        y = model(x)
    W = slot.view.matrix(layer.weight).unflatten(0, (groups, -1))
    out = (W @ seen[0].transpose(1, 2)).unflatten(2, (2, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    assert torch.allclose(out, y.flatten(2), atol=1e-5)
    site = statistics.describe(slot, slot.view.matrix(layer.weight), 0)
    assert torch.allclose(site.hessian, seen[0].transpose(1, 2) @ seen[0] / seen[0].shape[1], atol=1e-5)  # type: ignore[arg-type]
    assert function is not None


def test_depthwise_convolutions_have_a_hessian_per_channel() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6)).requires_grad_(False)
    slot = find_slots(model)[0]
    assert (slot.groups, slot.shape) == (6, (6, 9))


def test_later_stages_see_earlier_ones_compressed() -> None:
    model = build("llama")
    blocks = blocks_of(model)
    slots = [slot for slot in find_slots(model) if slot.role == "body"]
    clean = reference_inputs(copy.deepcopy(model), slots)
    last = next(slot for slot in slots if slot.name == "model.layers.2.self_attn.q_proj")
    for stage in walk(blocks, batches(), slots, dict.fromkeys(slots, Stats.HESSIAN)):
        for slot in stage.slots:
            assert stage.statistics is not None
            if slot == last:
                H = stage.statistics.describe(slot, torch.empty(slot.shape), 0).hessian
                assert H is not None
                assert not torch.allclose(H[0], clean[last], rtol=1e-2)
                assert torch.allclose(H[0], reference_inputs(model, [last])[last], rtol=1e-3, atol=1e-5)
            if stage.part != "model.layers.2":
                parameters_of(model, [slot])[slot].data.mul_(0.8)


def test_true_sequential_makes_a_stage_of_each_shared_input() -> None:
    model = build("llama")
    slots = [slot for slot in find_slots(model) if slot.role == "body"]
    stages = list(walk(blocks_of(model), batches(1), slots, dict.fromkeys(slots, Stats.HESSIAN), true_sequential=True))
    names = [[slot.name.rsplit(".", 1)[-1] for slot in stage.slots] for stage in stages[:5]]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"], []]


def test_mean_and_largest_inputs_are_those_of_the_layers_inputs() -> None:
    """Against plain hooks, over all batches; of a convolution, of the patches it multiplies; and nothing is summed that was not asked for."""
    model = build("llama")
    slots = [slot for slot in find_slots(model) if slot.name.endswith(("q_proj", "up_proj", "down_proj"))]
    seen: dict[str, list[torch.Tensor]] = {}
    for slot in slots:
        model.get_submodule(slot.name).register_forward_pre_hook(
            lambda _, args, name=slot.name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
    statistics = Statistics(parameters_of(model, slots), dict.fromkeys(slots, Stats.MEAN | Stats.MAX))
    with torch.no_grad(), statistics.watch():
        for batch in batches(3):
            model(**batch)
    for slot in slots:
        site, x = statistics.describe(slot, torch.empty(slot.shape), 0), torch.cat(seen[slot.name])
        assert site.magnitude is not None
        assert site.peak is not None
        assert torch.allclose(site.magnitude[0], x.abs().mean(0), rtol=1e-4)
        assert torch.equal(site.peak[0], x.abs().amax(0))
        assert site.hessian is None
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    (slot,) = find_slots(conv)
    statistics = Statistics(parameters_of(conv, [slot]), {slot: Stats.MEAN | Stats.MAX | Stats.HESSIAN})
    images = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), statistics.watch():
        conv(images)
    site = statistics.describe(slot, torch.empty(slot.shape), 0)
    patches = F.unfold(images, 3, padding=1, stride=2).unflatten(1, (2, 18)).abs()
    assert torch.allclose(site.magnitude, patches.mean((0, 3)), rtol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(site.peak, patches.amax((0, 3)))  # type: ignore[arg-type]
    plain = Statistics(parameters_of(conv, [slot]), {slot: Stats.HESSIAN})
    with torch.no_grad(), plain.watch():
        conv(images)
    bare = plain.describe(slot, torch.empty(slot.shape), 0)
    assert bare.magnitude is None
    assert bare.peak is None


def test_slots_that_share_an_input_have_its_number_and_what_each_asked_for() -> None:
    """The first to be fed asks for least; none of the others is short of anything, and those whose sums are the same say so."""
    model = build("llama")
    slots = {slot.name.rsplit(".", 1)[-1]: slot for slot in find_slots(model) if "layers.0." in slot.name}
    needs = dict.fromkeys(slots.values(), Stats.HESSIAN | Stats.MEAN)
    needs |= {slots["q_proj"]: Stats.SQUARES, slots["v_proj"]: Stats.HESSIAN, slots["gate_proj"]: NONE}
    statistics = Statistics(parameters_of(model, list(slots.values())), needs)
    with torch.no_grad(), statistics.watch():
        for batch in batches():
            model(**batch)
    site = {name: statistics.describe(slot, torch.empty(slot.shape), 0) for name, slot in slots.items()}
    assert site["q_proj"].hessian is None
    assert site["k_proj"].hessian is not None
    assert site["v_proj"].hessian is site["k_proj"].hessian
    assert site["k_proj"].magnitude is not None
    assert site["q_proj"].squares is not None
    assert torch.allclose(site["k_proj"].hessian.diagonal(dim1=1, dim2=2), site["q_proj"].squares, rtol=1e-4)
    assert site["k_proj"].input == site["v_proj"].input
    assert len({site[name].input for name in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")}) == 5
    assert site["gate_proj"].input is None


def test_slots_that_share_an_input_share_one_gram_matrix() -> None:
    model = build("llama")
    slots = [slot for slot in find_slots(model) if "layers.0." in slot.name]
    stage = next(walk(blocks_of(model), batches(), slots, dict.fromkeys(slots, Stats.HESSIAN)))
    assert stage.statistics is not None
    assert len({id(gram) for gram in stage.statistics.grams.values()}) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_the_survey_sees_the_gradients_of_the_whole_model(name: str) -> None:
    """Fisher and output statistics, block by block with the backward pass re-run, equal those of one ordinary backward pass."""
    model = build(name)
    slots = find_slots(model)
    wanted = Stats.FISHER | Stats.OUTPUT_FISHER | Stats.HESSIAN
    single = [{"input_ids": batch["input_ids"][i : i + 1], "use_cache": False} for batch in batches() for i in range(2)]
    surveyed = {}
    for stage in survey(blocks_of(model), single, slots, dict.fromkeys(slots, wanted), seed=3, shelf=Shelf()):
        for slot in stage.slots:
            assert stage.statistics is not None
            surveyed[slot] = stage.statistics.describe(slot, torch.empty(slot.shape), 0)
    fisher = {slot: torch.zeros(slot.shape) for slot in slots}
    generator = torch.Generator().manual_seed(3)
    model.requires_grad_(True)
    for batch in single:
        model.zero_grad()
        sampled_labels(model(**batch), generator).backward()
        for slot in slots:
            fisher[slot] += slot.view.matrix(parameters_of(model, [slot])[slot].grad).square() / len(single)  # type: ignore[arg-type]
    for slot in slots:
        if slot.role == "body" and slot.view.lead == 1:
            assert torch.allclose(
                surveyed[slot].fisher, fisher[slot], rtol=1e-3, atol=1e-4 * float(fisher[slot].max())
            ), slot.name  # type: ignore[arg-type]
            assert (surveyed[slot].output_fisher > 0).any()  # type: ignore[operator]


def test_the_output_statistic_predicts_the_loss() -> None:
    """Half of sum_r g_r e_r^2 is what independent small noise on a site's output adds to the KL divergence, to second order."""
    model = build("llama").double()
    slot = next(s for s in find_slots(model) if s.name == "model.layers.1.mlp.down_proj")
    generator = torch.Generator().manual_seed(0)
    single = [{"input_ids": torch.randint(1, 320, (1, 24), generator=generator), "use_cache": False} for _ in range(24)]
    stages = survey(blocks_of(model), single, [slot], {slot: Stats.OUTPUT_FISHER}, seed=0, shelf=Shelf())
    g = next(s.statistics.describe(slot, torch.empty(slot.shape), 0).output_fisher for s in stages if s.slots == [slot])  # type: ignore[union-attr]
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    spread, found = 0.02, []

    def noise(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + spread * torch.randn(output.shape, generator=generator, dtype=output.dtype)

    with torch.no_grad():
        for batch in single:
            p = model(**batch).logits.log_softmax(-1)
            handle = module.register_forward_hook(noise)
            q = model(**batch).logits.log_softmax(-1)
            handle.remove()
            found.append((p.exp() * (p - q)).sum(-1).mean())
    predicted = 0.5 * spread**2 * float(g.sum())  # type: ignore[union-attr]
    assert float(torch.stack(found).mean()) == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (200, 8)])
def test_gradients_of_look_ups_count_for_the_rows_that_were_looked_up(rows: int, columns: int) -> None:
    """Mean over tokens of the mean square of a row's gradients; of rows of either length, more or fewer than there are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(rows, columns), nn.Linear(columns, 4)).requires_grad_(False)
        weights = torch.randn(6, 4)
    ids = torch.tensor([[0, 3, 3, 7, 9, 15]])
    slots = find_slots(model)
    needs = dict.fromkeys(slots, Stats.OUTPUT_FISHER)
    probe = lambda output, *_: (output[0] * weights).sum()  # noqa: E731
    stage = survey_whole(model, [ids], slots, needs, torch.device("cpu"), seed=0, probe=probe)
    assert stage.statistics is not None
    found = stage.statistics.describe(slots[0], torch.empty(rows, columns), 0).output_fisher
    assert found is not None
    expected = torch.zeros(rows).index_add_(0, ids[0], (weights @ model[1].weight).square().mean(1)) / 6
    assert torch.allclose(found, expected, rtol=1e-4)


def test_a_whole_model_that_is_no_chain_is_seen_unit_by_unit() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)),
        nn.Flatten(),
        nn.Linear(4 * 16, 10),
    )
    slots = find_slots(model)
    assert [(part, len(group)) for part, group in units(model, slots)] == [("0", 1), ("2.0", 1), ("2.1", 1), ("4", 1)]
    stage = survey_whole(
        model.requires_grad_(False), [torch.randn(2, 3, 8, 8)], slots, dict.fromkeys(slots, Stats.OUTPUT_FISHER | Stats.FISHER), torch.device("cpu"),
        seed=0,
    )  # fmt: skip
    assert stage.statistics is not None
    for slot in slots:
        site = stage.statistics.describe(slot, torch.empty(slot.shape), 0)
        assert site.fisher is not None
        assert site.fisher.shape == slot.shape
        assert site.output_fisher is not None
        assert (site.output_fisher > 0).any()


def test_a_list_of_blocks_that_is_no_chain_is_refused() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]

    blocks = blocks_of(Parallel())
    with pytest.raises(CheckpointError, match="do not form a chain"):
        blocks.capture([torch.randn(2, 8)])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skeleton_takes_no_memory_and_becomes_the_model_part_by_part(name: str, tmp_path: Path) -> None:
    """Saved as its own library saves it (experts unpacked, say) and read back block by block, it is the same model."""
    model = build(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    skeleton = checkpoint.skeleton
    big = [n for n, p in skeleton.named_parameters() if p.device.type != "meta" and p.numel() > 10_000]
    assert not big
    assert all(buffer.device.type == "cpu" for buffer in skeleton.buffers())
    path = find_chain(skeleton)
    residence = Residence(skeleton, checkpoint, path, torch.float32, torch.device("cpu"))
    blocks = BlockModel(residence, path or "")
    batch = batches(1)[0]
    calls = blocks.capture([batch])
    hidden = calls[0].hidden
    with torch.no_grad():
        for i in range(len(blocks)):
            with residence.hold(blocks.block_path(i)):
                held = {n for n, p in skeleton.named_parameters() if p.device.type != "meta"}
                assert held
                assert all(n.startswith(blocks.block_path(i) + ".") for n in held), "only this block is in memory"
                hidden = blocks.run(i, hidden, calls[0])
        with residence.hold(""):
            logits = blocks.tail(hidden, batch).logits
        assert all(p.device.type == "meta" for p in skeleton.parameters())
    assert torch.allclose(logits, model(**batch).logits, atol=1e-5)


def test_a_huge_skeleton_is_built_at_once() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
    )
    config.architectures = ["LlamaForCausalLM"]
    skeleton = build_skeleton(config)
    assert sum(p.numel() for p in skeleton.parameters()) > 4e11


def test_needs_of_nothing_run_nothing() -> None:
    """Methods without statistics never run the model: the chain is walked with weights alone."""
    model = build("llama")
    slots = [slot for slot in find_slots(model) if slot.role == "body"]
    blocks = blocks_of(model)
    blocks.run = lambda *_: pytest.fail("the model was run")  # type: ignore[assignment, method-assign]
    stages = list(walk(blocks, [], slots, dict.fromkeys(slots, NONE)))
    assert sum(len(stage.slots) for stage in stages) == len(slots)
