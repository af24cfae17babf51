"""What a run says of the parameters that its calibration data did not reach, and of the batches that were not
finite.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from laconic.errors import DataError
from laconic.host.progress import Progress
from laconic.host.told import SiteRecord
from laconic.host.units import ranges
from laconic.model.batches import tensors_in

WARN = 0.01  # the share of a model's parameters that may be unmeasured before a run says so while it works
_NAMED = 8  # sites a summary names


@contextmanager
def naming_batches(batches: Sequence[Any]) -> Iterator[None]:
    """A DataError from inside says which batches hold a NaN or an infinity, if any do."""
    try:
        yield
    except DataError as error:
        bad = [i for i, batch in enumerate(batches) if not all(bool(t.isfinite().all()) for t in tensors_in(batch))]
        if not bad:
            raise
        raise DataError(f"{error}; NaN or infinity in batch {ranges(bad)} of the calibration data") from error


def unmeasured_share(records: Sequence[SiteRecord], parameters: int) -> float:
    """The share of a model's parameters that were compressed without the statistics their methods ask for."""
    entries = sum(record.entries * (record.unmeasured or 0.0) for record in records)
    return entries / max(parameters, 1)


def unmeasured_notes(records: Sequence[SiteRecord], parameters: int, progress: Progress) -> list[str]:
    """One line on all sites that were compressed without statistics, or none, said at once where they are more than a
    hundredth of the model.

    The sites' own notes give the reasons.
    """
    found = [record.name for record in records if record.unmeasured]
    if not found:
        return []
    named = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    share = unmeasured_share(records, parameters)
    line = (
        f"{share:.1%} of the parameters were rounded without statistics, since the calibration data did not reach "
        f"them: {named}"
    )
    if share > WARN:
        progress.say(line)
    return [line]
