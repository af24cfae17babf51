"""What differentiable k-means saves for backward: one attention layer, eDKM's techniques one by one, and the exact gradient that saves nothing.

Table 2 of eDKM: four d x d projections in bfloat16, clustered at 3 bits, then attention over a short sequence. Every row and number of
learners runs in processes of its own. `saved` is what one learner holds for the backward pass of the clustering beyond the weights
themselves, counted byte for byte by `laconic.offload`; the rows none to M+U+S hold it as copies, as another device would need, `plain` is
autograd without hooks, where tensors of one storage share it anyway. What attention itself saves is the same in all rows, and apart.
The gradient, in bfloat16 as the weights are, is compared with that of `plain`; a last bit is up to 2^-7 = 0.0078. Rows that would not fit into
the free memory are left out, with a message.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import parser, record, show
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.clustering import dkm_decode, dkm_naive, init_centroids, temperature
from laconic.offload import offload_saved

ROWS = ("plain", "none", "M", "M+S", "M+U", "M+U+S", "ours", "coremltools")
DENSE = {"plain": 2, "none": 3, "M": 2, "coremltools": 5}  # attention maps held per iteration, roughly: whether a row fits into memory
HEAD = 64
COLUMNS = ("row", "learners", "saved", "reduction", "seconds", "slower", "gradient", "gradient_rms", "bit_equal", "attention_saved", "process_gb")


class Attention(nn.Module):
    """Four projections d x d in bfloat16, computed in float32. Shape [1, tokens, d]."""

    def __init__(self, d: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList([torch.randn(d, d, generator=generator).mul_(d**-0.5).bfloat16() for _ in range(4)])

    def forward(self, x: Tensor, decoded: list[Tensor]) -> Tensor:
        q, k, v = (F.linear(x, w.float()).unflatten(-1, (-1, HEAD)).transpose(1, 2) for w in decoded[:3])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), decoded[3].float())


def measure(rank: int, args: Namespace, row: str, learners: int, folder: str) -> None:
    """One learner of one row. The first writes `row.pt`."""
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // learners))
    if learners > 1:
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=learners)
    device = torch.device(args.device if args.device == "cpu" or learners == 1 else f"{args.device}:{rank}")
    layer = Attention(args.d, args.seed).to(device)
    x = torch.randn(1, args.tokens, args.d, generator=torch.Generator().manual_seed(args.seed + 1)).to(device)
    weights = list(layer.weights)
    tables = [init_centroids(w, args.bits, seed=args.seed).to(device) for w in weights]
    taus = [temperature(w, args.tau) for w in weights]
    decode = dkm_decode if row == "ours" else dkm_naive
    clustered = _palettized(layer, args, taus) if row == "coremltools" else None

    def decoded() -> list[Tensor]:
        if clustered is not None:
            return clustered()
        return [decode(w, c, tau=tau, iterations=args.iterations)[0] for w, c, tau in zip(weights, tables, taus, strict=True)]

    def step(counted: bool) -> tuple[float, int, int]:
        layer.zero_grad()
        if learners > 1:
            dist.barrier()
        _synchronize(device)
        started = time.perf_counter()
        hooks: Any = offload_saved(**_options(row, layer, weights)) if counted or row not in ("plain", "coremltools") else nullcontext()
        with hooks as clustering:
            parts = decoded()
        with offload_saved(keep=layer, copy=False) if counted else nullcontext() as attention:
            loss = layer(x, parts).square().mean()
        held = (clustering.alive_bytes, attention.alive_bytes) if counted else (0, 0)
        loss.backward()
        _synchronize(device)
        return time.perf_counter() - started, *held

    _, saved, attention = step(counted=True)  # the warm-up too
    seconds = statistics.median(step(counted=False)[0] for _ in range(args.repeats))
    most = torch.tensor([saved, attention], dtype=torch.int64, device=device)
    if learners > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if rank == 0:
        gradients = None if row == "coremltools" else [w.grad.cpu() for w in weights]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        found = {"saved": int(most[0]), "attention_saved": int(most[1]), "seconds": seconds, "process_gb": peak / 1e9, "gradients": gradients}
        torch.save(found, f"{folder}/row.pt")
    if learners > 1:
        dist.destroy_process_group()


def _options(row: str, layer: nn.Module, weights: list[Tensor]) -> dict[str, Any]:
    if row in ("plain", "coremltools"):
        return {"keep": layer, "copy": False}
    packs = {"weights": weights, "unique": "U" in row, "shard": dist.group.WORLD if "S" in row else None} if set("US") & set(row) else {}
    return {"keep": layer, "marshal": row != "none", "copy": True, **packs}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _palettized(layer: Attention, args: Namespace, taus: list[float]) -> Callable[[], list[Tensor]]:
    """coremltools' DKM on the same weights, in float32 as it needs them. Returns what decodes them."""
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    linears = nn.Sequential(*(nn.Linear(args.d, args.d, bias=False) for _ in layer.weights))
    for linear, weight in zip(linears, layer.weights, strict=True):
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
    prepared.to(layer.weights[0].device)
    for linear in prepared:
        linear.weight_fake_quant(linear.weight)  # its first call chooses centroids
    return lambda: [linear.weight_fake_quant(linear.weight) for linear in prepared]


