"""A prepared module in two processes: replicated, sharded or tensor-parallel, it is the one that a single process trains."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import laconic as lc
from laconic.errors import SchemeError
from laconic.weights import installed
from tests.processes import PATIENCE, THREADS, halves_of
from tests.recover.nets import seeded

SCHEMES = [
    "[('*', DKM(bits=2, tau=0.2, tau_end=0.02))]",
    "[('*', DKM(bits=2, rows=8, row_scale=True))]",
    "[('*', Magnitude(0.5) >> DKM(bits=2))]",
    "[('*', RTN(4, 'channel'))]",
]
BACK = SCHEMES[-2:]
SIDE = "[('blocks.0*', KMeans(bits=3)), ('*', RTN(4, 'channel'))]"
KINDS = ["ddp", "fsdp", "fsdp, checkpointed, two minibatches a step", "tensor parallel"]
STEPS = 3
_TOKENS = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An embedding tied to the output with blocks in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(2))
        self.head.weight = self.table.weight
        self.again = False

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        for block in self.blocks:
            h = h + (checkpoint(block, h, use_reentrant=False) if self.again else block(h))
        return self.head(h)


def net(seed: int = 0) -> Net:
    return seeded(lambda: Net().double(), seed)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: nn.Module, run: nn.Module, parts: list[Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for step in range(STEPS):
        lc.advance(model, step / STEPS)
        optimizer.zero_grad()
        for part in parts:
            (loss_of(run, part) / len(parts)).backward()
        optimizer.step()


def alone(scheme: str) -> Net:
    model = lc.prepare(net(), scheme)
    train(model, model, [_TOKENS])
    assert isinstance(model, Net)
    return model


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    assert isinstance(model, Net)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def tensor_parallel() -> Net:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {f"blocks.{i}.{j}": ColwiseParallel() if j == 0 else RowwiseParallel() for i in range(2) for j in (0, 2)}
    return parallelize_module(net(), init_device_mesh("cpu", (2,)), plan)  # type: ignore[return-value]


def tuned(kind: str, mine: Tensor) -> dict[str, Any]:
    """The gathered state after training of scales and tables, codes as they are, in float32 as those are."""
    model = lc.prepare(net().float(), SIDE, trains="side")
    run = sharded(model) if kind == "fsdp" else DistributedDataParallel(model)
    train(model, run, [mine], torch.optim.SGD(model.parameters(), 0.01))  # steps of scales count in every weight
    return full_state(model)


def full_state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def together(kind: str, scheme: str, rank: int) -> tuple[dict[str, Any], Tensor]:
    """The gathered state after training, and what every process computes in evaluation mode."""
    mine = _TOKENS.chunk(2)[rank]
    if kind == "tensor parallel":
        model = lc.prepare(tensor_parallel(), scheme)
        train(model, model, [_TOKENS])
    elif kind == "ddp":
        model = lc.prepare(net(), scheme)
        train(model, DistributedDataParallel(model), [mine])
    else:
        model = sharded(lc.prepare(net(), scheme))
        model.again = "checkpointed" in kind  # type: ignore[assignment]
        train(model, model, list(mine.chunk(2)) if "two" in kind else [mine])
    with torch.no_grad():
        seen = model.eval()(_TOKENS)
    return full_state(model), seen


def back_into_shards(scheme: str) -> bool:
    """A gathered state goes on in a sharded module, loaded by one process for all."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    models = [sharded(lc.prepare(net(seed), scheme)) for seed in (0, 1)]
    train(models[0], models[0], [_TOKENS])
    state = full_state(models[0])
    set_model_state_dict(models[1], state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for model in models:
        train(model, model, [_TOKENS])
    one, other = (full_state(model) for model in models)
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def refusals() -> list[str]:
    told = []
    plain = sharded(net())
    attempts = [
        lambda: lc.convert(sharded(lc.prepare(net(), SCHEMES[0]))),
        lambda: lc.prepare(plain, SCHEMES[0]),
        lambda: lc.prepare(tensor_parallel(), "[('*', GPTQ(4, 'channel'))]", [_TOKENS]),
    ]
    for attempt in attempts:
        with pytest.raises(SchemeError) as error:
            attempt()
        told.append(str(error.value))
    return told


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    found: dict[Any, Any] = {(kind, scheme): together(kind, scheme, rank) for kind in KINDS for scheme in SCHEMES}
    found |= {("back", scheme): back_into_shards(scheme) for scheme in BACK}
    found |= {("tuned", kind): tuned(kind, _TOKENS.chunk(2)[rank]) for kind in ("ddp", "fsdp")}
    found["refused"] = refusals()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return halves_of(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind: str, scheme: str, halves: list[dict[Any, Any]]) -> None:
    single = alone(scheme)
    wanted, (state, _) = single.state_dict(), halves[0][kind, scheme]  # the first process is who has it whole
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-8)
    other = net(1)
    lc.prepare(other, scheme).load_state_dict(state)
    weights, expected = installed(lc.convert(other)), installed(lc.convert(single))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        codes, same = weight.pack()[1], expected[name].pack()[1]
        assert all(torch.equal(codes[part], same[part]) for part in codes), name
    with torch.no_grad():
        shown = single(_TOKENS)
    for half in halves:
        torch.testing.assert_close(half[kind, scheme][1], shown, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scheme", BACK)
def test_a_gathered_state_goes_on_in_shards(scheme: str, halves: list[dict[Any, Any]]) -> None:
    assert halves[0]["back", scheme]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_scales_and_tables_train_in_two_processes(kind: str, halves: list[dict[Any, Any]]) -> None:
    single = lc.prepare(net().float(), SIDE, trains="side")
    before = {name: value.clone() for name, value in single.state_dict().items() if value.is_floating_point()}
    train(single, single, [_TOKENS], torch.optim.SGD(single.parameters(), 0.01))
    wanted, state = single.state_dict(), halves[0]["tuned", kind]
    assert state.keys() == wanted.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, wanted[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"table/values", "scale/values", "bias"}
    for name in before:
        torch.testing.assert_close(state[name], wanted[name], rtol=1e-4, atol=1e-5)
    other = lc.prepare(net(1).float(), SIDE, trains="side")
    other.load_state_dict(state)
    assert installed(lc.convert(other)).keys() == installed(lc.convert(single)).keys()


def test_what_cannot_be_right_is_refused(halves: list[dict[Any, Any]]) -> None:
    for half in halves:
        gather, sharded_first, statistics = half["refused"]
        assert "gather the full state dict and load it into a prepared copy" in gather
        assert "is sharded by FSDP already" in sharded_first
        assert "use a scheme that needs no data" in statistics
