"""What a plan asks for that cannot be done where it is to be carried out: refused before any work."""

from typing import Literal, get_args

from torch import nn

from laconic.engine.plan import Plan, numbered
from laconic.errors import SchemeError
from laconic.methods.channels import MODULES_ONLY
from laconic.model.sites import Slot
from laconic.weights.demands import why_not

Prefix = Literal["compressed", "original"]
"""What a site's inputs have passed through when they are looked at: everything that is compressed before it, or the
model as it was.
"""


def check_prefix(statistics: str, true_sequential: bool = False) -> None:
    """Raises SchemeError unless `statistics` is one of the two words, and goes with `true_sequential`."""
    if statistics not in get_args(Prefix):
        raise SchemeError(f"statistics: expected 'compressed' or 'original', got {statistics!r}")
    if statistics == "original" and true_sequential:
        raise SchemeError(
            "true_sequential takes the inputs of a site anew when the sites before it in its block are compressed; "
            "with "
            "statistics='original' they are those of the original: give one of the two"
        )


def refuse_structures(plan: Plan) -> None:
    """Raises SchemeError if a method has to know which rows are one channel of the network, where nobody can tell
    it.
    """
    for slot in plan.structures[:1]:
        raise SchemeError(f"{slot.name}: {plan.methods[slot]!r} has to know which rows are one channel; {MODULES_ONLY}")


def refuse_rounding(model: nn.Module, plan: Plan) -> None:
    """Raises SchemeError, naming the way out, if a method rounds the inputs of layers that cannot do so
    (convolutions, look-ups).
    """
    refused: dict[Slot, str] = {}
    for slot, inputs in plan.rounding.items():
        for layer in slot.layers(model):
            if (reason := why_not(layer, inputs, plan.methods[slot].scales_columns)) is not None:
                refused.setdefault(slot, reason)
    if not refused:
        return
    slot, reason = next(iter(refused.items()))
    names = list(dict.fromkeys(numbered(found.name) if "." in found.name else found.name for found in refused))
    more = f" (and of {len(refused) - 1} more sites)" if len(refused) > 1 else ""
    rules = ", ".join(f"({name!r}, Keep())" for name in names)
    keep = " ".join(f"--keep {name!r}" for name in names)
    raise SchemeError(
        f"{slot.name}{more}: {reason}; leave them out with {keep}, or in a plan: [{rules}, ('*', "
        f"{plan.methods[slot]!r})]"
    )
