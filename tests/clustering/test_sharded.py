"""A weight whose rows lie in two processes: values and gradients are those of one process."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from laconic.clustering import dkm_decode
from laconic.errors import SchemeError
from tests.clustering.test_decode import draw
from tests.processes import PATIENCE, THREADS, halves_of

RULE = dict(tau=0.2, iterations=4, tolerance=1e-9)
HALF = dict(rounded=torch.bfloat16)
CASES: dict[
    str, tuple[torch.dtype, int, int, dict[str, Any]]
] = {  # dtype, dimension, rows of the first process, options
    "table": (torch.bfloat16, 1, 6, {}),
    "table, float32 results": (torch.float32, 1, 5, HALF),
    "table, zero": (torch.float32, 1, 5, HALF | dict(zero=True)),
    "table, scale": (torch.float32, 1, 5, HALF | dict(scale=True)),
    "table, empty shard": (torch.bfloat16, 1, 12, {}),
    "blocks": (torch.float64, 1, 6, {}),
    "blocks, zero and scale": (torch.float64, 1, 5, dict(zero=True, scale=True)),
    "vectors": (torch.float64, 2, 6, {}),
    "vectors, empty shard": (torch.float64, 2, 0, {}),
}


def gradients(name: str, part: slice = slice(None), group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Decoded weight, centroids and gradients of some rows. One process computes by the way that several take."""
    dtype, dimension, _, options = CASES[name]
    weight, centroids = draw(12, 32, dtype=dtype)[part].requires_grad_(), draw(1, 4, dimension, seed=1).requires_grad_()
    if "scale" in options:
        options = options | dict(scale=torch.linspace(0.5, 2, 12, dtype=dtype)[part])
    decoded, last = dkm_decode(
        weight, centroids, group=group, way="table" if name.startswith("table") else "blocks", **RULE, **options
    )
    loss = (decoded.double() * draw(12, 32, seed=2)[part]).sum()
    # every process reads the same centroids; its loss on them is counted once
    return [decoded.detach(), last.detach(), *torch.autograd.grad([loss, last.square().sum()], (weight, centroids))]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    found = {}
    for name, (_, _, split, _) in CASES.items():
        found[name] = gradients(name, slice(0, split) if rank == 0 else slice(split, 12), dist.group.WORLD)
    found |= {f"dtensor {rows}": as_dtensor(rank, rows) for rows in (12, 13)}
    found["fsdp"] = as_parametrization(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def as_dtensor(rank: int, rows: int) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(draw(rows, 32, dtype=torch.float32), mesh, [Shard(0)]).requires_grad_()
    decoded, last = dkm_decode(weight, draw(1, 4, 1, seed=1), **HALF, **RULE)
    assert isinstance(decoded, DTensor)
    assert decoded.shape == (rows, 32)
    part = draw(rows, 32, seed=2).chunk(2)[rank]
    (gradient,) = torch.autograd.grad(decoded.to_local().double().mul(part).sum(), weight)
    assert isinstance(gradient, DTensor)
    return [decoded.to_local().detach(), last.detach(), gradient.to_local()]


class Soft(nn.Module):
    """What a parametrization does with a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return dkm_decode(weight, draw(4, seed=1), **RULE)[0]


def layer() -> nn.Linear:
    made = nn.Linear(32, 13, bias=False, dtype=torch.float64)
    made.weight.data.copy_(draw(13, 32))
    nn.utils.parametrize.register_parametrization(made, "weight", Soft())
    return made


def as_parametrization(rank: int) -> list[Tensor]:
    """FSDP2 around a parametrized layer; each process has half of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made = layer()
    fully_shard(made, mesh=init_device_mesh("cpu", (2,)))
    made(draw(8, 32, seed=3)[4 * rank :][:4]).square().mean().backward()
    return [made.parametrizations.weight.original.grad.to_local()]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    return halves_of(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_give_what_one_gives(name: str, halves: list[dict[str, list[Tensor]]]) -> None:
    wanted, found = gradients(name), [half[name] for half in halves]
    exact = CASES[name][0] == torch.float64
    for i in (0, 2):  # sums in another order, then the rounding of a 16-bit result
        tolerance = 1e-10 if exact else torch.finfo(wanted[i].dtype).eps
        torch.testing.assert_close(
            torch.cat([half[i] for half in found]), wanted[i], rtol=tolerance, atol=1e-10 if exact else 1e-7
        )
    for i in (1, 3):  # the centroids and their gradients are the same everywhere
        assert torch.equal(found[0][i], found[1][i])
        torch.testing.assert_close(found[0][i], wanted[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [12, 13])
def test_a_dtensor_is_taken_as_its_shard(rows: int, halves: list[dict[str, list[Tensor]]]) -> None:
    weight = draw(rows, 32, dtype=torch.float32).requires_grad_()
    decoded, last = dkm_decode(weight, draw(1, 4, 1, seed=1), way="table", **HALF, **RULE)
    (gradient,) = torch.autograd.grad((decoded.double() * draw(rows, 32, seed=2)).sum(), weight)
    found = [half[f"dtensor {rows}"] for half in halves]
    torch.testing.assert_close(torch.cat([half[0] for half in found]), decoded.detach())
    torch.testing.assert_close(torch.cat([half[2] for half in found]), gradient)
    torch.testing.assert_close(found[1][1], last.detach())


def test_a_parametrization_needs_to_know_nothing_of_fsdp(halves: list[dict[str, list[Tensor]]]) -> None:
    made = layer()
    made(draw(8, 32, seed=3)).square().mean().backward()
    torch.testing.assert_close(
        torch.cat([half["fsdp"][0] for half in halves]),
        made.parametrizations.weight.original.grad,
        rtol=1e-10,
        atol=1e-12,
    )


def test_a_group_shares_one_table_of_16_bit_values_or_blocks(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(SchemeError, match="a group shares one table"):
            dkm_decode(draw(4, 4), draw(2, 2, 1), tau=0.1, iterations=1, rows_per_table=2, group=dist.group.WORLD)
        with pytest.raises(SchemeError, match="values of 16 bits together, got torch.float64"):
            dkm_decode(draw(4, 4), draw(2), tau=0.1, iterations=1, way="table", group=dist.group.WORLD)
        decoded, _ = dkm_decode(draw(4, 4), draw(2), tau=0.1, iterations=1, group=dist.group.WORLD)
        torch.testing.assert_close(decoded, dkm_decode(draw(4, 4), draw(2), tau=0.1, iterations=1)[0])
    finally:
        dist.destroy_process_group()
