"""Any nn.Module in memory: compress it in place, save it, load it into a module of the same architecture."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from laconic.data.loaders import ready, taken
from laconic.disk.state import check_values, guard, plain_bytes
from laconic.disk.tensors import is_finite
from laconic.engine.checks import Prefix, check_prefix, refuse_rounding, refuse_structures
from laconic.engine.coverage import coverage
from laconic.engine.in_memory import InModule, at_rest
from laconic.engine.loop import compress
from laconic.engine.losses import Loss, default_loss
from laconic.engine.report import Report
from laconic.engine.resolve import Fit, patterns, resolve
from laconic.engine.unmeasured import naming_batches, unmeasured_notes
from laconic.errors import CheckpointError, DataError
from laconic.host.ambient import refuse_inference, undisturbed
from laconic.host.progress import Log, Progress, peak_memory
from laconic.host.record import plain
from laconic.model.batches import Batch, to_device
from laconic.model.calling import call, called_with
from laconic.model.sites import find_slots, uses_of
from laconic.model.usage import Use, in_sight
from laconic.scheme.text import Scheme, describe
from laconic.weights import install

Score = Callable[[nn.Module], float]
_log = logging.getLogger("laconic")


@undisturbed()
def compress_module(
    model: nn.Module,
    scheme: Scheme,
    data: Iterable[Batch] | None = None,
    *,
    score: Score | None = None,
    loss: Loss | None = None,
    samples: int = 1024,
    true_sequential: bool = False,
    statistics: Prefix = "compressed",
    keep: str | Sequence[str] = (),
    group: Fit = "fit",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Report]:
    """Compress a module in place: its matrices are replaced by installed Weights that decode on every read.

    `data`: batches the model can be called with (a tensor, a dict, or a tuple whose first entry is the input), as many as hold `samples`
    examples; what an `attention_mask` leaves out is cut off. `keep`: patterns of sites that stay as they are; `group`: "fit" or "strict", where
    a group does not divide a matrix (`engine.resolve`). `score(model)` is measured before and after. `loss(output, generator)` is the
    scalar whose gradients methods see that need them: by default cross-entropy against sampled labels for outputs [batch, classes] or
    `.logits`, else a random projection.
    `statistics`: what the inputs that methods look at have passed through, "compressed" (whatever is compressed before a site, so that errors
    are made up for) or "original" (the module as it was); gradients, and what is spread over the module, are the original's either way.
    Returns the module and a report. Raises: SchemeError, DataError, CheckpointError (a weight that is not finite); the module is then as
    it was, for which calibrated methods keep a copy of its matrices until the end. A `score` that raises leaves the module as it measured it.
    """
    progress, started = progress or Log(), time.time()
    check_prefix(statistics, true_sequential)
    check_values(model)
    refuse_inference(model)
    batches = ready(taken(data, samples, seed), model) if data is not None else []
    uses, reasons = _uses(model, batches)
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
        before = score(model) if score is not None else None
        with naming_batches(batches), in_sight(model), undisturbed(seed):
            home = InModule(
                model, batches, seed=seed, statistics=statistics, loss=loss or default_loss, true_sequential=true_sequential, progress=progress
            )  # fmt: skip
            with home:
                compress(home, plan)
        for slot, weight in home.weights.items():
            for path, name in slot.users:
                install(model.get_submodule(path), name, weight, slot.view)
        guard(model)
        after = score(model) if score is not None else None
    records = home.records
    notes += [*home.notes, *unmeasured_notes(records, count, progress)]
    notes += [
        f"the score {when} compression is {value}"
        for when, value in (("before", before), ("after", after))
        if not _is_number(value)
    ]
    stored = sum(record.bits for record in records) // 8
    kept = original - sum(record.original_bytes or 0 for record in records)
    report = Report(
        {
            "scheme": describe(scheme), "keep": patterns(keep),
            "seed": seed, "statistics": statistics, "sites": plain(records), "parameters": count, "original_bytes": original,
            "expected_bytes": kept + stored, "metrics": {"score": after, "reference_score": before} if score is not None else {},
            "seconds": time.time() - started, "peak_memory": {"actual": peak_memory()}, "notes": notes, "coverage": covered,
        }
    )  # fmt: skip
    return model, report


def _uses(model: nn.Module, batches: list[Batch]) -> tuple[dict[str, Use] | None, dict[str, str]]:
    """How the first batch shows the parameters to be used whose modules do not say it, and why some are no sites; None without data.

    Raises: DataError when the model cannot be called with it.
    """
    if not batches:
        return None, {}
    first = to_device(batches[0], next(model.parameters()).device)
    with at_rest(model), in_sight(model), undisturbed(0), called_with(model, first, "batch 0 of the calibration data"):
        uses = uses_of(model, lambda: call(model, first))
    return uses.found(), uses.why_not()


def _is_number(score: float | None) -> bool:
    """Whether a score, if there is one, is finite."""
    return score is None or math.isfinite(score)
