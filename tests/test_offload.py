"""What is saved for backward: counted to the byte, held once, and every gradient equal to the one without."""

import contextlib
import gc
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from laconic.clustering import dkm_naive
from laconic.errors import SchemeError
from laconic.offload import Saved, offload_saved
from laconic.offload.rows import Followed
from tests.processes import THREADS

MB = 1 << 20
VIEWS = {"ViewBackward0", "TBackward0", "TransposeBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0",
         "UnsqueezeBackward0", "SqueezeBackward1",
         "ExpandBackward0", "PermuteBackward0", "SelectBackward0", "SliceBackward0", "AliasBackward0"}  # fmt: skip


class Keep2(torch.autograd.Function):
    """x0 + the sum of its views, both saved: what table 1 of eDKM does by hand."""

    @staticmethod
    def forward(ctx, x0: Tensor, x1: Tensor) -> Tensor:
        ctx.save_for_backward(x0, x1)
        return x0.sum() * 2

    @staticmethod
    def backward(ctx, grad: Tensor):
        x0, x1 = ctx.saved_tensors
        return grad * x0, (grad * x1).view_as(x1)


def gradients(loss, parameters, **options) -> tuple[list[Tensor], Saved]:
    with offload_saved(**options) as saved:
        value = loss()
    return [g.clone() for g in torch.autograd.grad(value, parameters)], saved


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


WAYS = [{}, {"copy": True}, {"marshal": False}]


@pytest.mark.parametrize(("marshal", "held"), [(False, 8), (True, 4)])
def test_table_1(marshal: bool, held: int) -> None:
    x0 = torch.rand(1024, 1024).requires_grad_()
    with offload_saved(marshal=marshal, copy=True) as saved:
        loss = Keep2.apply(x0, x0.view(-1, 1))
        assert (saved.saves, saved.saved_bytes, saved.alive_bytes, saved.copied_bytes) == (
            2,
            8 * MB,
            held * MB,
            held * MB,
        )
        assert saved.hits == (1 if marshal else 0)
    loss.backward()
    del loss
    gc.collect()
    assert (saved.alive_bytes, saved.peak_bytes) == (0, held * MB)
    assert torch.equal(x0.grad, 2 * x0.detach())


def test_by_reference_and_keep() -> None:
    x0 = torch.rand(1024, 1024).requires_grad_()
    _, saved = gradients(lambda: Keep2.apply(x0, x0.t()), [x0])
    assert (saved.saved_bytes, saved.peak_bytes, saved.copied_bytes, saved.alive_bytes) == (8 * MB, 4 * MB, 0, 0)
    _, saved = gradients(lambda: Keep2.apply(x0, x0[5:].t()), [x0], keep=[x0], copy=True, marshal=False)
    assert (saved.kept, saved.peak_bytes, saved.copied_bytes) == (2, 0, 0)
    layer = nn.Linear(8, 8)
    _, saved = gradients(lambda: layer(torch.rand(3, 8)).sum(), list(layer.parameters()), keep=layer, copy=True)
    assert saved.peak_bytes == 3 * 8 * 4


@pytest.mark.parametrize("views", range(1, 9))
def test_any_number_of_hops(views: int) -> None:
    x0 = torch.rand(6, 4).requires_grad_()
    x1 = x0
    for _ in range(views):
        x1 = x1.t()
    (g, saved), (expected, _) = (gradients(lambda: Keep2.apply(x0, x1), [x0], copy=way) for way in (True, None))
    assert saved.hits == 1
    assert saved.peak_bytes == 96
    assert equal(g, expected)


def walked(loss, hops: int) -> int:
    """Bytes that eDKM's walk holds: a saved tensor is not copied if one that was is reached over at most `hops` view-like nodes."""
    chains: list[tuple[list[object], Tensor]] = []
    held = 0

    def chain(t: Tensor) -> list[object]:
        found, node = [], t.grad_fn
        while node is not None:
            found.append(node)
            if node.name() not in VIEWS:
                return found
            node = node.next_functions[0][0]
        return [*found, (t.untyped_storage().data_ptr(), "leaf")]

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        own = chain(t)
        near = any(
            a == b and i + j <= hops for other, _ in chains for i, a in enumerate(own) for j, b in enumerate(other)
        )
        if not near:
            chains.append((own, t))
            held += t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = loss()
    del kept
    return held


