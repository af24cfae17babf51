"""GPTQ at a rate: error feedback onto an unbounded grid whose step is found so that the entropy-coded bytes meet a real number of bits.

High-resolution theory says what is optimal. With H = L L^T, a step s_k in column k and output sensitivity g (the mean of E[(dL/dy_r)^2]),
the loss grows by g s_k^2 L_kk^2 / 12 per entry at a rate of h - log2 s_k bits, so

- within a matrix the best steps are s_k ~ 1 / L_kk (reverse water-filling); half of that exponent is used, s_k ~ L_kk^-1/2, because L
  is estimated from a sample: on held-out text of another kind the full exponent loses what it wins on the calibration text;
- over the model, one slope for all: every matrix gets a mean square step proportional to 1 / (g D), D = mean of (s_k / s)^2 L_kk^2. Three
  quarters of that exponent are used: at 2.3 bits 1/2 and 1 both have more KL divergence on books-llama-7m than 3/4 (a tenth on a novel), since the
  theory holds for small errors only and g and D are estimates.

Both exponents were fitted on books-llama-7m, the benchmarks' own model.

Sources: Gersho & Gray 1992, section 9.9 (entropy-coded uniform quantization, 1.53 dB or 0.25 bit from the Gaussian rate-distortion bound at
high rate); Cover & Thomas, theorem 10.3.3 (reverse water-filling); Lifar et al. 2026 (WaterSIC) for the steps per column.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.column import Sweep, factor, layout, solve
from laconic.sites import Site, Stats
from laconic.weights import Codebook, ColumnWeight, Scaled, Uniform

_EXPONENT = 0.5  # of the column steps, see above
_SLOPE = 0.75  # of the exponent of one slope for all
_LEVELS = 16  # column steps are stored as 4-bit indices into a table of geometric steps
_SAMPLE_ROWS = 256  # rows on which the step is searched; rows are independent given H
_SAMPLE = 1 << 16  # entries whose entropy is looked at
_CLOSE = 0.004  # how far below the asked rate the result may end, as a share of it
_TRIES = 8


@dataclass(frozen=True)
class _Problem:
    """One matrix, its factor, and the relative column steps (None for one step)."""

    site: Site
    sweep: Sweep
    L: Tensor
    columns: Codebook | None

    def solved(self, step: float, rows: Tensor | None = None) -> ColumnWeight:
        """The weight at a step, of all rows or of some."""
        site = self.site if rows is None else self.site.having(W=self.site.W[rows], mask=None if self.site.mask is None else self.site.mask[rows])
        grid = Uniform((site.W.shape[0], site.W.shape[1]), bits=None, group="tensor", codec="ans").to(site.W.device)
        grid.set_step(step)
        weight: ColumnWeight = grid if self.columns is None else Scaled(grid, column_scale=self.columns)
        solve(weight, site, self.sweep, L=self.L)
        return weight


def solve_rate(site: Site, rate: float, sweep: Sweep) -> ColumnWeight:
    """The weight whose stored bits are at most `rate` per entry and, where the matrix is large enough to say so, within 0.4 % of it.

    The step is found on 256 rows by secants of the logarithm of the step, then corrected on the whole matrix. Cost: 3 to 5 sweeps of 256 rows
    and 1 to 3 of the whole. Raises: SchemeError when no step meets the rate (side information alone exceeds it).
    """
    W = site.W
    H = site.hessian if site.hessian is not None else torch.eye(W.shape[1], device=W.device).unsqueeze(0)
    shape = Uniform((1, W.shape[1]), bits=None, group="tensor", codec="ans")
    order = layout(shape, H, sweep.act_order)
    L = factor(H, order, sweep.damping, site.name, site.notes)
    diagonal = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2))
    problem = _Problem(site, sweep, L, column_steps(diagonal, W.shape[0]))
    target = math.floor(rate * W.numel())
    step = _first_guess(W, rate)
    if W.shape[0] > 2 * _SAMPLE_ROWS and len(L) == 1:
        rows = torch.linspace(0, W.shape[0] - 1, _SAMPLE_ROWS).long().to(W.device)
        step, _ = _search(problem, step, rate * _SAMPLE_ROWS * W.shape[1], rows)
    weight = _search(problem, step, target, None)[1]
    if weight.bits() > target:
        least = weight.bits() / W.numel()
        raise SchemeError(f"{site.name}: {W.shape[0]} x {W.shape[1]} entries cannot be stored in {rate} bits each; the least found is {least:.3f}")
    return weight


def _first_guess(W: Tensor, rate: float) -> float:
    """The step at which plain rounding of a sample of W would have the entropy asked for."""
    sample = W.reshape(-1)[:: max(1, W.numel() // _SAMPLE)].float()
    spread = float(sample.std()) or 1.0
    curve = _entropies(sample / spread)
    return float(spread * 2 ** float(_CURVE[int((curve - rate).abs().argmin())]))


def _search(problem: _Problem, step: float, target: float, rows: Tensor | None) -> tuple[float, ColumnWeight]:
    """The step whose stored bits come closest to `target` from below, and its weight; the smallest found if all lie above."""
    entries = (problem.site.W.shape[0] if rows is None else len(rows)) * problem.site.W.shape[1]
    known: list[tuple[float, float]] = []
    best, best_rank = (step, problem.solved(step, rows)), (False, -math.inf)
    for _ in range(_TRIES):
        weight = best[1] if not known else problem.solved(step, rows)
        bits = float(weight.bits())
        known.append((math.log2(step), bits))
        rank = (True, bits) if bits <= target else (False, -bits)  # below the target as high as possible, else as low as possible
        if rank > best_rank:
            best, best_rank = (step, weight), rank
        if (1 - _CLOSE) * target <= bits <= target:
            break
        step = _next(known, (1 - _CLOSE / 3) * target, entries)
    while not best_rank[0] and step < 1e6 * best[0]:  # the entropy does not fall smoothly with the step where few codes are left
        step = max(step, best[0]) * 1.01
        weight = problem.solved(step, rows)
        if weight.bits() <= target:
            return step, weight
    return best


def _next(known: list[tuple[float, float]], target: float, entries: int) -> float:
    """The step at which the bits, taken as piecewise linear in log2(step), meet the target; at first, a bit per octave."""
    x, bits = known[-1]
    below = max((point for point in known if point[1] <= target), key=lambda point: point[1], default=None)
    above = min((point for point in known if point[1] > target), key=lambda point: point[1], default=None)
    if below is not None and above is not None and above[1] > below[1]:
        share = (above[1] - target) / (above[1] - below[1])
        return float(2 ** (above[0] + min(max(share, 0.05), 0.95) * (below[0] - above[0])))
    slope = 1.0  # bits per octave and entry of fine grids; coarse ones have less
    if len(known) > 1 and known[-2][0] != x:
        slope = min(max((known[-2][1] - bits) / entries / (x - known[-2][0]), 0.2), 1.5)
    return float(2 ** (x + max(min((bits - target) / entries / slope, 3.0), -3.0)))


def column_steps(diagonal: Tensor, rows: int) -> Codebook | None:
    """Relative steps L_kk^-1/2 on a geometric table, from the factor's diagonal [groups, in]; None where they cost more than they win.

    What they win in theory is half the binary logarithm of the ratio of distortions at equal rate; they are used where that is 8 times the
    bits of the table and of 4 bits a column, since about half of it shows in practice and the coder wants column classes on top.
    """
    d = diagonal.float().square().mean(0).sqrt()
    gain = 0.5 * math.log2(float(_distortion(d, 0.0) / _distortion(d, _EXPONENT)))
    columns = len(d)
    if gain < 8 * (4 / rows + 16 * _LEVELS / (rows * columns)):
        return None
    relative = (d.log() * -_EXPONENT) - (d.log() * -_EXPONENT).mean()
    table = torch.linspace(float(relative.min()), float(relative.max()), _LEVELS).exp()
    steps = Codebook((1, columns), bits=4)
    steps.set_tables(table.view(1, -1, 1))
    steps.right_inverse(relative.exp().unsqueeze(0).cpu())
    return steps.to(diagonal.device)


def _distortion(d: Tensor, exponent: float) -> Tensor:
    """mean of s_k^2 L_kk^2 for steps s_k ~ L_kk^-exponent of unit geometric mean."""
    s = (d.log() * -exponent - (d.log() * -exponent).mean()).exp()
    return (s * d).double().square().mean()


class WaterFilling(Allocation):
    """One slope for all matrices: rates whose mean over the entries is `rate`, each matrix's step proportional to 1 / sqrt(g D)."""

    wants = Stats.HESSIAN | Stats.OUTPUT

    def __init__(self, method: Method, rate: float, sweep: Sweep) -> None:
        self.method, self.rate, self.sweep = method, rate, sweep
        self.seen: dict[str, tuple[int, float, Tensor, float]] = {}

    def observe(self, site: Site) -> None:
        H = site.hessian
        if H is None or site.output is None:
            raise SchemeError(f"{site.name}: a rate over the model needs Hessians and output gradients; use over='matrix'")
        order = layout(Uniform((1, H.shape[1]), bits=None, group="tensor", codec="ans"), H, self.sweep.act_order)
        L = factor(H, order, self.sweep.damping, site.name, [])
        diagonal = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2))
        steps = column_steps(diagonal, site.W.shape[0])
        relative = steps.forward() if steps is not None else torch.ones(1, H.shape[1], device=H.device)
        distortion = float((relative * diagonal).double().square().mean())
        g = float(site.output.double().mean())
        rows = torch.linspace(0, site.W.shape[0] - 1, min(_SAMPLE_ROWS, site.W.shape[0])).long().to(site.W.device)
        sample = (site.W[rows].float() / relative).reshape(-1)
        spread = float(sample.std()) or 1.0
        self.seen[site.name] = site.W.numel(), g * distortion, _entropies(sample / spread), spread

    def resolve(self) -> dict[str, Method]:
        from dataclasses import replace

        rates = self._rates()
        return {name: replace(self.method, rate=round(rate, 4), over="matrix") for name, rate in rates.items()}  # type: ignore[type-var]

    def _rates(self) -> dict[str, float]:
        entries = sum(n for n, _, _, _ in self.seen.values())
        # a matrix that moves no output still gets the coarsest grid, not a division by zero
        floor = 1e-6 * sum(n * weight for n, weight, _, _ in self.seen.values()) / entries or 1.0
        low, high = -60.0, 60.0  # log2 of the common factor of the steps
        for _ in range(60):
            middle = (low + high) / 2
            rates = {
                name: _read(curve, middle - 0.5 * _SLOPE * math.log2(max(weight, floor)) - math.log2(spread))
                for name, (_, weight, curve, spread) in self.seen.items()
            }
            mean = sum(rates[name] * self.seen[name][0] for name in rates) / entries
            low, high = (middle, high) if mean > self.rate else (low, middle)
        return rates


