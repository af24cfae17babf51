"""Folding: the column scales of a layer move into what produces its input, and nothing is left of them to compute."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from laconic.errors import SurgeryError
from laconic.model.batches import Batch
from laconic.surgery.cuts import TOLERANCE, Feeder
from laconic.surgery.folds import Fold, bench, multiplied, row_factors, search
from laconic.surgery.verify import answers, apart, few
from laconic.weights import Dense, Scaled, Weight, installed
from laconic.weights.demands import set_demands
from laconic.weights.dense import DTYPES
from laconic.weights.install import Installed


def fold(model: nn.Module, example: Batch, *, tolerance: float = TOLERANCE) -> list[str]:
    """Move the column scales of a model's installed weights into the norms and layers that feed them, in place; returns
    what was done and not.

    A scale moves when a `find_folds` has a place for it and all readers of that place have it:
    `Scaled(weight, column_scale=s)` becomes `weight`, with its `inputs`. A norm's vectors are multiplied by s; an
    installed weight that is the source becomes `Scaled(weight, row_scale=s)`. Plain parameters keep their type, float32
    is rounded as any product is; 16-bit ones are only changed if the products are exact in 16 bits. Dense, in float32
    and without rounding of inputs, the model then answers as before on the first samples of `example`, to `tolerance`
    of its largest output; otherwise everything is put back.
    Raises: SurgeryError when it does not, when installed weights were converted to 16 bits, and as `find_folds` does.
    Source: Xiao et al. 2022 (SmoothQuant), section 4; Lin et al. 2023 (AWQ), section 3.2. Cost: that of `find_folds`,
    and two passes.
    """
    done, left = fold_scales(model, example, tolerance=tolerance)
    return [*done, *left]


def fold_scales(model: nn.Module, example: Batch, *, tolerance: float = TOLERANCE) -> tuple[list[str], list[str]]:
    """`fold`, with what was done and what was not in lists of their own."""
    if not _scaled(model):
        return [], ["no installed weight has a column scale"]
    for name, weight in installed(model).items():
        if any(state.element_size() < 4 for state in weight.parameters()):
            raise SurgeryError(
                f"{name}: its installed weight was converted to 16 bits, where every product is rounded; convert the "
                "model to float32"
            )
    batch = few(example)
    expected = answers(bench(model), batch)
    folds, refused = search(model, example)
    reasons = {slot.parameter: f"{entry.source.path}: {entry.reason}" for entry in refused for slot in entry.readers}
    done = []
    with torch.no_grad(), ExitStack() as undo:
        for found in folds:
            reason = _move(model, found, undo)
            if reason is None:
                done.append(
                    f"{found.source.path}: takes the column scales of {', '.join(slot.name for slot in found.readers)}"
                )
            else:
                reasons |= {slot.parameter: f"{found.source.path}: {reason}" for slot in found.readers}
        distance = apart(expected, answers(bench(model), batch))
        if distance > tolerance:
            raise SurgeryError(
                f"{type(model).__name__}: folding changes the output by {distance:.1e} of its size; everything was put "
                "back"
            )
        undo.pop_all()
    nothing = "nothing before it feeds its columns one by one"
    return done, [
        f"{name.removesuffix('.weight')}: keeps its column scale: {reasons.get(name, nothing)}"
        for name in _scaled(model)
    ]


def _scaled(model: nn.Module) -> list[str]:
    """The parameters whose installed weights have a column scale, every tie once."""
    first: dict[int, str] = {}
    for name, weight in installed(model).items():
        if _column_scale(weight) is not None:
            first.setdefault(id(weight), name)
    return list(first.values())


def _column_scale(weight: Weight | None) -> Tensor | None:
    if not isinstance(weight, Scaled) or weight.column_scale is None:
        return None
    return weight.column_scale.forward().detach().flatten().float().cpu()


def _move(model: nn.Module, fold: Fold, undo: ExitStack) -> str | None:
    """Carry a fold out; or why not."""
    weights = installed(model)
    readers = [weights.get(slot.parameter) for slot in fold.readers]
    scales = [_column_scale(weight) for weight in readers]
    if all(scale is None for scale in scales):
        return "its readers have no column scale"
    channels: list[Tensor] = []
    for slot, scale in zip(fold.readers, scales, strict=True):
        if scale is None:
            return f"{slot.name} reads it too and has no column scale"
        places = scale.reshape(len(fold.index), -1)  # of a convolution's kernel, per input channel
        channels.append(places[:, 0])
        if not torch.equal(places, channels[0].unsqueeze(1).expand_as(places)):
            return f"the column scale of {slot.name} differs from that of {fold.readers[0].name}, or within a channel"
    s = channels[0]
    if not bool(torch.isfinite(s).all() and (s >= 0).all()):
        return "a column scale is negative or not finite"
    t = torch.ones(fold.source.channels)
    t[fold.index] = s
    if not torch.equal(t[fold.index], s):
        return "columns that share one of its channels have different scales"
    reason = _take(model, fold.source, t, undo)
    if reason is None:
        for weight in readers:
            assert isinstance(weight, Scaled)
            plain = weight.weight if weight.row_scale is None else Scaled(weight.weight, row_scale=weight.row_scale)
            undo.callback(_swap, model, plain, weight)
            _swap(model, weight, plain)
    return reason


def _take(model: nn.Module, source: Feeder, t: Tensor, undo: ExitStack) -> str | None:
    """Multiply the channels of a source by t, as plain parameters or as the row scale of an installed weight; or why
    not.
    """
    if bool((t == 1).all()):
        return None
    module, weight = model.get_submodule(source.path), None
    if source.slot is not None:
        weight = installed(model).get(source.slot.parameter)
    if weight is not None and weight.output_bias() is not None:
        return f"the weight of {source.path} has an output bias, which is stored as it is"
    changed = []
    for name in source.names if weight is None else source.names[1:]:
        parameter = getattr(module, name)
        exact = multiplied(source, name, parameter.double(), t.to(parameter.device).double())
        if parameter.element_size() < 4 and not torch.equal(exact.to(parameter.dtype).double(), exact):
            return (
                f"its {name} is {str(parameter.dtype).removeprefix('torch.')} and would be rounded; load the model in "
                "float32"
            )
        changed.append((parameter, exact))
    for parameter, exact in changed:
        undo.callback(parameter.copy_, parameter.clone())
        parameter.copy_(exact)
    if weight is not None:
        scaled = _with_rows(weight, row_factors(source, t))
        undo.callback(_swap, model, scaled, weight)
        _swap(model, weight, scaled)
    return None


def _with_rows(weight: Weight, t: Tensor) -> Scaled:
    """diag(t) weight, t merged into a row scale that is there."""
    inner, columns = (weight.weight, weight.column_scale) if isinstance(weight, Scaled) else (weight, None)
    if isinstance(weight, Scaled) and weight.row_scale is not None:
        t = t.double() * weight.row_scale.forward().flatten().cpu().double()
    fitting = next((dtype for dtype in ("bfloat16", "float16") if torch.equal(t.to(DTYPES[dtype]).to(t), t)), "float32")
    rows = Dense((1, len(t)), dtype=fitting)
    rows.right_inverse(t.unsqueeze(0).float())
    return Scaled(inner, row_scale=rows.to(next(weight.parameters(), t).device), column_scale=columns)


def _swap(model: nn.Module, old: Weight, new: Weight) -> None:
    """Let `new` be installed wherever `old` is, and round inputs as that did; one of them may be a part of the
    other.
    """
    inputs, old.inputs = old.inputs, None
    new.inputs = inputs
    new.train(old.training)
    for module in model.modules():
        chains = getattr(module, "parametrizations", None)
        for chain in chains.values() if isinstance(chains, nn.ModuleDict) else ():
            if isinstance(chain, nn.ModuleList) and isinstance(chain[0], Installed) and chain[0].weight is old:
                chain[0].weight = new
                set_demands(module, new)
