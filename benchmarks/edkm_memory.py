"""What differentiable k-means saves for backward: one attention layer, eDKM's techniques one by one, and the exact gradient that saves nothing.

Table 2 of eDKM: four d x d projections in bfloat16, clustered at 3 bits, then attention over a short sequence. Every row and number of
learners runs in processes of its own. `saved` is what one learner holds for the backward pass of the clustering beyond the weights
themselves, counted byte for byte by `laconic.offload`; the rows none to M+U+S hold it as copies, as another device would need, `plain` is
autograd without hooks, where tensors of one storage share it anyway, `ours` and `blocks` are `dkm_decode` by distinct value and by entry. What
attention itself saves is the same in all rows, and apart. `seconds` are of the clock, `processor` those that one learner's process computed:
on a shared machine, compare these.

`off` and `off_rms` compare the gradient, in bfloat16 as the weights are, with one of which the clustering was computed in float64 and not
rounded: the largest difference by the largest entry, and the norms' ratio. Rounding alone makes up to 2^-8 = 0.0039. It is
`dkm_decode(way="blocks")` on float64 weights, which tests/clustering holds to autograd of the formula (`dkm_naive`) at 1e-11, and which fits
into memory where the formula does not. `as_plain` says whether every bit is as plain autograd has it.

coremltools decodes with the attentions before the last step of the centroids, so its gradient is that of another formula and not compared.
Rows that would not fit into the free memory are left out, with a message.
"""

import logging
import os
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import parser, record, show

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.clustering import dkm_decode, dkm_naive, init_centroids, temperature
from laconic.offload import offload_saved

ROWS = ("plain", "none", "M", "M+S", "M+U", "M+U+S", "ours", "blocks", "coremltools")
EXACT = "float64"  # not a row: what the rows' gradients are compared with
WITHOUT_HOOKS = ("plain", "ours", "blocks", "coremltools", EXACT)
DENSE = {
    "plain": 2,
    "none": 3,
    "M": 2,
    "coremltools": 3,
}  # attention maps held per iteration, roughly: whether a row fits into memory
HEAD = 64
COLUMNS = (
    "row",
    "learners",
    "saved",
    "reduction",
    "seconds",
    "processor",
    "slower",
    "off",
    "off_rms",
    "as_plain",
    "attention_saved",
    "process_gb",
)


class Attention(nn.Module):
    """Four projections d x d in bfloat16, computed in float32. Shape [1, tokens, d]."""

    def __init__(self, d: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            [torch.randn(d, d, generator=generator).mul_(d**-0.5).bfloat16() for _ in range(4)]
        )

    def forward(self, x: Tensor, decoded: list[Tensor]) -> Tensor:
        q, k, v = (F.linear(x, w.float()).unflatten(-1, (-1, HEAD)).transpose(1, 2) for w in decoded[:3])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), decoded[3].float())


