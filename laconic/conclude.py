"""What follows once the weights are stored and verified: quality, samples of text, the report. Nothing that fails here
loses the model."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from laconic.data.reading import Material
from laconic.disk.load import CompressedCheckpoint
from laconic.disk.originals import Checkpoint
from laconic.disk.output import Run
from laconic.disk.store import Compressed, stored_bytes
from laconic.engine.options import Options
from laconic.engine.report import Report, read_report
from laconic.errors import LaconicError, OutputError, ReportError
from laconic.host.clock import Clock
from laconic.host.foreign import last_line
from laconic.host.machine import pick_dtype
from laconic.host.progress import Progress, peak_memory
from laconic.measure.quality import perplexity, predicts, similarity
from laconic.show.page import write_report

Measure = Callable[[], dict[str, Any]]
"""The metrics of the stored model."""
Sample = Callable[[], list[dict[str, str]]]
"""Samples of text for the report."""


def known_of(run: Run) -> dict[str, Any] | None:
    """What is known of the complete model in a run's directory (`report`, `samples`), or None while it is not complete.

    Raises: OutputError for a model whose report is gone, CheckpointError for a damaged one.
    """
    if not run.closed:
        return run.known()
    Compressed(run.out)  # damage is found here
    known = read_report(run.out)
    if known is None:
        raise OutputError(
            f"{run.out}: the model is complete, but its report.json is gone, which nothing else knows; pass "
            "--overwrite to replace it"
        )
    return known


def conclude(run: Run, known: dict[str, Any], measure: Measure | None, sample: Sample | None, clock: Clock) -> Report:
    """Measure, sample and report a complete model, as far as `known` (`report`: its values; `samples`) does not hold
    that already, and close the run.

    Whatever fails is said and noted in the report; the rest is done all the same, and what was computed is kept.
    Raises: ReportError at the end if anything failed (the run stays open, and a resumed one repeats what failed);
    KeyboardInterrupt with a note that says the same.
    """
    began, failures = time.time(), dict[str, BaseException]()
    values = dict(known["report"])
    notes = list(values["notes"])
    if measure is not None and not values["metrics"]:
        with _Survived(run, "evaluation", failures):
            values["metrics"] = measure()
            run.know({"report": values, "samples": known["samples"]})
            run.describe(metrics=values["metrics"])
    samples = known["samples"]
    if sample is not None and samples is None:
        with _Survived(run, "samples of text", failures):
            clock.start("writing samples of text", 1)
            samples = sample()
            run.know({"report": values, "samples": samples})
    notes += [f"{what} failed, {_words(error)}; the model is complete" for what, error in failures.items()]
    told = {"notes": notes, "stored_bytes": stored_bytes(run.out), "seconds": values["seconds"] + time.time() - began}
    clock.finish()
    told["stages"] = {**values.get("stages", {}), **clock.told()}
    told["expected_seconds_later"] = clock.early if clock.early is not None else values.get("expected_seconds_later")
    told["peak_memory"] = values["peak_memory"] | {"actual": max(peak_memory(), values["peak_memory"]["actual"])}
    report = Report(values | told)
    if not (failures and run.closed):  # an earlier report is better than half of one
        with _Survived(run, "the report", failures):
            write_report(run.out, report, samples or [])
    if failures:
        for what, error in failures.items():
            clock.say(f"{what} failed, {_words(error)}")
        first = next(iter(failures.values()))
        raise ReportError(
            f"{run.out}: the model is complete and verified; what failed is {' and '.join(failures)} "
            f"({_words(first)}). The same command with "
            "--resume repeats only that, and with --no-evaluate too does without it"
        ) from first
    run.close()
    return report


class _Survived:
    """Notes what fails inside, whatever it is: tokenizers, models that write and pictures are other people's code.
    Ctrl-C goes on, with a word."""

    def __init__(self, run: Run, what: str, failures: dict[str, BaseException]) -> None:
        self.run, self.what, self.failures = run, what, failures

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, KeyboardInterrupt):
            error.add_note(
                f"{self.run.out}: the model is complete and verified; {self.what} is missing: --resume makes only that"
            )
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            return False
        self.failures[self.what] = error
        return True


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join((str(error) if isinstance(error, LaconicError) else last_line(error)).split())[:300]


def quality_of(
    out: Path, checkpoint: Checkpoint, test: Material, options: Options, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """The stored model against the original on the test windows."""
    progress.start("evaluating what was stored", 1)
    stored = CompressedCheckpoint(out, trust_remote_code=options.trust_remote_code)
    if not predicts(checkpoint.skeleton, test):
        return {"data": test.source, **similarity(stored, checkpoint, test, pick_dtype(options.dtype), device)}
    return perplexity(stored, test, reference=checkpoint, dtype=pick_dtype(options.dtype), device=device).as_dict()
