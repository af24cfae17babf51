"""What methods share that round inputs: the forms a scheme can ask for, and the range of a site's inputs,
calibrated.
"""

from typing import Any, Literal

import torch

from laconic.errors import SchemeError
from laconic.model.sites import NONE, Site, Stats
from laconic.solvers.ranges import least_error
from laconic.weights import Weight
from laconic.weights.demands import column_scale_of
from laconic.weights.inputs import Granularity, Inputs

Range = Literal["dynamic", "minmax", "mse"]
"""Where a range comes from: every input itself, the least and largest value seen in calibration, or the least squared
error there.
"""
NEEDS: dict[Range, Stats] = {"dynamic": NONE, "minmax": Stats.RANGE, "mse": Stats.RANGE | Stats.SAMPLE}
"""The statistics that a range is found from."""


def needs_of(range: Any) -> Stats:
    """The statistics that a range is found from; of one that is still `Free`, those of any."""
    return NEEDS.get(range, NEEDS["mse"])


def form_of(who: str, bits: int, granularity: Granularity, symmetric: bool, range: Range) -> Inputs:
    """What a scheme asks of inputs, the static range still open. Raises: SchemeError, with the method's name, for what
    cannot be.
    """
    try:
        form = Inputs(bits, granularity, symmetric)
    except SchemeError as error:
        raise SchemeError(f"{who}: {error}") from error
    if range not in NEEDS:
        raise SchemeError(f"{who}: range should be one of {', '.join(map(repr, NEEDS))}, got {range!r}")
    if range != "dynamic" and granularity != "tensor":
        raise SchemeError(
            f"{who}: range={range!r} is that of a whole tensor, give granularity='tensor'; tokens have their own"
        )
    return form


def calibrated(form: Inputs, range: Range, site: Site, weight: Weight) -> Inputs:
    """The form with the range of the site's inputs, multiplied by the column scale that the weight found for them has,
    if any.

    Where no input but zeros was seen the form stays dynamic, and the site's notes say so. Cost: that of `least_error`
    for "mse".
    """
    if range == "dynamic":
        return form
    columns = column_scale_of(weight)
    scale = torch.ones(()) if columns is None else columns.detach().float()
    if site.low is None or site.high is None or not bool((site.low < 0).any() | (site.high > 0).any()):
        site.notes.append(
            f"{site.name}: a static range of its inputs is not known, none were seen: every call finds its own"
        )
        return form
    ends = torch.stack([site.low, site.high]) * scale.to(site.low)
    low, high = float(ends.min()), float(ends.max())
    if range == "minmax":
        return Inputs.within(low, high, form.bits, form.symmetric)
    if site.sample is None:
        raise SchemeError(f"{site.name}: range='mse' needs a sample of the inputs")
    return least_error(site.sample * scale.to(site.sample), low, high, form.bits, form.symmetric)