_CURVE = torch.linspace(-12, 4, 65)  # log2 of step / standard deviation at which entropies are tabulated


def _entropies(sample: Tensor) -> Tensor:
    """The entropy in bits of round(sample / step) at the tabulated steps, for a sample of unit standard deviation."""
    limit = math.log2(len(sample)) - 4  # a sample cannot show more than log2 of its size; finer steps cost a bit per octave
    curve = torch.zeros_like(_CURVE)
    for i in reversed(range(len(_CURVE))):
        codes = (sample / 2 ** float(_CURVE[i])).round().long()  # within 2^12 sqrt(n) of zero, since the sample has unit deviation
        counts = (codes - codes.min()).bincount().double()
        p = counts[counts > 0] / len(codes)
        curve[i] = -(p * p.log2()).sum()
        if curve[i] > limit:
            curve[:i] = curve[i] + (_CURVE[i] - _CURVE[:i])
            break
    return curve


def _read(curve: Tensor, exponent: float) -> float:
    """Linear interpolation of a tabulated entropy at log2(step / standard deviation); a bit per octave beyond the fine end."""
    x = (exponent - float(_CURVE[0])) / float(_CURVE[1] - _CURVE[0])
    if x < 0:
        return float(curve[0]) - x * float(_CURVE[1] - _CURVE[0])
    i = min(int(x), len(curve) - 2)
    return float(curve[i] + min(x - i, 1.0) * (curve[i + 1] - curve[i]))