def test_finds_all_that_the_papers_walk_finds() -> None:
    w, c = torch.randn(32, 16).bfloat16().requires_grad_(), torch.linspace(-2, 2, 8).view(1, 8, 1)

    def loss() -> Tensor:
        return dkm_naive(w, c, tau=0.1, iterations=3)[0].float().square().sum()

    _, none = gradients(loss, [w], marshal=False)
    _, ours = gradients(loss, [w], copy=True)
    by_hops = [walked(loss, hops) for hops in (0, 1, 4, 100)]
    assert none.saved_bytes == none.copied_bytes > by_hops[0] > by_hops[2]
    assert by_hops[2] == by_hops[3] == ours.copied_bytes  # the paper: 4 hops are enough for DKM
    maps = 4 * 2 * 32 * 16 * 8 * 4  # per attention: the differences and the result of softmax
    assert maps < ours.peak_bytes < maps + 6 * 32 * 16 * 4


def test_parts_of_a_storage() -> None:
    base = torch.linspace(0.1, 2, 1000).requires_grad_()

    def loss() -> Tensor:
        y = base * 1
        return (y[:200].exp().log() + y[100:300].square() + y[0].expand(200) * y[50:250]).sum() + (
            y.view(10, 100)[:, :3] ** 2
        ).sum()

    reference = list(torch.autograd.grad(loss(), [base]))
    for way in WAYS:
        found, saved = gradients(loss, [base], **way)
        assert equal(found, reference)
        assert saved.peak_bytes <= saved.saved_bytes or not saved.copied_bytes
    _, saved = gradients(lambda: (base.view(10, 100)[:, :3] ** 2).sum(), [base], copy=True)
    assert saved.peak_bytes == 10 * 3 * 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.a(x)))
        x = F.relu(self.b(x).add_(1), inplace=True)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(16, 32), nn.Linear(32, 16), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint(lambda y: self.b(F.gelu(self.a(y))), x, use_reentrant=self.reentrant).tanh() * 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["attention", "convolutions", "checkpoint", "reentrant"])
def test_gradients_are_bit_equal(kind: str, way: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = {
        "attention": Attention,
        "convolutions": Convolutions,
        "checkpoint": lambda: Checkpointed(False),
        "reentrant": lambda: Checkpointed(True),
    }[kind]()
    x = {"attention": torch.randint(50, (2, 9)), "convolutions": torch.randn(3, 3, 10, 10)}.get(
        kind, torch.randn(7, 16)
    )

    def step(**options) -> tuple[list[Tensor], Saved | None]:
        torch.manual_seed(1)
        model.zero_grad()
        if not options:
            model(x).square().sum().backward()
            return [p.grad.clone() for p in model.parameters()], None
        with offload_saved(**options) as saved:
            model(x).square().sum().backward()  # backward inside the context
        return [p.grad.clone() for p in model.parameters()], saved

    expected, _ = step()
    for keep in ((), model):
        found, saved = step(keep=keep, **way)
        gc.collect()
        assert equal(found, expected)
        assert saved is not None
        assert saved.saves > 2
        assert saved.alive_bytes == 0


def test_second_derivatives_and_a_graph_used_twice() -> None:
    x = torch.linspace(0.1, 1, 10).requires_grad_()
    for way in WAYS:
        with offload_saved(**way):
            y = (x.exp() * x.sin()).sum()
            (first,) = torch.autograd.grad(y, x, create_graph=True)
            second = torch.autograd.grad(first.sum(), x, retain_graph=True)[0]
        assert torch.equal(second, torch.autograd.grad(first.sum(), x)[0])
        assert torch.allclose(second, 2 * x.exp() * x.cos())


def test_changed_in_place() -> None:
    for change in (lambda t: t.mul_(2), lambda t: t.view(-1)[:1].zero_()):
        y = torch.rand(4, requires_grad=True) * 1
        with offload_saved():
            loss = y.square().sum()
        with torch.no_grad():
            change(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    x = torch.rand(4).requires_grad_()
    y = x * 1
    with offload_saved(copy=True) as saved:  # a copy keeps the values; the second version is another copy
        loss = y.square().sum()
        y.detach().mul_(3)
        loss = loss + y.square().sum()
    loss.backward()
    assert (saved.hits, saved.peak_bytes) == (0, 32)
    assert torch.allclose(x.grad, 2 * x.detach() + 6 * x.detach())


def test_an_address_that_is_used_again_is_no_hit() -> None:
    x = torch.ones(1 << 16).requires_grad_()
    with offload_saved(copy=True) as saved:
        total = torch.zeros(())
        for scale in range(1, 6):
            total = total + (x * scale).square().sum()  # the product is freed, its address likely used for the next
    assert saved.hits == 0
    total.backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0 * (1 + 4 + 9 + 16 + 25)))


