"""The report of a search: one HTML page that needs nothing else, and a few lines for a terminal."""

import os
from pathlib import Path
from typing import Any

from laconic.disk.files import write_text
from laconic.host.units import human_bytes
from laconic.show import search_pictures as pictures
from laconic.show import search_profiles as profiles
from laconic.show.page import fill_page
from laconic.show.search_pictures import Values, goals_of, is_measured, is_number, objectives_of

NOTHING = "-"


def write_search_page(file: Path, result: Values) -> None:
    """Write a search as an HTML page; another worker may be doing the same."""
    write_text(file, render_search(result), f".{os.getpid()}.tmp")


def render_search(result: Values) -> str:
    """The search as one self-contained HTML page. Parts that the result lacks (layers, posteriors, a best) are left out
    of the page.
    """
    layers = result.get("layers") or []
    return fill_page(
        "search.html.j2",
        v=result,
        goals=goals_of(result),
        cards=_cards(result),
        outcome=outcome_rows(result),
        trials=_trial_rows(result),
        layers=layers,
        cost=_cost(result),
        facts=_facts(result),
        notes=result.get("notes") or [],
        profile=profiles.profile_picture(result),
        posteriors=profiles.posteriors_picture(result),
        curves=pictures.curves_picture(result),
        bars=pictures.layers_picture(layers),
        pareto=pictures.pareto_picture(result),
        scatter=pictures.parameters_picture(result),
    )


def shown(name: str, value: Any) -> str:
    """An objective's value as people read it: bytes and seconds in their units, counts in thousands, else four
    digits.
    """
    if not is_number(value):
        return NOTHING
    if name.endswith("bytes"):
        return human_bytes(value)
    if name == "latency":
        return f"{1000 * value:.4g} ms"
    if name in ("parameters", "macs", "flops"):
        return _count(value)
    return f"{value:,.0f} / s" if name == "throughput" and value >= 100 else f"{value:.4g}"


def _count(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.4g}{unit}"
    return f"{value:,.0f}"


