"""The iteration of differentiable k-means and its exact derivative, over points that occur several times, a block at a
time.

Points v [tables, n, d] occur `counts` [tables, n] times (None: once). With attention A_k(v) =
softmax_k(-|v - c_k|^2 / tau):

    S_k = sum n A_k,  M_k = sum n A_k v,  c'_k = M_k / S_k             one iteration
    f(v) = sum_k A_k c_k                                               the decoded value

Nothing of size n x K outlives a block; the derivative computes it again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_MASS = 1e-30  # a centroid whose weights' attentions sum to less stays where it is: its mean is 0 / 0
_BLOCK = 1 << 18  # attentions held at a time: 1 MB in float32, which stays in a core's cache

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Iteration:
    """How the iteration runs: temperature, most iterations, the move that ends it (0: none does), whether the first
    centroid stays at 0.
    """

    tau: float
    iterations: int
    tolerance: float = 0.0
    zero: bool = False

    def hold(self, c: Tensor) -> Tensor:
        """c [tables, K, d], or a gradient with respect to it, with the centroid that is held at zero set to zero."""
        if not self.zero:
            return c
        return torch.cat([torch.zeros_like(c[:, :1]), c[:, 1:]], 1)


@dataclass(frozen=True)
class Points:
    """Vectors [tables, n, d] in any float type with how often they occur, computed with in `dtype`; `reduce` sums over
    processes.
    """

    values: Tensor
    counts: Tensor | None
    dtype: torch.dtype
    reduce: Reduce

    def blocks(self, centroids: int) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of the points with their values [tables, b, d] and counts [tables, 1, b]."""
        step = max(1, _BLOCK // (centroids * len(self.values)))
        for start in range(0, self.values.shape[1], step):
            part = slice(start, start + step)
            counts = None if self.counts is None else self.counts[:, part].unsqueeze(1)
            yield part, self.values[:, part].to(self.dtype), counts


@dataclass(frozen=True)
class Path:
    """Where the centroids went: `centroids` t = 0..T, and for every iteration S_k [tables, K, 1] with whether it moved
    c_k [tables, K, 1].
    """

    centroids: list[Tensor]
    masses: list[Tensor]
    moving: list[Tensor]

    @property
    def last(self) -> Tensor:
        return self.centroids[-1]


def attention(v: Tensor, c: Tensor, tau: float) -> Tensor:
    """A [tables, K, b] for points [tables, b, d] and centroids [tables, K, d]; points last, where processors add many
    at a time.
    """
    distance = (v[..., 0].unsqueeze(1) - c[..., 0].unsqueeze(2)).square_()
    # one coordinate after the other: differences are not cancelled away, and no [b, K, d] is made
    for j in range(1, v.shape[2]):
        distance += (v[..., j].unsqueeze(1) - c[..., j].unsqueeze(2)).square_()
    return torch.softmax(distance.mul_(-1 / tau), 1)


def follow(points: Points, start: Tensor, rule: Iteration) -> Path:
    """The centroids from `start` [tables, K, d] on; a table whose centroids moved by at most the tolerance stays as it
    is.
    """
    c = rule.hold(start)
    path = Path([c], [], [])
    active = torch.ones(len(c), 1, 1, dtype=torch.bool, device=c.device)
    for _ in range(rule.iterations):
        sums = torch.zeros(
            len(c),
            c.shape[1],
            1 + c.shape[2],
            dtype=torch.float64 if c.device.type != "mps" else c.dtype,
            device=c.device,
        )
        for _, v, n in points.blocks(c.shape[1]):
            A = attention(v, c, rule.tau)
            A = A if n is None else A * n
            sums[..., :1] += A.sum(2, keepdim=True)
            sums[..., 1:] += A @ v
        mass, total = points.reduce(sums).to(c.dtype).split([1, c.shape[2]], 2)
        moves = active & ~(mass <= LEAST_MASS)  # NaN moves on, and is seen in the end
        mass = torch.where(moves, mass, 1.0)
        new = rule.hold(torch.where(moves, total / mass, c))
        path.centroids.append(new)
        path.masses.append(mass)
        path.moving.append(moves)
        if rule.tolerance > 0:
            active = active & ((new - c).abs().amax((1, 2), keepdim=True) > rule.tolerance)
            if not bool(active.any()):
                break
        c = new
    return path


def decode_points(v: Tensor, c: Tensor, tau: float) -> Tensor:
    """f(v) = A c, for points v [tables, b, d] and centroids c [tables, K, d]."""
    return attention(v, c, tau).mT @ c


def decode_slope(v: Tensor, c: Tensor, tau: float) -> Tensor:
    """f'(v) for scalars with the centroids held fixed: 2 / tau times the variance of c under A, [tables, b, 1]."""
    A = attention(v, c, tau)
    return (A * (c - c.mT @ A).square()).sum(1).unsqueeze(2) * (2 / tau)


def decode_backward(points: Points, c: Tensor, grad: Tensor, rule: Iteration, into: Tensor | None = None) -> Tensor:
    """The gradient of sum_v grad(v) . f(v) with respect to c [tables, K, d]; if `into` [tables, n, d] is given, that of
    v is added there.

    `grad` [tables, n, d] is summed over occurrences already. With Q_k = A_k grad . (c_k - f), which sums to zero over
    k: dL/dc_k = sum_v A_k grad + 2/tau Q_k (v - c_k), dL/dv = 2/tau sum_k Q_k c_k.
    """
    gradient = torch.zeros(c.shape, dtype=torch.float64 if c.device.type != "mps" else c.dtype, device=c.device)
    for part, v, _ in points.blocks(c.shape[1]):
        g = grad[:, part].to(c.dtype)
        A = attention(v, c, rule.tau)
        Q = _centred(A, c @ g.mT)
        gradient += A @ g + (2 / rule.tau) * (Q @ v - Q.sum(2, keepdim=True) * c)
        if into is not None:
            into[:, part] += (2 / rule.tau) * (Q.mT @ c)
    return rule.hold(points.reduce(gradient).to(c.dtype))


def follow_backward(points: Points, path: Path, grad: Tensor, rule: Iteration, into: Tensor) -> Tensor:
    """The gradient [tables, K, d] at the first centroids, given `grad` at the last; adds h, the gradient of every
    single occurrence of a point, to `into`.

    One iteration back, with m_k = g_k / S_k, D_k = m_k . (v - c'_k) the derivative by A_k(v), and Q_k = A_k
    (D_k - sum_j A_j D_j): h(v) += sum_k A_k m_k + 2/tau Q_k c_k, and g_k <- 2/tau sum_v n Q_k (v - c_k), which is how
    c_k acts through the attention.
    """
    for t in reversed(range(len(path.masses))):
        c, new, moves = path.centroids[t], path.centroids[t + 1], path.moving[t]
        m = torch.where(moves, grad / path.masses[t], 0.0)
        shift = (m * new).sum(2, keepdim=True)
        sums = torch.zeros(c.shape, dtype=torch.float64 if c.device.type != "mps" else c.dtype, device=c.device)
        for part, v, n in points.blocks(c.shape[1]):
            A = attention(v, c, rule.tau)
            Q = _centred(A, m @ v.mT - shift)
            into[:, part] += A.mT @ m + (2 / rule.tau) * (Q.mT @ c)
            Q = Q if n is None else Q * n
            sums += (2 / rule.tau) * (Q @ v - Q.sum(2, keepdim=True) * c)
        grad = rule.hold(points.reduce(sums).to(c.dtype) + torch.where(moves, 0.0, grad))
    return grad


def _centred(A: Tensor, D: Tensor) -> Tensor:
    """Q_k = A_k (D_k - sum_j A_j D_j) [tables, K, b]: the derivative of softmax."""
    return D.sub_((A * D).sum(1, keepdim=True)).mul_(A)
