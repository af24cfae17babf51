"""Any nn.Module in memory: compress it in place, save it, load it into a module of the same architecture."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.data.loaders import ready, taken
from laconic.disk.state import check_values, guard, plain_bytes
from laconic.disk.tensors import is_finite
from laconic.engine.checks import Prefix, check_prefix, refuse_rounding, refuse_structures
from laconic.engine.coverage import coverage
from laconic.engine.in_memory import InModule, at_rest
from laconic.engine.loop import compress
from laconic.engine.losses import probe_of
from laconic.engine.report import Report
from laconic.engine.resolve import Fit, patterns, resolve
from laconic.engine.unmeasured import naming_batches, unmeasured_notes
from laconic.errors import CheckpointError, DataError
from laconic.host.ambient import refuse_inference, undisturbed
from laconic.host.progress import Log, Progress, peak_memory
from laconic.host.record import plain
from laconic.model.batches import Batch, to_device
from laconic.model.calling import call, called_with
from laconic.model.judging import OutputLoss, OutputScore, check_function, judge, try_loss
from laconic.model.sites import find_slots, uses_of
from laconic.model.usage import Use, in_sight
from laconic.scheme.text import Scheme, describe
from laconic.weights import install

_log = logging.getLogger("laconic")


@undisturbed()
def compress_module(
    model: nn.Module,
    scheme: Scheme,
    data: Iterable[Batch] | None = None,
    *,
    validation: Iterable[Batch] | None = None,
    loss: OutputLoss | None = None,
    score: OutputScore | None = None,
    samples: int = 1024,
    true_sequential: bool = False,
    statistics: Prefix = "compressed",
    keep: str | Sequence[str] = (),
    group: Fit = "fit",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Report]:
    """Compress a module in place: its matrices are replaced by installed Weights that decode on every read.

    `data`: batches the model can be called with (a tensor, a dict, or a tuple whose first entry is the input), as many
    as hold `samples` examples; what an `attention_mask` leaves out is cut off. `keep`: patterns of sites that stay as
    they are; `group`: "fit" or "strict", where a group does not divide a matrix (`engine.resolve`).
    `loss(output, batch)`, the mean loss of a batch, is the scalar whose gradients methods see that need them: by
    default cross-entropy against sampled labels for outputs [batch, classes] or `.logits`, else a random projection.
    Fisher entries are squared batch by batch. On `validation`, batches that are gone through twice, the loss
    (as in `lc.recover`) and `score(output, batch)`, a number per example, are measured before and after; with a score
    and no loss, the score alone. `statistics`: what the inputs that methods look at have passed through, "compressed"
    (whatever is compressed before a site, so that errors are made up for) or "original" (the module as it was);
    gradients, and what is spread over the module, are the original's either way.
    Returns the module and a report. Raises: SchemeError, DataError, CheckpointError (a weight that is not finite); the
    module is then as it was, for which calibrated methods keep a copy of its matrices until the end. A `score` that
    raises leaves the module as it measured it.
    """
    check_function("loss", loss)
    check_function("score", score)
    if score is not None and validation is None:
        raise DataError("score: is measured on batches with their answers, before and after; pass validation=")
    if isinstance(validation, Iterator):
        raise DataError(
            "validation: expected data that can be gone through again (a list, a DataLoader), got an iterator"
        )
    progress, started = progress or Log(), time.time()
    check_prefix(statistics, true_sequential)
    check_values(model)
    refuse_inference(model)
    batches = ready(taken(data, samples, seed), model) if data is not None else []
    uses, reasons = _uses(model, batches, loss)
    slots = find_slots(model, uses)
    notes: list[str] = []
    plan = resolve(scheme, slots, whole_file=True, keep=keep, group=group, notes=notes)
    refuse_structures(plan)
    refuse_rounding(model, plan)
    for note in notes:
        progress.say(note)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise CheckpointError(f"{name}: holds NaN or infinity")
    original, covered = plain_bytes(model), coverage(model, plan, reasons)
    count = sum(p.numel() for p in model.parameters())
    if not batches and plan.reads_data:
        raise DataError(f"{describe(scheme)}: needs calibration data; pass data=, an iterable of batches")
    with at_rest(model):
        before = _measured(model, validation, loss, score)
        with naming_batches(batches), in_sight(model), undisturbed(seed):
            home = InModule(
                model,
                batches,
                seed=seed,
                statistics=statistics,
                probe=probe_of(loss),
                true_sequential=true_sequential,
                progress=progress,
            )
            with home:
                compress(home, plan)
        for slot, weight in home.weights.items():
            for path, name in slot.users:
                install(model.get_submodule(path), name, weight, slot.view)
        guard(model)
        after = _measured(model, validation, loss, score)
    records = home.records
    notes += [*home.notes, *unmeasured_notes(records, count, progress)]
    notes += [
        f"the {name} {when} compression is {value}"
        for when, values in (("before", before), ("after", after))
        for name, value in values.items()
        if not math.isfinite(value)
    ]
    stored = sum(record.bits for record in records) // 8
    kept = original - sum(record.original_bytes or 0 for record in records)
    report = Report(
        {
            "scheme": describe(scheme),
            "keep": patterns(keep),
            "seed": seed,
            "statistics": statistics,
            "sites": plain(records),
            "parameters": count,
            "original_bytes": original,
            "expected_bytes": kept + stored,
            "metrics": after | {f"reference_{name}": value for name, value in before.items()},
            "seconds": time.time() - started,
            "peak_memory": {"actual": peak_memory()},
            "notes": notes,
            "coverage": covered,
        }
    )
    return model, report


def _uses(
    model: nn.Module, batches: list[Batch], loss: OutputLoss | None
) -> tuple[dict[str, Use] | None, dict[str, str]]:
    """How the first batch shows the parameters to be used whose modules do not say it, and why some are no sites; None
    without data.

    Raises: DataError when the model cannot be called with it, or the loss not be taken of its output.
    """
    if not batches:
        return None, {}
    first = to_device(batches[0], next(model.parameters()).device)
    with at_rest(model), in_sight(model), undisturbed(0), called_with(model, first, "batch 0 of the calibration data"):
        uses = uses_of(model, lambda: call(model, first))
        if loss is not None:
            with torch.no_grad():
                try_loss(call(model, first), first, loss, "batch 0 of the calibration data")
    return uses.found(), uses.why_not()


def _measured(
    model: nn.Module, validation: Iterable[Batch] | None, loss: OutputLoss | None, score: OutputScore | None
) -> dict[str, float]:
    """Score and loss of the module on validation data, nothing without any; the score alone where it is asked for and
    no loss is.
    """
    if validation is None:
        return {}
    if score is not None and loss is None:
        return {"score": judge(model, validation, _nothing, score).score}
    found = judge(model, validation, loss, score)
    return {"score": found.score, "loss": found.loss}


def _nothing(*_: Any) -> Tensor:
    """The loss where nobody asked for one."""
    return torch.zeros(())