def run(args: Namespace, row: str, learners: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args, row, learners, folder), nprocs=learners)
        return torch.load(Path(folder) / "row.pt")


def skipped(args: Namespace, row: str, learners: int) -> str | None:
    """Why a row is not measured, if it is not."""
    if ("S" in row) != (learners > 1) and ("S" in row or row in ("plain", "none", "coremltools")):
        return "nothing to share with one learner" if learners == 1 else "a learner holds the same as alone"
    if row == "coremltools":
        try:
            import coremltools.optimize.torch.palettization  # noqa: F401
        except ImportError:
            return "coremltools is not installed (pip install coremltools)"
    maps = 4 * args.d**2 * 2**args.bits * 4 * (args.iterations + 1)
    needed = learners * maps * (DENSE.get(row, 0) if row != "M+S" else 2 / learners) + learners * args.d**2 * 2**args.bits * 4 * 6
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
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    reference: list[Tensor] | None = None
    base: dict[str, float] = {}
    for learners in args.learners:
        for row in args.rows:
            reason = skipped(args, row, learners)
            if reason is not None:
                notes.append(f"{row}, {learners} learners: left out, {reason}")
                print(notes[-1], file=sys.stderr)
                continue
            found = run(args, row, learners)
            gradients = found.pop("gradients")
            if row == "plain":
                reference = gradients
            if row == "none" or (row == "plain" and not base):
                base = {"saved": found["saved"], "seconds": found["seconds"]}
            rows.append({"row": row, "learners": learners, **found, **_against(gradients, reference)})
            print(f"{row}, {learners} learners: {found['saved'] / 1e6:,.2f} MB, {found['seconds']:.2f} s", file=sys.stderr)
    for entry in rows:
        entry["reduction"] = base["saved"] / entry["saved"] if base and entry["saved"] else None
        entry["slower"] = entry["seconds"] / base["seconds"] if base else None
    show(f"Saved for backward by one learner, bytes: four {args.d} x {args.d} projections at {args.bits} bits", rows, COLUMNS)
    record(f"edkm_memory-{args.d}{'' if args.device == 'cpu' else '-' + args.device}", rows, args, notes=notes, weights_bytes=8 * args.d**2)


def _against(gradients: list[Tensor] | None, reference: list[Tensor] | None) -> dict[str, Any]:
    """The largest difference of a gradient's entry relative to the largest entry, the norms' ratio, and whether all bits are equal."""
    if gradients is None or reference is None:
        return {"gradient": None, "gradient_rms": None, "bit_equal": None}
    pairs = [(g.double(), r.double()) for g, r in zip(gradients, reference, strict=True)]
    worst = max(float((g - r).abs().max() / r.abs().max()) for g, r in pairs)
    rms = max(float((g - r).norm() / r.norm()) for g, r in pairs)
    return {"gradient": worst, "gradient_rms": rms, "bit_equal": all(torch.equal(g, r) for g, r in pairs)}


if __name__ == "__main__":
    main()
