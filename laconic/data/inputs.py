"""What a model directory is calibrated and measured with: read, checked against the model before any work, and written
by the model itself.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from laconic.data.chats import conversations
from laconic.data.modality import check_length, is_language_model, kind_of, way_out
from laconic.data.reading import Material, Reader
from laconic.data.sampled import Vocabulary, sample_windows, vocabulary_of
from laconic.data.text import Windows
from laconic.disk.files import atomically, disk_errors, seal
from laconic.disk.load import load_tokenizer
from laconic.disk.originals import Checkpoint
from laconic.disk.output import Run
from laconic.errors import CheckpointError, DataError
from laconic.host.progress import Progress
from laconic.model.opened import check_call
from laconic.model.residence import Residence

OWN = "self"
_OWN_TEST = 16384  # tokens at most that a model writes for the report's figures


class Request(Protocol):
    """Which data is asked for: the data fields of a run's options."""

    @property
    def data(self) -> Any: ...
    @property
    def test(self) -> Any: ...
    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def test_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def evaluate(self) -> bool: ...
    @property
    def trust_remote_code(self) -> bool: ...


@dataclass(frozen=True)
class Given:
    """What was given to calibrate and to measure with, read and checked; where there is a `vocabulary`, the model
    writes what is missing.

    `digest` is equal for equal data. `tokenizer` is the directory's, None where it has none and none was needed.
    """

    calibration: Material | None
    test: Material | None
    vocabulary: Vocabulary | None
    tokenizer: Any | None
    digest: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def check_request(model: nn.Module, request: Request, calibrated: bool) -> None:
    """Raises: DataError for data that cannot be a model's, as far as that is known before it is read."""
    kind, own = kind_of(model), _own(request.data)
    if calibrated and own and not is_language_model(model):
        raise DataError(f"{type(model).__name__} writes no text, so it cannot calibrate itself; {way_out(kind)}")
    texts = [
        data
        for data in (None if own else request.data, request.test)
        if isinstance(data, str | Path) and conversations(str(data)) is None
    ]
    if (texts and kind == "text") or (own and is_language_model(model) and (calibrated or request.evaluate)):
        check_length(model, request.length)


def _own(data: Any) -> bool:
    """Whether the model is to write its own text."""
    return isinstance(data, str) and data == OWN


def read_inputs(checkpoint: Checkpoint, request: Request, calibrated: bool) -> Given:
    """Read what was given and make sure that the model can be called with it.

    Raises: DataError and CheckpointError (no tokenizer for a text), before anything is written.
    """
    model, own = checkpoint.skeleton, _own(request.data)
    tokenizer_of = cache(lambda: _tokenizer(checkpoint.path, request.trust_remote_code))
    reader = Reader(
        model, checkpoint.path, tokenizer_of, request.length, request.seed, trusted=request.trust_remote_code
    )
    data = None if own else request.data
    windows, test = reader.both(
        data,
        request.samples,
        test=request.test,
        test_tokens=request.test_tokens,
        calibrated=calibrated,
        measured=request.evaluate,
    )
    for given in (windows, test if request.test is not None or windows is None else None):
        if given is not None:
            check_call(checkpoint, given.first(1).batches(1)[0], given.source)
    writes, notes = is_language_model(model), reader.notes
    tokenizer = find_tokenizer(checkpoint.path, request.trust_remote_code) if writes else None
    vocabulary = None
    if writes and ((calibrated and windows is None) or (request.evaluate and test is None and own)):
        vocabulary = vocabulary_of(model, tokenizer)
    if writes and request.evaluate and tokenizer is None:
        notes.append("no samples of text in the report: the directory has no tokenizer that can be loaded")
    if request.evaluate and own and test is None and not writes:
        notes.append(f"no figures of quality: {type(model).__name__} writes no text of its own; give data for them")
    digest: dict[str, Any] = {
        use: given.hash[:16] for use, given in (("calibration", windows), ("test", test)) if given is not None
    }
    if vocabulary is not None:
        digest["start"] = list(vocabulary.start)
    return Given(windows, test, vocabulary=vocabulary, tokenizer=tokenizer, digest=digest, notes=notes)


def _tokenizer(path: Path, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(path, trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; a text is read with one: add the tokenizer's files to the directory, or let the model write "
            "(self)"
        ) from error


def find_tokenizer(path: Path, trust_remote_code: bool) -> Any | None:
    """The directory's tokenizer, None where it cannot be loaded."""
    try:
        return load_tokenizer(path, trust_remote_code)
    except CheckpointError:
        return None


def own_windows(request: Request, calibrated: bool) -> int:
    """Windows that a language model writes itself: to calibrate, and for the report's figures, where no text is
    given.
    """
    if not _own(request.data):
        return 0
    return request.samples * calibrated + _test_windows(request) * (request.evaluate and request.test is None)


def _test_windows(request: Request) -> int:
    return max(1, min(request.test_tokens, _OWN_TEST) // request.length)


def complete_inputs(
    checkpoint: Checkpoint,
    request: Request,
    given: Given,
    run: Run,
    progress: Progress,
    device: torch.device,
    calibrated: bool,
) -> tuple[Material | None, Material | None]:
    """The calibration and test windows; what the model wrote itself is kept in the run, so that a resumed one goes on
    with the same.
    """
    windows, test = given.calibration, given.test
    if given.vocabulary is None:
        return windows, test
    own = _Writer(checkpoint, given.vocabulary, run, progress, device)
    if windows is None and calibrated:
        windows = own.text("calibration", request.samples, request.length, request.seed)
    if test is None and request.evaluate:
        test = own.text("test", _test_windows(request), request.length, request.seed + 1)
    return windows, test


@dataclass(frozen=True)
class _Writer:
    """A model that writes its own text, kept in a run."""

    checkpoint: Checkpoint
    vocabulary: Vocabulary
    run: Run
    progress: Progress
    device: torch.device

    def text(self, use: str, samples: int, length: int, seed: int) -> Windows:
        file = self.run.work / f"{use}.safetensors"
        source, start = "text sampled from the model itself", self.vocabulary.start
        if file.is_file() and (kept := load_file(file)["tokens"].long()).shape == (samples, length):
            return Windows(kept, source, start)
        self.progress.start(f"sampling {use} text from the model itself", samples)
        model = self.checkpoint.skeleton
        with Residence(model, self.checkpoint, None, None, self.device).hold(""):
            windows = sample_windows(
                model, samples, length, seed, progress=self.progress.advance, vocabulary=self.vocabulary
            )
        if not self.run.closed:
            tokens = {"tokens": windows.tokens.to(torch.int32)}
            with disk_errors(self.run.out):
                atomically(file, tokens, seal(tokens))
        return Windows(windows.tokens, source, start)