def test_nested_and_failing_contexts() -> None:
    x = torch.rand(8, requires_grad=True)
    with offload_saved() as outer:
        a = x.square().sum()
        with offload_saved(copy=True) as inner:
            b = x.square().sum()
        with contextlib.suppress(KeyError), offload_saved() as failed:
            c = x.exp().sum()
            raise KeyError
        d = x.exp().sum()
    assert [s.saves for s in (outer, inner, failed)] == [2, 1, 1]
    e = x.sin().sum()
    assert [s.saves for s in (outer, inner, failed)] == [2, 1, 1]
    (a + b + c + d + e).backward()
    assert torch.allclose(x.grad, 4 * x.detach() + 2 * x.detach().exp() + x.detach().cos())
    del a, b, c, d, e
    gc.collect()
    assert [s.alive_bytes for s in (outer, inner, failed)] == [0, 0, 0]


def test_tensors_that_are_not_plain() -> None:
    z = torch.randn(4, dtype=torch.complex64).requires_grad_()
    expected = torch.autograd.grad((z.conj() * z * z).real.sum(), z)[0]
    found, saved = gradients(lambda: (z.conj() * z * z).real.sum(), [z], copy=True)
    assert torch.equal(found[0], expected)
    assert saved.odd >= 1


def test_bad_input() -> None:
    half, full = torch.zeros(4).half(), torch.zeros(4)
    for options, message in [
        ({"weights": [full], "unique": True}, "expected dense tensors of 16 bits, got torch.float32"),
        ({"unique": True}, "need weights"),
        ({"weights": [half]}, "neither unique=True nor shard"),
        *([] if torch.cuda.is_available() else [({"pinned": True}, "needs a CUDA device")]),
    ]:
        with pytest.raises(SchemeError, match=message), offload_saved(**options):
            pass


