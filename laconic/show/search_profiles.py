"""The sparsity profile of a search, and how each of its samples was chosen, as inline SVG."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from laconic.show.page import inline_svg
from laconic.show.search_pictures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Values,
    clean,
    free_axis,
    goals_of,
    is_measured,
    is_number,
    number_points,
    objectives_of,
    padded,
    plain_text,
    searched_number,
)


def profile_picture(result: Values) -> str:
    """Score and objective against the one free number: figures 1, 3 and 4 of Condensa; beside it the neighbourhood of
    the chosen one.

    Empty where something else than one number was searched.
    """
    name = searched_number(result)
    trials = [t for t in result["trials"] if is_measured(t)]
    if name is None or not trials:
        return ""
    near = _neighbours(result, name, trials)
    figure = Figure(figsize=(11.5, 5.4), layout="constrained", dpi=100)
    panels = figure.subplots(1, 2, width_ratios=(5, 3)) if near else [figure.subplots()]
    axes = panels[0]
    _draw_scores(axes, result, name, trials)
    direct = [t["direct_score"] for t in trials if is_number(t.get("direct_score"))]
    axes.set_ylim(*padded([*(t["score"] for t in trials), *direct, *_levels(result)]))
    free_axis(axes, name, result["free"][name], [t["values"][name] for t in trials])
    axes.set_ylabel("score on validation data")
    _mark_best(axes, result, name)
    _objective_axis(axes, result, name, trials)
    clean(axes)
    handles = {
        label: handle for one in figure.axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    if near:
        _draw_scores(panels[1], result, name, trials)
        panels[1].set_xlim(*padded([t["values"][name] for t in near], 0.15))
        panels[1].set_ylim(*padded([*(t["score"] for t in near), *_levels(result)], 0.15))
        panels[1].set_xlabel(plain_text(name))
        panels[1].set_title("around the chosen one", fontsize=10, loc="left")
        _mark_best(panels[1], result, name, text=False)
        clean(panels[1])
    figure.draw_without_rendering()
    for one, some in zip(panels, (trials, near), strict=False):
        number_points(one, [(t["values"][name], t["score"]) for t in some], [str(t["number"] + 1) for t in some])
    return inline_svg(figure)


def _draw_scores(axes: Axes, result: Values, name: str, trials: list[Values]) -> None:
    """The samples, what stage 1 last believed of the score, the reference, the level set, and direct compression."""
    posterior = next((t["posterior"] for t in reversed(trials) if t.get("posterior") and t.get("stage", 1) == 1), None)
    if posterior is not None:
        low, high = _band(posterior)
        axes.fill_between(
            posterior["x"], low, high, color=BLUE, alpha=0.13, linewidth=0, label="model of the score, ± 2 sd"
        )
        axes.plot(posterior["x"], posterior["mean"], color=BLUE, linewidth=1.4)
    reference = (result.get("reference") or {}).get("score")
    if reference is not None:
        axes.axhline(reference, color=GREY, linewidth=1, linestyle=(0, (1, 2)), label="reference")
    axes.axhline(result["floor"], color=GREEN, linewidth=1.5, label="level set")
    direct = sorted((t["values"][name], t["direct_score"]) for t in trials if is_number(t.get("direct_score")))
    if direct:
        axes.plot(
            *zip(*direct, strict=True), color=GREY, linewidth=1.4, marker="x", markersize=5, label="direct compression"
        )
    for stage, colour, mark in ((1, BLUE, "o"), (2, PURPLE, "s")):
        some = [(t["values"][name], t["score"]) for t in trials if t.get("stage", 1) == stage]
        if some:
            axes.plot(
                *zip(*some, strict=True),
                linestyle="",
                color=colour,
                marker=mark,
                markersize=8,
                zorder=5,
                label=f"samples, stage {stage}",
            )


def _band(posterior: Values) -> tuple[list[float], list[float]]:
    """Two standard deviations below and above a model's mean."""
    pairs = list(zip(posterior["mean"], posterior["std"], strict=True))
    return [m - 2 * s for m, s in pairs], [m + 2 * s for m, s in pairs]


def _levels(result: Values) -> list[float]:
    """The level set, and the reference's score where there is one."""
    reference = (result.get("reference") or {}).get("score")
    return [result["floor"]] if reference is None else [result["floor"], reference]


