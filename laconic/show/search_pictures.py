"""Pictures of a search, as inline SVG: learning curves, layers, Pareto fronts, scatter; and what they share with the
sparsity profile.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

from laconic.show.page import inline_svg

# Okabe and Ito's colours, told apart by colour-blind readers; every kind also has a mark or a dash of its own
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#AA4499", "#8a939c"
Values = dict[str, Any]
_HALO = withStroke(linewidth=2.5, foreground="white")  # keeps numbers legible on lines


def is_measured(trial: Values) -> bool:
    """Whether a trial has come to a score."""
    return trial.get("state", "complete") == "complete" and is_number(trial.get("score"))


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def goals_of(result: Values) -> list[Values]:
    """The objectives, one or several, each with name and direction."""
    given = result["objective"]
    return list(given) if isinstance(given, list) else [given]


def objectives_of(holder: Values | None) -> list[Any]:
    """The objectives' values of a trial, of the reference or of the best; none if there are none."""
    found = (holder or {}).get("objective")
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def plain_text(text: object, most: int = 40) -> str:
    """A name as matplotlib shows it letter by letter; of a long one the beginning and the end, so that the axes keep
    their room.
    """
    name = str(text)
    name = name if len(name) <= most else f"{name[: most // 3]}...{name[-(most - most // 3 - 3) :]}"
    return name.replace("$", r"\$")


def clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def number_points(axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write a text beside each point, where it meets no other text and no point: the first free place of sixteen around
    it.
    """
    scale = 100 / 72  # points to the figure's pixels
    at = [axes.transData.transform(p) for p in points]
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in at]
    places = [
        (math.sin(a) * r, math.cos(a) * r)
        for r in (11, 19)
        for a in (0, math.pi, *(k * math.pi / 4 for k in (1, 7, 3, 5, 2, 6)))
    ]
    for (px, py), point, text in zip(at, points, texts, strict=True):
        half = 3.4 * len(text) + 0.5

        def box(
            place: tuple[float, float], x: float = px, y: float = py, half: float = half
        ) -> tuple[float, float, float, float]:
            x, y = x + place[0] * scale, y + place[1] * scale
            return x - half * scale, y - 5 * scale, x + half * scale, y + 5 * scale

        place = next((p for p in places if not any(_meet(box(p), other) for other in taken)), places[0])
        taken.append(box(place))
        axes.annotate(
            text,
            point,
            place,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            zorder=9,
            path_effects=[_HALO],
        )


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Limits of an axis that shows the values with room at either end."""
    low, high = min(values), max(values)
    room = share * (high - low) or share * abs(high) or share
    return low - room, high + room


def free_axis(axes: Axes, name: str, bounds: Values, values: Sequence[float]) -> None:
    if bounds.get("log"):
        axes.set_xscale("log")
        axes.set_xlim(bounds.get("low"), bounds.get("high"))
    elif is_number(bounds.get("low")) and is_number(bounds.get("high")):
        axes.set_xlim(*padded([bounds["low"], bounds["high"]], 0.02))
    elif values:
        axes.set_xlim(*padded(values))
    axes.set_xlabel(plain_text(name))


def searched_number(result: Values) -> str | None:
    """The name of what was searched, if that is one number."""
    free = result.get("free") or {}
    if len(free) != 1 or next(iter(free.values())).get("choices"):
        return None
    return str(next(iter(free)))


def curves_picture(result: Values) -> str:
    """The score of the compressed model against minibatches, a line per trial, dashed where a trial was stopped
    early.
    """
    trials = [t for t in result["trials"] if any(is_number(p.get("score")) for p in t.get("curve") or [])]
    if not trials:
        return ""
    figure = Figure(figsize=(11.5, 5.2), layout="constrained", dpi=100)
    axes = figure.subplots()
    shades, best = _shades(len(trials)), (result.get("best") or {}).get("trial")
    ends, texts = [], []
    for trial, shade in zip(trials, shades, strict=True):
        points = [(p["minibatches"], p["score"]) for p in trial["curve"] if is_number(p.get("score"))]
        chosen = trial["number"] == best
        axes.plot(
            *zip(*points, strict=True),
            color="#1b1f24" if chosen else shade,
            linewidth=2.4 if chosen else 1.3,
            marker="o",
            markersize=3,
            linestyle=(0, (4, 2)) if trial.get("stopped_early") else "-",
            zorder=4 if chosen else 3,
        )
        ends.append(points[-1])
        texts.append(f"{trial['number'] + 1}{'*' if chosen else ''}")
    axes.axhline(result["floor"], color=GREEN, linewidth=1.5)
    axes.annotate(
        "level set",
        (0.005, result["floor"]),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=GREEN,
        fontsize=9,
    )
    axes.set_xlabel("minibatches of training")
    axes.set_ylabel("score on validation data")
    axes.set_xlim(*padded([p["minibatches"] for t in trials for p in t["curve"]], 0.04))
    clean(axes)
    figure.draw_without_rendering()
    number_points(axes, ends, texts)
    return inline_svg(figure)


def _shades(count: int) -> list[tuple[float, ...]]:
    """So many colours from dark to light, their order visible also in grey."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def layers_picture(layers: Sequence[Values]) -> str:
    """Milliseconds of every layer before and after as bars, the compression ratio as a line: figure 5 of Condensa."""
    rows = [
        row
        for row in layers
        if row.get("entries_before") and is_number(row.get("ms_before")) and is_number(row.get("ms_after"))
    ]
    if not rows:
        return ""
    at, wide = list(range(len(rows))), len(rows) > 24
    figure = Figure(figsize=(min(8 + 0.16 * len(rows), 15), 5.2), layout="constrained", dpi=100)
    axes = figure.subplots()
    axes.bar(
        [i - 0.2 for i in at], [row["ms_before"] for row in rows], 0.4, color="#b9c2cc", label="milliseconds before"
    )
    axes.bar([i + 0.2 for i in at], [row["ms_after"] for row in rows], 0.4, color=BLUE, label="milliseconds after")
    axes.set_ylabel("milliseconds")
    every = -(-len(rows) // 72)
    axes.set_xticks(
        at[::every], [plain_text(row["name"]) for row in rows][::every], rotation=90, fontsize=7 if wide else 9
    )
    axes.set_xlim(-0.7, len(rows) - 0.3)
    other = axes.twinx()
    kept = [(i, row["entries_before"] / row["nonzero"]) for i, row in enumerate(rows) if row.get("nonzero")]
    if kept:
        other.plot(
            *zip(*kept, strict=True),
            color=RED,
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            label="entries before / non-zeros after",
        )
    other.set_ylim(0, max([1.0, *(r for _, r in kept)]) * 1.12)
    other.set_ylabel("compression ratio", color=RED)
    other.tick_params(axis="y", colors=RED)
    other.spines[["top", "left"]].set_visible(False)
    other.spines["right"].set_color(RED)
    clean(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return inline_svg(figure)


def pareto_picture(result: Values) -> str:
    """The first objective against each other one: kept trials, trials below the level set, and the front. Empty for one
    objective.
    """
    goals = goals_of(result)
    trials = [t for t in result["trials"] if is_measured(t) and len(objectives_of(t)) == len(goals) > 1]
    if not trials:
        return ""
    figure = Figure(figsize=(5.5 * (len(goals) - 1) + 2, 5), layout="constrained", dpi=100)
    front = [t for t in trials if t["number"] in result.get("pareto", [])]
    for k, axes in enumerate(figure.subplots(1, len(goals) - 1, squeeze=False)[0], start=1):
        points = [(objectives_of(t)[0], objectives_of(t)[k]) for t in trials]
        _feasible(axes, trials, points, result["floor"])
        best = sorted((objectives_of(t)[0], objectives_of(t)[k]) for t in front)
        if best:
            axes.plot(*zip(*best, strict=True), color="#1b1f24", linewidth=1.2, label="Pareto front")
        for axis, goal in ((axes.xaxis, goals[0]), (axes.yaxis, goals[k])):
            axis.set_label_text(plain_text(f"{goal['name']}, {goal['direction']}d"))
            axis.set_major_formatter(EngFormatter())
        clean(axes)
        axes.margins(0.1)
        if k == 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.draw_without_rendering()
        number_points(axes, points, [str(t["number"] + 1) for t in trials])
    return inline_svg(figure)


def _feasible(axes: Axes, trials: list[Values], points: list[tuple[float, float]], floor: float) -> None:
    for kept, colour, mark, label in (
        (True, BLUE, "o", "keeps the score"),
        (False, ORANGE, "X", "below the level set"),
    ):
        some = [p for p, t in zip(points, trials, strict=True) if (t["score"] >= floor) == kept]
        if some:
            axes.plot(*zip(*some, strict=True), linestyle="", color=colour, marker=mark, markersize=8, label=label)


def parameters_picture(result: Values) -> str:
    """The score against each of several free hyper-parameters, or against one that is a choice."""
    free, trials = result.get("free") or {}, [t for t in result["trials"] if is_measured(t)]
    if not trials or not free or searched_number(result) is not None:
        return ""
    columns = min(3, len(free))
    rows = -(-len(free) // columns)
    figure = Figure(figsize=(min(11.5, 3.7 * columns + 1.5), 3.2 * rows + 0.5), layout="constrained", dpi=100)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, (name, bounds) in zip(panels, free.items(), strict=False):
        texts = [str(c) for c in bounds.get("choices") or []]
        xs = [texts.index(str(t["values"][name])) if texts else t["values"][name] for t in trials]
        _feasible(axes, trials, [(x, t["score"]) for x, t in zip(xs, trials, strict=True)], result["floor"])
        axes.axhline(result["floor"], color=GREEN, linewidth=1.2, label="level set")
        if texts:
            axes.set_xticks(range(len(texts)), [plain_text(text) for text in texts])
            axes.set_xlim(-0.6, len(texts) - 0.4)
            axes.set_xlabel(plain_text(name))
        else:
            free_axis(axes, name, bounds, xs)
        for x, trial in zip(xs, trials, strict=True):
            if trial["number"] == (result.get("best") or {}).get("trial"):
                axes.plot(
                    x,
                    trial["score"],
                    "o",
                    markersize=15,
                    markerfacecolor="none",
                    markeredgecolor="#1b1f24",
                    label="chosen",
                )
        clean(axes)
    for axes in panels[len(free) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("score on validation data")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return inline_svg(figure)
