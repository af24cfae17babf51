"""A weight whose rows lie in two processes: values and gradients are those of one process."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from laconic.clustering import dkm_decode
from laconic.errors import SchemeError
from tests.clustering.test_decode import draw

RULE = dict(tau=0.2, iterations=4, tolerance=1e-9)
CASES = {"table": (torch.bfloat16, 1, 6), "blocks": (torch.float64, 1, 6), "vectors": (torch.float64, 2, 6), "empty shard": (torch.bfloat16, 1, 12)}


def gradients(weight: Tensor, target: Tensor, dimension: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    weight, centroids = weight.clone().requires_grad_(), draw(1, 4, dimension, seed=1).requires_grad_()
    decoded, last = dkm_decode(weight, centroids, group=group, way="auto", **RULE)
    loss = (decoded.double() * target).sum()
    # every process reads the same centroids; its loss on them is counted once
    return [decoded.detach(), last.detach(), *torch.autograd.grad([loss, last.square().sum()], (weight, centroids))]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    found = {}
    for name, (dtype, dimension, split) in CASES.items():
        part = slice(0, split) if rank == 0 else slice(split, 12)
        weight, target = draw(12, 32, dtype=dtype)[part], draw(12, 32, seed=2)[part]
        found[name] = gradients(weight, target, dimension, dist.group.WORLD)
    found["dtensor"] = as_dtensor(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def as_dtensor(rank: int) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(draw(12, 32, dtype=torch.bfloat16), mesh, [Shard(0)]).requires_grad_()
    decoded, last = dkm_decode(weight, draw(1, 4, 1, seed=1), **RULE)
    assert isinstance(decoded, DTensor)
    assert decoded.shape == (12, 32)
    (gradient,) = torch.autograd.grad(decoded.to_local().double().mul(draw(12, 32, seed=2)[rank * 6 : rank * 6 + 6]).sum(), weight)
    assert isinstance(gradient, DTensor)
    return [decoded.to_local().detach(), last.detach(), gradient.to_local()]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    other = mp.get_context("spawn").Process(target=work, args=(1, str(folder)))
    other.start()
    work(0, str(folder))
    other.join()
    assert other.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_give_what_one_gives(name: str, halves: list[dict[str, list[Tensor]]]) -> None:
    dtype, dimension, _ = CASES[name]
    weight, target = draw(12, 32, dtype=dtype), draw(12, 32, seed=2)
    if dtype == torch.bfloat16:
        weight_, centroids = weight.clone().requires_grad_(), draw(1, 4, dimension, seed=1).requires_grad_()
        decoded, last = dkm_decode(weight_, centroids, way="table", **RULE)
        loss = (decoded.double() * target).sum()
        wanted = [decoded.detach(), last.detach(), *torch.autograd.grad([loss, last.square().sum()], (weight_, centroids))]
    else:
        wanted = gradients(weight, target, dimension, None)
    found = [half[name] for half in halves]
    tolerance = dict(rtol=1e-2, atol=1e-3) if dtype == torch.bfloat16 else dict(rtol=1e-10, atol=1e-10)
    for i in (0, 2):
        torch.testing.assert_close(torch.cat([half[i] for half in found]), wanted[i], **tolerance)
    for i in (1, 3):  # the centroids and their gradients are the same everywhere
        assert torch.equal(found[0][i], found[1][i])
        torch.testing.assert_close(found[0][i], wanted[i], rtol=1e-6, atol=1e-8)


def test_a_dtensor_is_taken_as_its_shard(halves: list[dict[str, list[Tensor]]]) -> None:
    weight = draw(12, 32, dtype=torch.bfloat16).requires_grad_()
    decoded, last = dkm_decode(weight, draw(1, 4, 1, seed=1), way="table", **RULE)
    (gradient,) = torch.autograd.grad((decoded.double() * draw(12, 32, seed=2)).sum(), weight)
    found = [half["dtensor"] for half in halves]
    torch.testing.assert_close(torch.cat([half[0] for half in found]), decoded.detach())
    torch.testing.assert_close(torch.cat([half[2] for half in found]), gradient, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[1][1], last.detach())


def test_a_group_shares_one_table(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(SchemeError, match="a group shares one table"):
            dkm_decode(draw(4, 4), draw(2, 2, 1), tau=0.1, iterations=1, rows_per_table=2, group=dist.group.WORLD)
        decoded, _ = dkm_decode(draw(4, 4), draw(2), tau=0.1, iterations=1, group=dist.group.WORLD)
        torch.testing.assert_close(decoded, dkm_decode(draw(4, 4), draw(2), tau=0.1, iterations=1)[0])
    finally:
        dist.destroy_process_group()