def clustered(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(40, generator=generator).bfloat16()
    w = values[torch.randint(40, (64, 48), generator=generator)]
    return w.requires_grad_(), torch.linspace(-2, 2, 8).view(1, 8, 1).contiguous()


def dkm_loss(w: Tensor, c: Tensor) -> Tensor:
    return (dkm_naive(w, c, tau=0.1, iterations=3)[0].float() * torch.arange(48)).square().sum()


@pytest.mark.parametrize("copy", [True, None])
def test_unique(copy: bool | None) -> None:
    (w, c), n, u = clustered(), 64 * 48, 40
    assert len(w.detach().view(torch.int16).unique()) == u
    expected, dense = gradients(lambda: dkm_loss(w, c), [w])
    found, saved = gradients(lambda: dkm_loss(w, c), [w], weights=[w], unique=True, copy=copy)
    assert equal(found, expected)
    assert saved.maps >= 8
    tables = 4 * 2 * u * 8 * 4 + u * 4  # per attention: differences and softmax; and the weight in float32
    rest = saved.peak_bytes - tables - 2 * n  # the index list is held once
    assert 0 < rest < 4 * n + 4 * n + 2 * n + 4096  # of the loss: decoded weight, product
    assert dense.peak_bytes > 4 * 2 * n * 8 * 4
    assert saved.alive_bytes == 0


def test_unique_is_exact_where_rows_differ() -> None:
    w, c = clustered()
    other = torch.randn(64 * 48, 8)
    other[1:] = other[:1]
    other[7, 3] += 1  # one entry off

    def loss() -> Tensor:
        a = other.clone().requires_grad_()
        return (a * (w.float().reshape(-1, 1) - c.view(1, 8))).square().sum()

    expected, _ = gradients(loss, [w])
    found, saved = gradients(loss, [w], weights=[w], unique=True, copy=True)
    assert equal(found, expected)
    assert saved.maps >= 1
    two = [clustered(), clustered(1)]
    both = [w for w, _ in two]
    expected, _ = gradients(lambda: sum(dkm_loss(w, c) for w, c in two), both)
    found, saved = gradients(lambda: sum(dkm_loss(w, c) for w, c in two), both, weights=both, unique=True)
    assert equal(found, expected)
    assert saved.maps >= 16
    distinct = torch.arange(64 * 48).to(torch.int16).view(torch.bfloat16).view(64, 48).requires_grad_()
    _, saved = gradients(lambda: dkm_loss(distinct, c), [distinct], weights=[distinct], unique=True)
    assert saved.maps == 0


def test_weights_of_one_size_are_ranked_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    ranks = Followed.ranks
    monkeypatch.setattr(Followed, "ranks", lambda self: (ranked.append(id(self)), ranks(self))[1])
    layers = [clustered(seed) for seed in range(6)]
    weights = [w for w, _ in layers]
    noise = torch.rand(64, 48).requires_grad_()

    def loss() -> Tensor:
        return (
            sum(dkm_loss(w, c) for w, c in layers) + noise.exp().sum()
        )  # the exponential could be a row map of any, and is of none

    expected, _ = gradients(loss, weights)
    for options in (dict(unique=True), dict(unique=True, copy=True)):
        ranked.clear()
        found, saved = gradients(loss, weights, weights=weights, **options)
        assert equal(found, expected)
        assert saved.maps >= 48
        assert len(set(ranked)) == 6
        assert len(ranked) <= 2 * 6


def test_an_index_list_of_other_values_is_not_used() -> None:
    """The weight is written to behind the version counter's back while its row maps are held."""
    w, c = clustered()
    before = w.detach().clone()
    after = clustered(1)[0].detach()
    other = clustered(2)[0]

    def loss() -> Tensor:
        first = dkm_loss(w, c)
        second = dkm_loss(other, c)  # the ranks of `w` are dropped for those of another weight
        w.data.copy_(after)
        return first + second + dkm_loss(w, c)

    expected, _ = gradients(loss, [w], keep=[], copy=True)
    w.data.copy_(before)
    found, saved = gradients(loss, [w], weights=[w, other], unique=True, copy=True)
    assert saved.maps >= 16
    assert equal(found, expected)


def test_weights_without_entries_have_no_rows() -> None:
    w, c = clustered()
    nothing = torch.zeros(0, 8).bfloat16()
    expected, _ = gradients(lambda: dkm_loss(w, c), [w])
    found, saved = gradients(
        lambda: dkm_loss(w, c), [w], weights=[nothing, w], unique=True, keep=[nothing, torch.zeros(2, 2).to_sparse()]
    )
    assert equal(found, expected)
    assert saved.maps >= 8


def _learner(rank: int, file: str) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        w, c = clustered()
        mine = torch.randn(
            64 * 48, generator=torch.Generator().manual_seed(rank)
        )  # differs between learners, though of the map's shape

        def loss() -> Tensor:
            return dkm_loss(w, c) + (w.reshape(-1) * mine).exp().sum()

        expected = torch.autograd.grad(loss(), [w])
        for unique in (False, True):
            _, alone = gradients(lambda: dkm_loss(w, c), [w], weights=[w] if unique else (), unique=unique, copy=True)
            found, saved = gradients(loss, [w], weights=[w], unique=unique, shard=dist.group.WORLD, copy=True)
            assert equal(found, list(expected))
            assert saved.shards >= 8
            _, shared = gradients(
                lambda: dkm_loss(w, c), [w], weights=[w], unique=unique, shard=dist.group.WORLD, copy=True
            )
            rest = 3 * 4 * 64 * 48 + 4096  # of the loss: no row maps, held whole
            assert alone.peak_bytes / 2 <= shared.peak_bytes <= (alone.peak_bytes + rest) / 2
            assert shared.alive_bytes == 0
        apart = clustered(rank)[0]  # learners that do not agree
        expected = torch.autograd.grad(dkm_loss(apart, c), [apart])
        found, saved = gradients(
            lambda: dkm_loss(apart, c), [apart], weights=[apart], unique=True, shard=dist.group.WORLD
        )
        assert equal(found, list(expected))
        assert saved.maps >= 8
        assert saved.shards == 0
    finally:
        dist.destroy_process_group()


def test_sharded_over_two_learners(tmp_path: Path) -> None:
    quick = sys.platform == "linux" and not torch.cuda.is_initialized()  # spawned processes import everything again
    mp.start_processes(_learner, (str(tmp_path / "meet"),), nprocs=2, start_method="fork" if quick else "spawn")
