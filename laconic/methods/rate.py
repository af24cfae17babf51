"""GPTQ at a rate: error feedback onto an unbounded grid whose step is found so that the entropy-coded bytes meet a real
number of bits.

High-resolution theory says what is optimal. With H = L L^T, a step s_k in column k and output sensitivity g (the mean
of E[(dL/dy_r)^2]), the loss grows by g s_k^2 L_kk^2 / 12 per entry at a rate of h - log2 s_k bits, so

- within a matrix the best steps are s_k ~ 1 / L_kk (reverse water-filling); half of that exponent is used, s_k ~
  L_kk^-1/2, because L is estimated from a sample: on held-out text of another kind the full exponent loses what it wins
  on the calibration text;
- over the model, one slope for all: every matrix gets a mean square step proportional to 1 / (g D), D = mean of
  (s_k / s)^2 L_kk^2. Three quarters of that exponent are used: at 2.3 bits 1/2 and 1 both have more KL divergence on
  books-llama-7m than 3/4 (a tenth on a novel), since the theory holds for small errors only and g and D are estimates.

Both exponents were fitted on books-llama-7m, the benchmarks' own model.

Sources: Gersho & Gray 1992, section 9.9 (entropy-coded uniform quantization, 1.53 dB or 0.25 bit from the Gaussian
rate-distortion bound at high rate); Cover & Thomas, theorem 10.3.3 (reverse water-filling); Lifar et al. 2026
(WaterSIC) for the steps per column.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.model.sites import Site, Stats
from laconic.model.unmeasured import completed
from laconic.solvers.column import Sweep, factor, layout, solve
from laconic.weights import Codebook, ColumnWeight, Scaled, Uniform, entropy

_EXPONENT = 0.5  # of the column steps, see above
_SLOPE = 0.75  # of the exponent of one slope for all
_LEVELS = 16  # column steps are stored as 4-bit indices into a table of geometric steps
_SAMPLE_ROWS = 256  # rows on which the step is searched; rows are independent given H
_SAMPLE = 1 << 16  # entries whose entropy is looked at
_CLOSE = 0.004  # how far below the asked rate the result may end, as a share of it
_TRIES = 8
_SIDE = 0.25  # the share of a matrix's bits that column steps and all else beside the codes may take
_STEP_BYTES = 4
_MOST = 16.0  # bits per weight that a rate may be
_LONG_ROW = 24  # columns from which a step and a zero per row, 24 bits, are no more than a bit per entry
_WIDEST = 200.0  # log2 of the widest range of steps: float32 holds 2**-149 to 2**128


@dataclass(frozen=True)
class _Matrix:
    """One matrix, its factor, and the relative column steps (None for one step)."""

    site: Site
    sweep: Sweep
    L: Tensor
    columns: Codebook | None

    def solved(self, step: float, rows: Tensor | None = None) -> ColumnWeight:
        """The weight at a step, of all rows or of some."""
        site = self.site
        if rows is not None:
            site = site.having(W=site.W[rows], mask=None if site.mask is None else site.mask[rows])
        grid = Uniform((site.W.shape[0], site.W.shape[1]), bits=None, group="tensor", codec="ans").to(site.W.device)
        grid.set_step(step)
        weight: ColumnWeight = grid if self.columns is None else Scaled(grid, column_scale=self.columns)
        solve(weight, site, self.sweep, L=self.L)
        return weight


def least_bits(shape: tuple[int, int]) -> int:
    """The bits that an [out, in] matrix takes at any rate: what says how its codes are read, and its step."""
    return 8 * (entropy.least_bytes(shape) + _STEP_BYTES)


def is_small(shape: tuple[int, int], rate: float) -> bool:
    """Whether half of an [out, in] matrix's bits at a rate would go into side information: step, head, and a table of
    its codes.

    The table has a byte for each of the codes between -4 and 4 standard deviations, about 2 * 2**rate of them per
    deviation.
    """
    overhead = least_bits(shape) + 8 * 2 * 2**rate
    return 2 * overhead > rate * shape[0] * shape[1]


def solve_rate(site: Site, rate: float, sweep: Sweep) -> ColumnWeight:
    """The weight whose stored bits are at most `rate` per entry and, where the matrix is large enough to say so, within
    0.4 % of it.

    The step is found on 256 rows by secants of the logarithm of the step, then corrected on the whole matrix. Cost: 3
    to 5 sweeps of 256 rows and 1 to 3 of the whole. Raises: SchemeError when no step meets the rate (side information
    alone exceeds it).
    """
    W = site.W
    shape, target = (W.shape[0], W.shape[1]), math.floor(rate * W.numel())
    check_rate(shape, rate, site.name)
    H = site.hessian if site.hessian is not None else torch.eye(W.shape[1], device=W.device).unsqueeze(0)
    order = layout(Uniform((1, W.shape[1]), bits=None, group="tensor", codec="ans"), H, sweep.act_order)
    L = factor(H, order, sweep.damping, site.name, site.notes)
    diagonal = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2))
    steps = column_steps(diagonal, W.shape[0])
    if steps is not None and least_bits(shape) + steps.bits() > _SIDE * target:
        steps = None
    problem = _Matrix(site, sweep, L, steps)
    step = _first_guess(W, rate)
    if W.shape[0] > 2 * _SAMPLE_ROWS and len(L) == 1:
        rows = torch.linspace(0, W.shape[0] - 1, _SAMPLE_ROWS).long().to(W.device)
        step, _ = _search(problem, step, rate * _SAMPLE_ROWS * W.shape[1], rows)
    return _search(problem, step, target, None)[1]


def check_rate(shape: tuple[int, int], rate: float, name: str = "a matrix") -> None:
    """Raises SchemeError when what says how codes are read takes more than `rate` bits for each entry of an [out, in]
    matrix.
    """
    least = least_bits(shape)
    if least > math.floor(rate * shape[0] * shape[1]):
        raise SchemeError(
            f"{name}: {shape[0]} x {shape[1]} entries cannot be stored in {rate} bits each; the least is "
            f"{least / (shape[0] * shape[1]):.3f}. "
            "Give such matrices a fixed width in a plan: (entries < 1000, GPTQ(bits=8, group='channel'))"
        )


def _first_guess(W: Tensor, rate: float) -> float:
    """The step at which plain rounding of a sample of W would have the entropy asked for."""
    sample = W.reshape(-1)[:: max(1, W.numel() // _SAMPLE)].float()
    spread = _spread(sample)
    curve = _entropies(sample / spread)
    return float(spread * 2 ** float(_CURVE[int((curve - rate).abs().argmin())]))


def _spread(sample: Tensor) -> float:
    """The standard deviation of a sample; 1 where all of it is equal."""
    return float(sample.std(correction=0)) or 1.0


def _search(problem: _Matrix, step: float, target: float, rows: Tensor | None) -> tuple[float, ColumnWeight]:
    """The step whose stored bits come closest to `target` from below, and its weight; the smallest found if all lie
    above.
    """
    entries = (problem.site.W.shape[0] if rows is None else len(rows)) * problem.site.W.shape[1]
    known: list[tuple[float, float]] = []
    best, best_rank = (step, problem.solved(step, rows)), (False, -math.inf)
    for _ in range(_TRIES):
        weight = best[1] if not known else problem.solved(step, rows)
        bits = float(weight.bits())
        known.append((math.log2(step), bits))
        # below the target as high as possible, else as low as possible
        rank = (True, bits) if bits <= target else (False, -bits)
        if rank > best_rank:
            best, best_rank = (step, weight), rank
        if (1 - _CLOSE) * target <= bits <= target:
            break
        step = _next(known, (1 - _CLOSE / 3) * target, entries)
    growth = 1.01
    # the entropy does not fall smoothly with the step where few codes are left; in the end all codes are zero
    while not best_rank[0]:
        step, growth = max(step, best[0]) * growth, growth**1.5
        weight = problem.solved(step, rows)
        if weight.bits() <= target or not math.isfinite(step) or not weight.forward().any():
            return step, weight
    return best


def _next(known: list[tuple[float, float]], target: float, entries: int) -> float:
    """The step at which the bits, taken as piecewise linear in log2(step), meet the target; at first, a bit per
    octave.
    """
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
    """Relative steps L_kk^-1/2 on a geometric table, from the factor's diagonal [groups, in]; None where they cost more
    than they win.

    What they win in theory is half the binary logarithm of the ratio of distortions at equal rate; they are used where
    that is 8 times the bits of the table and of 4 bits a column, since about half of it shows in practice and the coder
    wants column classes on top.
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


