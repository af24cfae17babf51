"""How many samples a search takes until its best feasible one is within 1 % of the true s*, for six ways to choose them.

    python benchmarks/search_samples.py                # on recorded profiles, results/condensa-profile.json
    python benchmarks/search_samples.py --synthetic    # on curves with knees at random places, some with noise

A profile is a score at every sparsity, measured once and interpolated (monotone cubic), so a sample costs nothing here. Each is judged at five
levels: the allowed loss of the profile times 0.5, 0.75, 1, 1.5 and 2. s* is the largest sparsity of the profile that keeps the level; a search
has it when its largest sample that keeps the level is at most 0.01 of the profile's range away (0.01 of sparsity on a range of 0 to 1). Searches
that do not get there within the limit count as limit + 1. The uncompressed score is known to all of them and is no sample.
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, parser, record, show

import numpy as np
from scipy.interpolate import PchipInterpolator

from laconic.search.acquisition import ucb
from laconic.search.drucb import Rule, Sample, answer, propose
from laconic.search.gp import posterior

TOLERANCE = 0.01
LEVELS = (0.5, 0.75, 1.0, 1.5, 2.0)
LIMIT, RANDOM_LIMIT = 40, 1000
COLUMNS = ("rule", "median", "mean", "90 %", "worst", "within 6", "within 10", "not found", "searches", "seconds")


@dataclass(frozen=True)
class Case:
    """A profile with a level: what a search sees, and what it should find."""

    name: str
    curve: Callable[[float], float]
    bounds: tuple[float, float]
    reference: float
    level: float
    star: float

    @property
    def width(self) -> float:
        return self.bounds[1] - self.bounds[0]


Chooser = Callable[[list[Sample], Case, np.random.Generator], float]


def ruled(rule: Rule) -> Chooser:
    return lambda history, case, _: propose(history, case.level, case.bounds, rule, reference=case.reference).s


def bisection(history: list[Sample], case: Case, _: np.random.Generator) -> float:
    low = max((s for s, y in history if y >= case.level), default=case.bounds[0])
    return (low + min((s for s, y in history if y < case.level and s > low), default=case.bounds[1])) / 2


def uniform(_: list[Sample], case: Case, generator: np.random.Generator) -> float:
    return float(generator.uniform(*case.bounds))


def plain_ucb(history: list[Sample], case: Case, _: np.random.Generator) -> float:
    """The largest s whose upper confidence bound mu + 2.576 sigma still keeps the level, by DR-UCB's process and with the same first sample.

    The fairest of four readings tried: UCB of s with a penalty for what is lost, and UCB of -|y - L|, get nowhere in 40 samples, since a smooth
    process cannot follow their kinks.
    """
    low = case.bounds[0]
    if not history:
        return low + case.width / 2
    units = [(s - low) / case.width for s, _ in history]
    grid = np.arange(1, 1000) / 1000
    bound = ucb(*posterior([0.0, *units], [case.reference, *(y for _, y in history)], grid))
    return low + case.width * float(max(grid[bound >= case.level], default=grid[0]))


CHOOSERS: dict[str, Chooser] = {
    "two-sided (ours)": ruled(Rule()),
    "two-sided, margin": ruled(Rule(margin=0.002)),
    "DR-UCB as published": ruled(Rule("dr-ucb")),
    "ILS-UCB": ruled(Rule("ils-ucb")),
    "plain UCB": plain_ucb,
    "bisection": bisection,
    "random": uniform,
}


def samples_needed(choose: Chooser, case: Case, seed: int, limit: int) -> int:
    generator = np.random.default_rng(seed)
    history: list[Sample] = []
    while len(history) < limit:
        s = choose(history, case, generator)
        history.append((s, case.curve(s)))
        best = answer(history, case.level)
        if best is not None and abs(best[0] - case.star) <= TOLERANCE * case.width:
            return len(history)
    return limit + 1


def cases_of(profile: dict[str, Any]) -> list[Case]:
    """The profile at every level that it crosses; says which it does not."""
    points = sorted((p["sparsity"], p["score"]) for p in profile["points"])
    s, y = (np.array(values) for values in zip(*points, strict=True))
    reference = float(profile.get("reference", y[0]))
    curve = PchipInterpolator(s, y)
    grid = np.linspace(s[0], s[-1], 20001)
    scores = curve(grid)
    found = []
    for factor in LEVELS:
        level = reference - factor * (reference - profile["level"])
        kept = grid[scores >= level]
        if not len(kept) or kept[-1] == grid[-1] or not reference > level:
            print(f"{profile['name']}: does not cross {level:.4f}, left out", file=sys.stderr)
            continue
        found.append(
            Case(
                f"{profile['name']} at {factor:g}",
                lambda at: float(curve(at)),
                (float(s[0]), float(s[-1])),
                reference,
                level,
                float(kept[-1]),
            )
        )
    return found


def synthetic(count: int, seed: int) -> list[dict[str, Any]]:
    """Profiles of 41 points in four shapes (logistic, power from an onset, power, a slope with a cliff), a third each with noise of 0, 0.002 and
    0.004; s* for a loss of 0.02 uniform in 0.08 ... 0.97, some above the reference before the knee."""
    generator = np.random.default_rng(seed)
    s = np.linspace(0, 1, 41)
    made = []
    for i in range(count):
        star, reference, allowed = generator.uniform(0.08, 0.97), generator.uniform(0.7, 0.95), 0.02
        noise = (0.0, 0.002, 0.004)[(i // 4) % 3]
        shape = ("logistic", "onset", "power", "cliff")[i % 4]
        drop = _drop(shape, s, star, allowed, reference - 0.1, generator)
        bump = generator.uniform(-0.005, 0.01) * np.sin(np.pi * np.clip(s / star, 0, 1))
        y = np.maximum(reference - drop, 0.1) + bump + noise * generator.standard_normal(len(s))
        y[0] = reference
        points = [{"sparsity": float(a), "score": float(b)} for a, b in zip(s, y, strict=True)]
        made.append({"name": f"{shape} {i}, noise {noise}", "level": reference - allowed, "points": points})
    return made


def _drop(
    shape: str, s: np.ndarray, star: float, allowed: float, height: float, generator: np.random.Generator
) -> np.ndarray:
    """What is lost at s; `allowed` at `star`."""
    if shape == "logistic":
        width = math.exp(generator.uniform(math.log(0.006), math.log(0.08)))
        centre = star + width * math.log(height / allowed - 1)
        return height / (1 + np.exp(-(s - centre) / width))
    if shape == "onset":
        power, length = (
            generator.uniform(1, 3),
            min(math.exp(generator.uniform(math.log(0.005), math.log(0.1))), 0.9 * star),
        )
        return allowed * (np.clip(s - (star - length), 0, None) / length) ** power
    if shape == "power":
        return allowed * (s / star) ** generator.uniform(2, 12)
    gentle, steep = generator.uniform(0.2, 0.9), math.exp(generator.uniform(math.log(0.5), math.log(15)))
    length = min(allowed * (1 - gentle) / steep, star / 2)
    return allowed * (
        gentle * np.minimum(s / (star - length), 1) + (1 - gentle) * np.clip(s - (star - length), 0, None) / length
    )


def summarise(name: str, needed: Sequence[int], limit: int, seconds: float) -> dict[str, Any]:
    counts = np.array(needed)
    return {
        "rule": name, "median": float(np.median(counts)), "mean": float(counts.mean()), "90 %": float(np.quantile(counts, 0.9)),
        "worst": int(counts.max()), "within 6": float((counts <= 6).mean()), "within 10": float((counts <= 10).mean()),
        "not found": int((counts > limit).sum()), "searches": len(counts), "seconds": round(seconds, 1),
    }  # fmt: skip


def measure(cases: Sequence[Case], args: Namespace) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """(a row per rule, samples per rule and case of the rules without chance)."""
    rows, single = [], {}
    for name, choose in CHOOSERS.items():
        began, chance = time.time(), choose is uniform
        limit, seeds = (RANDOM_LIMIT, range(args.seed, args.seed + args.seeds)) if chance else (LIMIT, [args.seed])
        needed = [[samples_needed(choose, case, seed, limit) for seed in seeds] for case in cases]
        rows.append(summarise(name, [n for row in needed for n in row], limit, time.time() - began))
        if not chance:
            single[name] = {case.name: row[0] for case, row in zip(cases, needed, strict=True)}
    return rows, single


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--synthetic",
        type=int,
        nargs="?",
        const=48,
        default=0,
        metavar="N",
        help="N made-up profiles instead of recorded ones",
    )
    options.add_argument("--profiles", type=Path, default=RESULTS / "condensa-profile.json")
    options.add_argument(
        "--seeds", type=int, default=20, help="of the random search; the others have no chance in them"
    )
    args = options.parse_args()
    if args.synthetic:
        profiles = synthetic(args.synthetic, args.seed)
    elif args.profiles.is_file():
        profiles = json.loads(args.profiles.read_text())["profiles"]
    else:
        print(f"skipped: {args.profiles.name} is not recorded yet; see --synthetic", file=sys.stderr)
        raise SystemExit(0)
    cases = [case for profile in profiles for case in cases_of(profile)]
    rows, single = measure(cases, args)
    show(
        f"samples until s is within {TOLERANCE:.0%} of s*, {len(profiles)} profiles at {len(cases)} levels",
        rows,
        COLUMNS,
    )
    extra: dict[str, Any] = {"tolerance": TOLERANCE, "limit": LIMIT, "random_limit": RANDOM_LIMIT}
    if not args.synthetic:  # made-up profiles are made again from the seed
        extra |= {"stars": {case.name: round(case.star, 4) for case in cases}, "samples": single}
    name = "search_samples-synthetic" if args.synthetic else "search_samples"
    print(f"wrote {record(name, rows, args, **extra).name}")


if __name__ == "__main__":
    main()
