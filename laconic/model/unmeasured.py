"""One rule for every method: what nobody measured counts alike, and is said; what is measured is finite."""

from typing import Any

import torch
from torch import Tensor

from laconic.errors import DataError
from laconic.host.units import ranges
from laconic.model.sites import INPUTS, MEASURED, Site, Stats


def completed(site: Site, wants: Stats) -> Site:
    """The site with every statistic that `wants` names: where nothing was seen, those of inputs and outputs that all
    count alike.

    A site that no input reached becomes one row group with H = I, mean squares and magnitudes 1, mean 0, no peak, range
    or sample, so that column solvers round to nearest, pruning goes by size, and scales are 1; a gradient that reached
    nothing is 1 everywhere. Of packed experts, those without a token get H = c I, c the mean of diag(H) over the
    others. `site.notes` says which and why, `site.unmeasured` which share of the entries it is. Raises: DataError when
    a statistic is not finite. Cost: one look at every statistic.
    """
    if not wants & MEASURED:
        return site
    check_statistics(site)
    lacking = [stat for stat, values in _held(site).items() if stat & wants and values is None]
    if any(stat & INPUTS for stat in lacking):
        site = _alike(site, wants)
    changes: dict[str, Any] = {}
    if Stats.FISHER in lacking:
        changes["fisher"] = torch.ones_like(site.W, dtype=torch.float32)
    if Stats.OUTPUT_FISHER in lacking:
        changes["output_fisher"] = torch.ones(len(site.W), device=site.W.device)
    if changes and not site.unmeasured:
        site.notes.append(f"{site.name}: no gradient of the calibration data reached it; all its entries count alike")
    if changes:
        site = site.having(**changes, unmeasured=1.0)
    return _experts(site)


def check_statistics(site: Site) -> None:
    """Raises DataError naming the site and the statistic that holds a NaN or an infinity."""
    for stat, values in _held(site).items():
        if values is not None and not bool(values.isfinite().all()):
            what = "gradients" if stat & (Stats.FISHER | Stats.OUTPUT_FISHER) else "inputs"
            raise DataError(
                f"{site.name}: its {what} are not finite: look for NaN or infinity in the calibration data; if that is "
                "sound, activations leave "
                "the range of the type the model computes in: use float32 or bfloat16"
            )


def _held(site: Site) -> dict[Stats, Tensor | None]:
    return {
        Stats.HESSIAN: site.hessian,
        Stats.SQUARES: site.squares if site.squares is not None else _diagonal(site),
        Stats.MEAN: site.magnitude,
        Stats.MAX: site.peak,
        Stats.CENTRE: site.centre,
        Stats.RANGE: _ends(site),
        Stats.SAMPLE: site.sample,
        Stats.FISHER: site.fisher,
        Stats.OUTPUT_FISHER: site.output_fisher,
    }


def _ends(site: Site) -> Tensor | None:
    return torch.stack([site.low, site.high]) if site.low is not None and site.high is not None else None


def _diagonal(site: Site) -> Tensor | None:
    return site.hessian.diagonal(dim1=1, dim2=2) if site.hessian is not None else None


def _alike(site: Site, wants: Stats) -> Site:
    """A site of whose inputs nothing is known."""
    columns, device = site.W.shape[1], site.W.device
    site.notes.append(f"{site.name}: {site.unseen}; {_ALIKE}")
    one = torch.ones(1, columns, device=device)
    return site.having(
        groups=1,
        tokens=None,
        input=None,
        unmeasured=1.0,
        hessian=torch.eye(columns, device=device).unsqueeze(0) if wants & Stats.HESSIAN else None,
        squares=one if wants & Stats.SQUARES else None,
        magnitude=one if wants & Stats.MEAN else None,
        peak=torch.zeros_like(one) if wants & Stats.MAX else None,
        centre=torch.zeros_like(one) if wants & Stats.CENTRE else None,
    )


_ALIKE = "rounded to nearest or pruned by size, all its inputs counting alike"


def _experts(site: Site) -> Site:
    """Row groups of which no input is known, or zeros only, filled in with what the others have on average."""
    squares = site.squares if site.squares is not None else _diagonal(site)
    if squares is None or site.unmeasured == 1:
        return site
    empty = (squares == 0).all(1)
    if site.tokens is not None:
        empty |= (site.tokens == 0).to(empty.device)
    if not bool(empty.any()):
        return site
    mean = float(squares[~empty].mean()) if not bool(empty.all()) else 1.0
    share = float(empty.double().mean())
    site.notes.append(f"{site.name}: {_which(site, empty, share)}; {_ALIKE}")
    changes: dict[str, Any] = {"unmeasured": share}
    if site.squares is not None:
        changes["squares"] = site.squares.masked_fill(empty.unsqueeze(1), mean)
    if site.hessian is not None:
        # of packed experts it is the largest tensor there is
        changes["hessian"] = site.hessian if site.groups > 1 else site.hessian.clone()
        changes["hessian"][empty] = mean * torch.eye(site.hessian.shape[1], device=site.hessian.device)
    if site.magnitude is not None:
        changes["magnitude"] = site.magnitude.masked_fill(empty.unsqueeze(1), mean**0.5)
    return site.having(**changes)


def _which(site: Site, empty: Tensor, share: float) -> str:
    """The row groups that saw nothing, or nothing but zeros."""
    unseen = site.tokens is not None and not bool(site.tokens[empty.cpu()].any())
    saw = "no token" if unseen else "zeros only"
    if site.groups == 1:
        return "its calibration inputs are all zero" if not unseen else site.unseen
    kind = "experts" if len(site.dims) == 3 and site.dims[0] == site.groups else "row groups"
    return f"{kind} {ranges(empty.nonzero().flatten().tolist())} of {site.groups} ({share:.0%} of the site) saw {saw}"