@dataclass(frozen=True)
class _Observed:
    """What one matrix says of its rate: entries, g D, tabulated entropies, standard deviation, and the least bits per
    entry.
    """

    entries: int
    weight: float
    curve: Tensor
    spread: float
    floor: float

    def rate(self, exponent: float) -> float:
        """Stored bits per entry at log2 of the step, between what the format needs and what a rate may be."""
        return min(self.floor + _read(self.curve, exponent - math.log2(self.spread)), _MOST)


class WaterFilling(Allocation):
    """One slope for all matrices: rates whose mean over the entries is `rate`, each matrix's step proportional to 1 /
    sqrt(g D).

    Matrices so small that side information would take half of their bits are stored with 8 bits each, which the others
    make up for.
    """

    wants = Stats.HESSIAN | Stats.OUTPUT_FISHER

    def __init__(self, method: Method, rate: float, sweep: Sweep) -> None:
        self.method, self.rate, self.sweep = method, rate, sweep
        self.seen: dict[str, _Observed] = {}
        self.small: dict[str, tuple[int, Method]] = {}
        self.small_bits = 0.0
        self.notes: list[str] = []

    def observe(self, site: Site) -> None:
        site = completed(site.having(notes=[]), self.wants)  # whoever solves the site says what is missing
        shape, H = (site.W.shape[0], site.W.shape[1]), site.hessian
        assert H is not None
        assert site.output_fisher is not None
        if is_small(shape, self.rate):
            width = fixed_width(self.method, shape)
            self.small[site.name] = site.W.numel(), width
            self.small_bits += width.expected_bits(shape)
            return
        order = layout(Uniform((1, H.shape[1]), bits=None, group="tensor", codec="ans"), H, self.sweep.act_order)
        L = factor(H, order, self.sweep.damping, site.name, [])
        diagonal = torch.empty_like(L[:, 0]).index_copy_(1, order, L.diagonal(dim1=1, dim2=2))
        steps = column_steps(diagonal, shape[0])
        relative = steps.forward() if steps is not None else torch.ones(1, H.shape[1], device=H.device)
        distortion = float((relative * diagonal).double().square().mean())
        g = float(site.output_fisher.double().mean())
        rows = torch.linspace(0, shape[0] - 1, min(_SAMPLE_ROWS, shape[0])).long().to(site.W.device)
        sample = (site.W[rows].float() / relative).reshape(-1)
        spread = _spread(sample)
        floor = least_bits(shape) / site.W.numel()
        self.seen[site.name] = _Observed(site.W.numel(), g * distortion, _entropies(sample / spread), spread, floor)

    def resolve(self) -> dict[str, Method]:
        entries = sum(site.entries for site in self.seen.values())
        beside = sum(n for n, _ in self.small.values())
        left = self.rate * (entries + beside) - self.small_bits
        rates = self._rates(left / entries) if entries else {}
        found: dict[str, Method] = {}
        for name, rate in rates.items():
            found[name] = replace(self.method, rate=rate, over="matrix")  # type: ignore[type-var]
        self._tell(sum(site.entries * rates[name] for name, site in self.seen.items()), left, entries + beside)
        return found | {name: width for name, (_, width) in self.small.items()}

    def _tell(self, spent: float, left: float, entries: int) -> None:
        """Note which matrices were too small for a rate, and what the mean comes to where it cannot be met."""
        self.notes = []
        if self.small:
            names = ", ".join(list(self.small)[:3]) + (" ..." if len(self.small) > 3 else "")
            count = "1 matrix is" if len(self.small) == 1 else f"{len(self.small)} matrices are"
            self.notes.append(
                f"{count} too small for an entropy-coded grid at {self.rate} bits, and stored with 8 ({names})"
            )
        if spent > 1.01 * left:
            mean = self.rate + (spent - left) / max(entries, 1)
            self.notes.append(
                f"{self.method!r}: {mean:.3f} bits on average is the least that the format can hold of these matrices"
            )

    def _rates(self, mean: float) -> dict[str, float]:
        entries = sum(site.entries for site in self.seen.values())
        # a matrix that moves no output still gets the coarsest grid, not a division by zero
        least = 1e-6 * sum(site.entries * site.weight for site in self.seen.values()) / entries or 1.0
        low, high = -_WIDEST, _WIDEST  # log2 of the common factor of the steps
        rates: dict[str, float] = {}
        for _ in range(60):
            middle = (low + high) / 2
            rates = {
                name: site.rate(middle - 0.5 * _SLOPE * math.log2(max(site.weight, least)))
                for name, site in self.seen.items()
            }
            total = sum(rates[name] * site.entries for name, site in self.seen.items()) / entries
            low, high = (middle, high) if total > mean else (low, middle)
        # rounded to be read, but never below what the format needs
        return {
            name: max(math.floor(rate * 1e4), math.ceil(self.seen[name].floor * 1e4)) / 1e4
            for name, rate in rates.items()
        }


