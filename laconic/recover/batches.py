"""Batches as recovery sees them: their size, their inputs' fingerprints, their order, and the randomness that belongs
to all of it.
"""

import hashlib
from collections.abc import Iterable, Iterator

from laconic.disk.tensors import bytes_of
from laconic.errors import DataError
from laconic.host.randomness import private_randomness
from laconic.model.batches import Batch, inputs_in


def length_of(data: Iterable[Batch]) -> int | None:
    """How many batches there are in a pass, None if the data does not say (a loader of a stream has `__len__`, which
    raises).
    """
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError):
        return None


def digests(data: Iterable[Batch]) -> Iterator[bytes]:
    """A hash of every example's inputs, batch after batch; labels do not count."""
    for batch in data:
        inputs = [tensor.detach().cpu() for tensor in inputs_in(batch)]
        rows = [tensor for tensor in inputs if len(tensor) == len(inputs[0])]
        for i in range(len(inputs[0])):
            digest = hashlib.blake2b(digest_size=16)
            for tensor in rows:
                digest.update(bytes_of(tensor[i]))
            yield digest.digest()


def stream(data: Iterable[Batch], seed: int) -> Iterator[Batch]:
    """Batches without end, pass after pass; the order of every pass follows from the seed and the pass's number."""
    passes = 0
    while True:
        with private_randomness(seed, passes, data=data):
            batches = iter(data)
            first = next(batches, None)
        if first is None:
            raise DataError("train: expected batches, got none")
        yield first
        yield from batches
        passes += 1