def _neighbours(result: Values, name: str, trials: list[Values], most: int = 6) -> list[Values]:
    """The samples nearest to the chosen one, if they lie close enough together to be worth a picture of their own."""
    best = result.get("best")
    if best is None or len(trials) <= most:
        return []
    near = sorted(trials, key=lambda t: abs(t["values"][name] - best["values"][name]))[:most]
    everything, there = [t["values"][name] for t in trials], [t["values"][name] for t in near]
    return near if 0 < max(there) - min(there) < 0.5 * (max(everything) - min(everything)) else []


def _objective_axis(axes: Axes, result: Values, name: str, trials: list[Values]) -> None:
    """The first objective on an axis of its own, red as in the paper."""
    points = sorted(
        (t["values"][name], objectives_of(t)[0]) for t in trials if objectives_of(t) and is_number(objectives_of(t)[0])
    )
    if not points:
        return
    goal, other = goals_of(result)[0], axes.twinx()
    other.plot(
        *zip(*points, strict=True),
        color=RED,
        linewidth=1.2,
        linestyle="--",
        marker="D",
        markersize=4,
        label=plain_text(goal["name"]),
    )
    other.set_ylim(*padded([y for _, y in points], 0.12))
    other.set_ylabel(plain_text(f"{goal['name']}, {goal['direction']}d"), color=RED)
    other.tick_params(axis="y", colors=RED)
    other.yaxis.set_major_formatter(EngFormatter())
    other.spines[["top", "left"]].set_visible(False)
    other.spines["right"].set_color(RED)
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)


def _mark_best(axes: Axes, result: Values, name: str, text: bool = True) -> None:
    best = result.get("best")
    if best is None:
        return
    x = best["values"][name]
    axes.axvline(x, color="#1b1f24", linewidth=1.3, linestyle=(0, (5, 3)))
    if not text:
        return
    low, high = axes.get_xlim()
    left = x > (low + high) / 2 if not result["free"][name].get("log") else x > math.sqrt(low * high)
    axes.annotate(
        f"chosen: {x:.4g}",
        (x, 1.01),
        xycoords=("data", "axes fraction"),
        ha="right" if left else "left",
        va="bottom",
        fontsize=10,
    )


def posteriors_picture(result: Values, most: int = 12) -> str:
    """What the search believed before each sample, where the next one was worth most, and where it was taken; a panel
    per sample.
    """
    name, trials = searched_number(result), result["trials"]
    shown = [t for t in trials if t.get("posterior")][:most]
    if name is None or not shown:
        return ""
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(11.5, 2.5 * rows + 0.3), layout="constrained", dpi=100)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, trial in zip(panels, shown, strict=False):
        _posterior(axes, result, name, trial)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    return inline_svg(figure)


def _posterior(axes: Axes, result: Values, name: str, trial: Values) -> None:
    """One panel: the model of stage 1 is of the score, that of stage 2 of the objective."""
    p, first = trial["posterior"], trial.get("stage", 1) == 1
    colour = BLUE if first else RED
    low, high = _band(p)
    axes.fill_between(p["x"], low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(p["x"], p["mean"], color=colour, linewidth=1.2)
    earlier = [t for t in result["trials"] if is_measured(t) and t["number"] < trial["number"]]
    known = [
        (t["values"][name], t["score"] if first else objectives_of(t)[0]) for t in earlier if first or objectives_of(t)
    ]
    if known:
        axes.plot(*zip(*known, strict=True), linestyle="", marker="o", markersize=4, color="#1b1f24")
    if first:
        axes.axhline(result["floor"], color=GREEN, linewidth=1)
    least, most = padded([*low, *high, *(y for _, y in known)], 0.04)
    axes.set_ylim(least - 0.3 * (most - least), most)  # the acquisition has the lowest quarter to itself
    worth = p.get("acquisition") or []
    inside = [a for a in worth if a is not None]  # outside the domain nothing was considered
    if inside and max(inside) > min(inside):
        scaled = [0.0 if a is None else 0.2 * (a - min(inside)) / (max(inside) - min(inside)) for a in worth]
        axes.fill_between(
            p["x"], 0, scaled, transform=axes.get_xaxis_transform(), color=ORANGE, alpha=0.55, linewidth=0
        )
    axes.axvline(trial["values"][name], color="#1b1f24", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(
        f"{trial['number'] + 1}: {'score' if first else plain_text(goals_of(result)[0]['name'])}",
        fontsize=9,
        loc="left",
    )
    axes.tick_params(labelsize=7)
    if not first:
        axes.yaxis.set_major_formatter(EngFormatter())
    axes.spines[["top", "right"]].set_visible(False)
