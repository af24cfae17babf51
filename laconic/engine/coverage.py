"""What a run covers: the share of a model's parameters that is compressed, kept by choice, or of a kind that no method
treats.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from laconic.engine.plan import Plan
from laconic.model.uncompressed import uncompressed

_NAMED = 4  # parameters that no method treats are named one by one up to here, the largest first


def coverage(model: nn.Module, plan: Plan, reasons: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Entries by what becomes of them: "compressed"; "kept" by reason; "vectors" (norms, biases); "untreated", one by
    one, the largest first.

    `reasons`: what a run showed of parameters that are no sites (`Uses.why_not`). They add up to "parameters", every
    tie once.
    """
    kept: dict[str, int] = {}
    for slot, reason in plan.kept.items():
        told = reason or "as the plan says"
        kept[told] = kept.get(told, 0) + slot.entries
    untreated = [
        {"name": name, "shape": list(shape), "entries": entries, "reason": reason}
        for name, shape, entries, reason in uncompressed(model, plan.slots, reasons)
    ]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compressed": sum(slot.entries for slot in plan.methods),
        "kept": kept,
        "vectors": sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2),
        "untreated": sorted(untreated, key=lambda found: -found["entries"]),
    }


def coverage_line(found: Mapping[str, Any]) -> str:
    """The same in a sentence: "99.1 % of 7,345,664 parameters compressed; kept: router 0.5 %; not compressible: norms
    and biases 0.4 %".
    """
    total = max(found["parameters"], 1)

    def share(entries: int) -> str:
        return f"{100 * entries / total:.1f} %" if entries >= total / 2000 or not entries else "under 0.1 %"

    kept = [f"{reason} {share(entries)}" for reason, entries in found["kept"].items()]
    left = [f"norms and biases {share(found['vectors'])}"] if found["vectors"] else []
    left += [f"{one['name']} ({one['reason']}) {share(one['entries'])}" for one in found["untreated"][:_NAMED]]
    if more := found["untreated"][_NAMED:]:
        left.append(f"{len(more)} more {share(sum(one['entries'] for one in more))}")
    parts = [f"{share(found['compressed'])} of {found['parameters']:,} parameters compressed"]
    parts += [f"kept: {', '.join(kept)}"] * bool(kept) + [f"not compressible: {', '.join(left)}"] * bool(left)
    return "; ".join(parts)