def _score(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else NOTHING


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_text(values: Values) -> str:
    """The hyper-parameters of a trial: `sparsity 0.63, bits 4`."""
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _change(goal: Values, before: Any, after: Any) -> str:
    """How many times better an objective is than the reference's."""
    if not (is_number(before) and is_number(after)) or before <= 0 or after <= 0:
        return ""
    return f"{(after / before if goal['direction'] == 'maximize' else before / after):.2f} x"


def _cards(result: Values) -> list[dict[str, str]]:
    """The few figures people ask for."""
    best, reference = result.get("best"), result.get("reference") or {}
    floor = f"level set {_score(result['floor'])}"
    if best is None:
        return [{"label": "Result", "value": "none", "note": f"no trial reached the {floor}"}]
    cards = [
        {
            "label": "Chosen",
            "value": values_text(best["values"]),
            "note": f"trial {best['trial'] + 1} of {len(result['trials'])}",
        },
        {
            "label": "Score on validation data",
            "value": _score(best.get("score")),
            "note": f"reference {_score(reference.get('score'))}, {floor}",
        },
    ]
    if is_number(best.get("test_score")):
        note = f"reference {_score(reference.get('test_score'))}; decided nothing"
        cards.append({"label": "Score on test data", "value": _score(best["test_score"]), "note": note})
    for goal, before, after in _objectives(result):
        note = f"reference {shown(goal['name'], before)}" + (
            f", {change} better" if (change := _change(goal, before, after)) else ""
        )
        cards.append({"label": goal["name"], "value": shown(goal["name"], after), "note": note})
    if is_number(best.get("ratio")) and all(goal["name"] != "stored_bytes" for goal in goals_of(result)):
        note = f"{human_bytes(best['stored_bytes'])} on disk" if is_number(best.get("stored_bytes")) else ""
        cards.append({"label": "File", "value": f"{best['ratio']:.2f} x smaller", "note": note})
    return cards


def _objectives(result: Values) -> list[tuple[Values, Any, Any]]:
    """Every objective with the reference's value and the best's (None where unknown)."""
    goals = goals_of(result)
    before, after = objectives_of(result.get("reference")), objectives_of(result.get("best"))
    missing = [None] * len(goals)
    return list(
        zip(
            goals,
            before if len(before) == len(goals) else missing,
            after if len(after) == len(goals) else missing,
            strict=True,
        )
    )


def outcome_rows(result: Values) -> list[list[str]]:
    """Rows of (what, reference, directly compressed, recovered, change); none without a best trial."""
    best, reference = result.get("best"), result.get("reference") or {}
    if best is None:
        return []
    trial: Values = next((t for t in result["trials"] if t["number"] == best["trial"]), {})
    rows = []
    for label, before, direct, after in (
        ("score on validation data", reference.get("score"), trial.get("direct_score"), best.get("score")),
        ("score on test data", reference.get("test_score"), best.get("direct_test_score"), best.get("test_score")),
    ):
        if is_number(after):
            change = f"{after - before:+.4f}" if is_number(before) else ""
            rows.append([label, _score(before), _score(direct), _score(after), change])
    for goal, before, after in _objectives(result):
        rows.append(
            [goal["name"], shown(goal["name"], before), "", shown(goal["name"], after), _change(goal, before, after)]
        )
    named = {goal["name"] for goal in goals_of(result)}
    for key, label, ratio in (
        ("stored_bytes", "bytes on disk", "ratio"), ("nonzero_bytes", "bytes of non-zero parameters", "nonzero_ratio"),
        ("parameters", "parameters of the network that runs", None),
    ):  # fmt: skip
        if key in named or not is_number(best.get(key)):
            continue
        before, factor = reference.get(key), best.get(ratio) if ratio else None
        if factor is None and is_number(before) and best[key]:
            factor = before / best[key]
        rows.append(
            [label, shown(key, before), "", shown(key, best[key]), f"{factor:.2f} x" if is_number(factor) else ""]
        )
    return rows


def _trial_rows(result: Values) -> list[dict[str, Any]]:
    """A row per trial, as text."""
    goals, rows = goals_of(result), []
    for trial in result["trials"]:
        domain, values = trial.get("domain"), objectives_of(trial)
        under = is_measured(trial) and trial["score"] < result["floor"]
        remarks = [f"warm from {trial['warm_from'] + 1}"] if is_number(trial.get("warm_from")) else []
        remarks += ["stopped early"] if trial.get("stopped_early") else []
        remarks += [str(trial["state"])] if trial.get("state", "complete") != "complete" else []
        rows.append(
            {
                "number": trial["number"] + 1,
                "stage": trial.get("stage", NOTHING),
                "values": values_text(trial.get("values") or {}),
                "score": _score(trial.get("score")),
                "under": under,
                "direct": _score(trial.get("direct_score")),
                "objectives": [
                    shown(goal["name"], values[i] if i < len(values) else None) for i, goal in enumerate(goals)
                ],
                "domain": f"{_value(domain[0])} to {_value(domain[1])}" if domain else "",
                "remarks": ", ".join(remarks),
                "minibatches": f"{trial['minibatches']:,}" if is_number(trial.get("minibatches")) else NOTHING,
                "seconds": f"{trial['seconds']:.0f}" if is_number(trial.get("seconds")) else NOTHING,
                "best": trial["number"] == (result.get("best") or {}).get("trial"),
            }
        )
    return rows


def _cost(result: Values) -> str:
    """What the search cost beside as many runs that each begin anew."""
    cost = result.get("cost") or {}
    spent, cold = cost.get("minibatches"), cost.get("cold_minibatches")
    if not is_number(spent):
        return ""
    text = f"{spent:,} minibatches of training in {len(result['trials'])} trials"
    if is_number(cold) and cold and spent:
        text += (
            f"; the same trials, each from the reference and to its end, are {cold:,}: {cold / spent:.2f} times as many"
        )
    return text


def _facts(result: Values) -> list[tuple[str, str]]:
    """What was run, on what."""
    free = ", ".join(
        f"{name} of {', '.join(map(str, b['choices']))}"
        if b.get("choices")
        else f"{name} in {_value(b.get('low'))} to {_value(b.get('high'))}"
        for name, b in (result.get("free") or {}).items()
    )
    facts = [("scheme", str(result["scheme"])), ("searched", free)]
    margin = f", {_value(result['margin'])} below the reference" if is_number(result.get("margin")) else ""
    facts.append(("objective", ", ".join(f"{goal['direction']} {goal['name']}" for goal in goals_of(result))))
    facts.append(("level set", f"{_score(result['floor'])}{margin}"))
    facts += [(f"{split} data", str(text)) for split, text in (result.get("data") or {}).items()]
    if is_number(result.get("noise")):
        facts.append(
            ("noise of the score", f"{result['noise']:.4g}, the difference of two measurements of the reference")
        )
    facts += [("seed", str(result["seed"]))] if "seed" in result else []
    facts += [("time", f"{result['seconds']:.0f} seconds")] if is_number(result.get("seconds")) else []
    for key in ("versions", "machine"):
        if result.get(key):
            facts.append((key, ", ".join(f"{name} {value}" for name, value in result[key].items())))
    return [(label, text) for label, text in facts if text]


def search_summary(result: Values) -> list[tuple[str, str]]:
    """The outcome in a few lines (label, text), for a terminal."""
    best = result.get("best")
    if best is None:
        return [
            ("chosen", f"none: no trial reached the level set {_score(result['floor'])}"),
            *([("cost", c)] if (c := _cost(result)) else []),
        ]
    lines = [("chosen", f"{values_text(best['values'])} (trial {best['trial'] + 1} of {len(result['trials'])})")]
    for label, before, direct, after, change in outcome_rows(result):
        straight = f", compressed directly {direct}" if direct not in ("", NOTHING) else ""
        change_text = f" ({change})" if change else ""
        lines.append((label, f"{after} from {before}{change_text}{straight}" if before != NOTHING else after))
    return [*lines, *([("cost", c)] if (c := _cost(result)) else [])]
