"""Soft clusters in a weight's place while it is trained: `dkm_decode`, and what it carries from step to step."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.clustering.decode import dkm_decode
from laconic.clustering.start import annealed
from laconic.errors import SchemeError
from laconic.weights import Codebook, Sparse, Weight
from laconic.weights.relax import Relaxation
from laconic.weights.shards import is_sharded


@dataclass(frozen=True)
class Softness:
    """How a clustering is softened: temperatures relative to the variance at the beginning and the end of the training
    (in between they change by equal factors), iterations per step, whether the first centroid stays at 0, and the
    16-bit type that float32 weights are clustered in.
    """

    first: float
    last: float
    iterations: int
    zero: bool = False
    rounded: torch.dtype | None = None


class SoftClusters(Relaxation):
    """Training mode: w by its attention to centroids that follow it (`dkm_decode`). Evaluation: every entry at its
    nearest centroid.

    `weight` is the clustering to start from, a Codebook or a Sparse one, whose survivors only are then clustered;
    `variance` that of what is clustered. The centroids are carried: those that a pass with a gradient ends with are
    where passes start once w has changed. Until then all start from the same ones: a pass that is repeated (activation
    checkpointing, a layer used twice, several minibatches a step) computes the same. In evaluation mode no gradient
    reaches w.
    Source: Cho et al. 2022 (DKM) section 3. Saved for backward: w itself and the centroids. Cost: `dkm_decode`, and a
    sum over w to see changes.
    """

    def __init__(self, weight: Weight, how: Softness, variance: float) -> None:
        super().__init__(weight)
        self.how = how
        book = self.book
        tables = book.tables().detach().float()
        if isinstance(weight, Sparse):
            _check_survivors(weight, book)
        self.register_buffer("centroids", tables.clone())  # where the last pass ended
        self.register_buffer("start", tables.clone())  # where passes start while w is what `seen` says
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=tables.device))
        self.register_buffer("mask", weight.mask if isinstance(weight, Sparse) else None)
        self.register_buffer(
            "scale", None if book.row_scale is None else book.row_scale.forward().detach().flatten().clone()
        )
        spread = torch.tensor(variance, dtype=torch.float32, device=tables.device)
        self.register_buffer(
            "variance", torch.where(spread > 0, spread, 1.0)
        )  # a constant is decoded alike at any temperature
        self.register_buffer("tau", how.first * self.variance)

    centroids: Tensor
    start: Tensor
    seen: Tensor
    mask: Tensor | None
    scale: Tensor | None
    variance: Tensor
    tau: Tensor

    @property
    def book(self) -> Codebook:
        """The clustering's codebook."""
        found = self.weight.values if isinstance(self.weight, Sparse) else self.weight
        if not isinstance(found, Codebook):
            raise SchemeError(f"DKM: expected a clustered matrix to train, got {type(found).__name__}")
        return found

    def takes_shard(self, w: Tensor) -> bool:
        return (
            self.training
            and self.mask is None
            and self.scale is None
            and len(self.start) == 1
            and is_sharded(w, by_rows=True)
        )

    def advance(self, progress: float) -> None:
        self.tau.copy_(annealed(self.how.first, self.how.last, progress) * self.variance)

    def forward(self, w: Tensor) -> Tensor:
        if not self.training:
            return self._hard(w)
        return self._decoded(w) if self.mask is None else self._survivors(w, self.mask)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # how many survive is data
    def _survivors(self, w: Tensor, mask: Tensor) -> Tensor:
        if not bool(mask.any()):
            return w * 0
        return torch.zeros_like(w).masked_scatter(mask, self._decoded(w[mask].unsqueeze(0)))

    def _decoded(self, w: Tensor) -> Tensor:
        seen = _fingerprint(w)
        start = torch.where(seen == self.seen, self.start, self.centroids)
        decoded, last = dkm_decode(
            w,
            start,
            tau=self.tau,
            iterations=self.how.iterations,
            zero=self.how.zero,
            rows_per_table=self.book.rows_per_table if len(start) > 1 else None,
            scale=None if self.scale is None else self.scale.to(w.dtype),
            rounded=self.how.rounded if w.dtype == torch.float32 and start.shape[2] == 1 else None,
        )
        if decoded.requires_grad:
            with torch.no_grad():
                self.seen.copy_(seen)
                self.start.copy_(start)
                self.centroids.copy_(last)
        return decoded

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _hard(self, w: Tensor) -> Tensor:
        self._harden(w)
        return self.weight.forward().to(w.dtype)

    def _harden(self, w: Tensor) -> None:
        self.weight.to(w.device)
        if isinstance(self.weight, Sparse) and self.mask is not None:
            self.weight.set_mask(self.mask)
        self.book.set_tables(self.centroids, self.scale)
        self.weight.right_inverse(w)

    def stored(self, w: Tensor) -> Weight:
        with torch.no_grad():
            self._harden(w)
        return copy.deepcopy(self.weight)


def _check_survivors(weight: Sparse, book: Codebook) -> None:
    """Raises SchemeError unless the survivors of a pruned matrix can be clustered together."""
    if len(book.tables()) > 1:
        raise SchemeError("DKM: of a pruned matrix the survivors are clustered together; give one table (rows=None)")
    if book.row_scale is not None:
        raise SchemeError("DKM: of a pruned matrix the survivors are clustered together; row_scale=True has no meaning")
    kept = int(weight.mask.sum())
    if 0 < kept < 2**book.bit_width:
        raise SchemeError(f"DKM: {2**book.bit_width} centroids for {kept} weights that survive; use fewer bits")


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(w: Tensor) -> Tensor:
    """The sum of w's bits, which changes when w does: exact in any order, and never read by the CPU. Two changes that
    cancel go unseen, which costs a warm start. Of a DTensor the sum over its processes.
    """
    if is_sharded(w):
        from torch.distributed.tensor import DTensor

        assert isinstance(w, DTensor)
        total = _fingerprint(w.to_local())
        torch.distributed.all_reduce(total, group=w.device_mesh.get_group())
        return total
    return w.detach().view(_WORDS[w.element_size()]).sum(dtype=torch.int64)