def measure(rank: int, args: Namespace, row: str, learners: int, folder: str) -> None:
    """One learner of one row. The first writes `row.pt`."""
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // learners))
    if learners > 1:
        dist.init_process_group(
            "gloo" if args.device == "cpu" else "nccl",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=learners,
        )
    device = torch.device(args.device if args.device == "cpu" or learners == 1 else f"{args.device}:{rank}")
    layer = Attention(args.d, args.seed).to(device)
    x = torch.randn(1, args.tokens, args.d, generator=torch.Generator().manual_seed(args.seed + 1)).to(device)
    leaves, decoded = clustering(row, layer, args)

    def step(counted: bool) -> tuple[float, float, int, int]:
        for leaf in leaves:
            leaf.grad = None
        if learners > 1:
            dist.barrier()
        _synchronize(device)
        started, computed = time.perf_counter(), time.process_time()
        hooks: Any = offload_saved(**_options(row, leaves)) if counted or row not in WITHOUT_HOOKS else nullcontext()
        with hooks as clustered:
            parts = decoded()
        with offload_saved(keep=layer, copy=False) if counted else nullcontext() as attention:
            loss = layer(x, parts).square().mean()
        held = (clustered.alive_bytes, attention.alive_bytes) if counted else (0, 0)
        loss.backward()
        _synchronize(device)
        return time.perf_counter() - started, time.process_time() - computed, *held

    *_, saved, attention = step(counted=True)  # the warm-up too
    repeats = 0 if row == EXACT else args.repeats
    times = sorted(step(counted=False)[:2] for _ in range(repeats)) or [(0.0, 0.0)]
    seconds, processor = times[(len(times) - 1) // 2]
    most = torch.tensor([saved, attention], dtype=torch.int64, device=device)
    if learners > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        gradients = None if row == "coremltools" else [leaf.grad.cpu() for leaf in leaves]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        found = {
            "saved": int(most[0]),
            "attention_saved": int(most[1]),
            "seconds": seconds,
            "processor": processor,
            "process_gb": peak / 1e9,
        }
        torch.save(found | {"gradients": gradients}, f"{folder}/row.pt")
    if learners > 1:
        dist.destroy_process_group()


def clustering(row: str, layer: Attention, args: Namespace) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """The weights that gradients arrive at, and what clusters and decodes them, in bfloat16 (coremltools: float32)."""
    weights = list(layer.weights)
    taus = [temperature(w, args.tau) for w in weights]
    tables = [init_centroids(w, args.bits, seed=args.seed).to(w.device) for w in weights]
    if row == "coremltools":
        return _palettized(weights, tables, taus, args)
    leaves = [w.detach().double().requires_grad_() for w in weights] if row == EXACT else weights
    ways: dict[str, Any] = {"ours": {"way": "table"}, "blocks": {"way": "blocks"}, EXACT: {"way": "blocks"}}

    def decode(w: Tensor, c: Tensor, tau: float) -> Tensor:
        how = {"tau": tau, "iterations": args.iterations}
        return (dkm_decode(w, c, **how, **ways[row]) if row in ways else dkm_naive(w, c, **how))[0].bfloat16()

    return leaves, lambda: [decode(w, c, tau) for w, c, tau in zip(leaves, tables, taus, strict=True)]


def _options(row: str, weights: list[Tensor]) -> dict[str, Any]:
    """The techniques of a row; rows without any are only counted, held by reference as autograd does."""
    if row in WITHOUT_HOOKS:
        return {"keep": weights, "copy": False}
    packs = (
        {"weights": weights, "unique": "U" in row, "shard": dist.group.WORLD if "S" in row else None}
        if set("US") & set(row)
        else {}
    )
    return {"keep": weights, "marshal": row != "none", "copy": True, **packs}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _palettized(
    weights: list[Tensor], tables: list[Tensor], taus: list[float], args: Namespace
) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """coremltools' DKM on the same weights, in float32 as it needs them, and from the same centroids, which it carries from step to step."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # that it was not tested with this torch is in the notes
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    linears = nn.Sequential(*(nn.Linear(args.d, args.d, bias=False) for _ in weights))
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data.copy_(weight)
    options = {
        "n_bits": args.bits,
        "cluster_dim": 1,
        "milestone": 0,
        "kmeans_max_iter": args.iterations,
        "palett_tau": taus[0],
        "palett_epsilon": 0.0,
    }
    palettizer = DKMPalettizer(linears, DKMPalettizerConfig.from_dict({"global_config": options}))
    prepared = palettizer.prepare(inplace=True).train()
    palettizer.step()
    prepared.to(weights[0].device)
    for linear, table in zip(prepared, tables, strict=True):
        linear.weight_fake_quant.centroids = [
            table[0].float()
        ]  # its own k-means++, ten times over, would take longer than all else
    return [linear.weight for linear in prepared], lambda: [
        linear.weight_fake_quant(linear.weight) for linear in prepared
    ]


def run(args: Namespace, row: str, learners: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args, row, learners, folder), nprocs=learners)
        return torch.load(Path(folder) / "row.pt")


def skipped(args: Namespace, row: str, learners: int) -> str | None:
    """Why a row is not measured, if it is not."""
    if "S" in row and learners == 1:
        return "nothing to share with one learner"
    if "S" not in row and row != "ours" and learners > 1:
        return "a learner holds the same as alone"
    if row == "coremltools" and find_spec("coremltools") is None:
        return "coremltools is not installed (pip install coremltools)"
    attentions = args.d**2 * 2**args.bits * 4  # bytes of one map of one projection
    maps = 4 * (args.iterations + 1) * attentions
    needed = maps * (learners * DENSE.get(row, 0) if row != "M+S" else 2) + 6 * learners * attentions
    free = _free()
    if args.device == "cpu" and free is not None and needed > 0.9 * free:
        return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return None


def _free() -> int | None:
    """Bytes of memory the system could give, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def measured(args: Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, each with its gradients' errors, and notes on those that were left out."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    exact = run(args, EXACT, 1)["gradients"]
    plain: list[Tensor] | None = None
    for learners in args.learners:
        for row in args.rows:
            reason = skipped(args, row, learners)
            if reason is not None:
                notes.append(f"{row}, {learners} learners: left out, {reason}")
                print(notes[-1], file=sys.stderr)
                continue
            found = run(args, row, learners)
            gradients = found.pop("gradients")
            plain = gradients if row == "plain" else plain
            rows.append({"row": row, "learners": learners, **found, **_against(gradients, exact, plain)})
            print(
                f"{row}, {learners} learners: {found['saved'] / 1e6:,.2f} MB, {found['seconds']:.2f} s", file=sys.stderr
            )
    if any(entry["row"] == "coremltools" for entry in rows):
        notes.append(
            f"coremltools {version('coremltools')} with torch {torch.__version__}, which its authors have not tested"
        )
    return rows, notes


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--d", type=int, default=2048, help="width of the layer, a multiple of 64")
    made.add_argument("--learners", type=int, nargs="+", default=[1, 4])
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    made.add_argument("--bits", type=int, default=3)
    made.add_argument("--iterations", type=int, default=5)
    made.add_argument("--tau", type=float, default=0.02, help="temperature relative to the variance of the weights")
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int, default=0, help="per learner; 0: the cores shared out")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = made.parse_args()
    if args.d % HEAD:
        made.error(f"--d must be a multiple of {HEAD}, got {args.d}")
    rows, notes = measured(args)
    cost = "processor" if args.device == "cpu" else "seconds"
    base = next((entry for entry in rows if entry["row"] == "none"), None)
    for entry in rows:
        entry["reduction"] = base["saved"] / entry["saved"] if base and entry["saved"] else None
        entry["slower"] = entry[cost] / base[cost] if base else None
    goals = targets(rows, cost)
    show(
        f"Saved for backward by one learner, bytes: four {args.d} x {args.d} projections at {args.bits} bits",
        rows,
        COLUMNS,
    )
    show("Targets", goals)
    name = f"edkm_memory-{args.d}{'' if args.device == 'cpu' else '-' + args.device}"
    record(name, rows, args, notes=notes, targets=goals, weights_bytes=8 * args.d**2)


def _against(gradients: list[Tensor] | None, exact: list[Tensor] | None, plain: list[Tensor] | None) -> dict[str, Any]:
    """How far gradients are from exact ones: the largest difference by the largest entry, and the norms' ratio; whether all bits are as plain's."""
    if gradients is None or exact is None:
        return {"off": None, "off_rms": None, "as_plain": None}
    pairs = [(g.double(), r) for g, r in zip(gradients, exact, strict=True)]
    same = None if plain is None else all(torch.equal(g, p) for g, p in zip(gradients, plain, strict=True))
    return {
        "off": max(float((g - r).abs().max() / r.abs().max()) for g, r in pairs),
        "off_rms": max(float((g - r).norm() / r.norm()) for g, r in pairs),
        "as_plain": same,
    }


def targets(rows: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """What ours was to reach on one learner, against plain autograd, and whether it did; eDKM's own figures are 1/130 of the bytes and 1.7 x."""
    plain, ours = (
        next((entry for entry in rows if (entry["row"], entry["learners"]) == (name, 1)), None)
        for name in ("plain", "ours")
    )
    if plain is None or ours is None:
        return []
    hooked = [entry["as_plain"] for entry in rows if entry["row"] not in WITHOUT_HOOKS]
    found = [
        ("bytes saved, ours / plain autograd", ours["saved"] / plain["saved"], 1 / 1000),
        ("time forward + backward, ours / plain autograd", ours[cost] / plain[cost], 1 / 20),
        ("error of the gradient, ours / plain autograd", ours["off_rms"] / plain["off_rms"], 1.0),
        ("rows with hooks whose gradient is not plain's", hooked.count(False), 0),
    ]
    return [{"what": what, "found": value, "target": target, "met": value <= target} for what, value, target in found]


if __name__ == "__main__":
    main()