def fixed_width(method: Method, shape: tuple[int, int]) -> Method:
    """A rate's method with 8 bits for each entry instead, a step per row, or one in all where rows are too short to pay
    for their own.
    """
    group = "channel" if shape[1] >= _LONG_ROW else "tensor"
    return replace(method, rate=None, bits=8, group=group, over="model")  # type: ignore[type-var]


_CURVE = torch.linspace(-12, 4, 65)  # log2 of step / standard deviation at which entropies are tabulated


def _entropies(sample: Tensor) -> Tensor:
    """The entropy in bits of round(sample / step) at the tabulated steps, for a sample of unit standard deviation."""
    # a sample cannot show more than log2 of its size; finer steps cost a bit per octave
    limit = math.log2(len(sample)) - 4
    curve = torch.zeros_like(_CURVE)
    for i in reversed(range(len(_CURVE))):
        # within 2^12 sqrt(n) of zero, since the sample has unit deviation
        codes = (sample / 2 ** float(_CURVE[i])).round().long()
        counts = (codes - codes.min()).bincount().double()
        p = counts[counts > 0] / len(codes)
        curve[i] = -(p * p.log2()).sum()
        if curve[i] > limit:
            curve[:i] = curve[i] + (_CURVE[i] - _CURVE[:i])
            break
    return curve


def _read(curve: Tensor, exponent: float) -> float:
    """Linear interpolation of a tabulated entropy at log2(step / standard deviation); a bit per octave beyond the fine
    end.
    """
    x = (exponent - float(_CURVE[0])) / float(_CURVE[1] - _CURVE[0])
    if x < 0:
        return float(curve[0]) - x * float(_CURVE[1] - _CURVE[0])
    i = min(int(x), len(curve) - 2)
    return float(curve[i] + min(x - i, 1.0) * (curve[i + 1] - curve[i]))
