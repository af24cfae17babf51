"""Data of every kind read for a model: text, conversations, images, sound, and batches that a user brings; what
measures never calibrates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laconic.data.chats import conversations, sequence
from laconic.data.loaders import Examples, for_model, joined, taken, without_padding
from laconic.data.media import IMAGES, SOUND, files_below, image_calls, sound_calls
from laconic.data.modality import check_ids, decoder_start, kind_of, main_input, most_positions, way_out
from laconic.data.text import TEST_SHARE, Windows, calibration_windows, evaluation_windows, read_text, split_text
from laconic.errors import DataError
from laconic.model.batches import Batch

_GIVEN = "batches given in Python"


class Material(Protocol):
    """What a model is run on: `Windows` of a text, or `Examples` of any kind."""

    @property
    def source(self) -> str: ...
    @property
    def start(self) -> tuple[int, ...]: ...
    @property
    def hash(self) -> str: ...
    @property
    def length(self) -> int: ...
    def batches(self, size: int) -> list[Any]: ...
    def first(self, count: int) -> "Material": ...
    def sequences(self) -> Iterator[Tensor]: ...
    def describe(self) -> dict[str, Any]: ...


@dataclass
class Reader:
    """Reads data for one model: its skeleton, its directory, its tokenizer where text is read, tokens per window, and
    the seed of every draw.

    `notes` are what a user must hear of how it was read; `trusted`: code of the directory's own may prepare images and
    sound.
    """

    model: nn.Module
    folder: Path
    tokenizer: Callable[[], Any]
    length: int
    seed: int
    notes: list[str] = field(default_factory=list)
    trusted: bool = False

    def both(
        self, data: Any, samples: int, test: Any, test_tokens: int, calibrated: bool, measured: bool
    ) -> tuple[Material | None, Material | None]:
        """`samples` windows or examples to calibrate with, and what the report's figures are of: `test`, or the last
        tenth of `data`.

        Raises: DataError where there is too little, or what is no data for the model.
        """
        calibration = held = None
        if data is not None:
            calibration, held = self._split(data, samples, test_tokens, calibrated, measured and test is None)
        if test is not None:
            held = self.measured(test, test_tokens)
        return calibration, held if measured else None

    def measured(self, data: Any, tokens: int | None) -> Material:
        """All of the data, or the first `tokens` positions of a text, to measure a model on. Raises: DataError."""
        if not isinstance(data, str | Path):
            return self._examples(self._given(data, None), _GIVEN)
        name = str(data)
        if kind_of(self.model) != "text":
            return self._examples(self._media(name, None), name)
        rows = conversations(name)
        if rows is not None:
            return self._checked(self._chats(name, rows))
        return self._checked(self._windows(read_text(name), tokens, name))

    def _split(
        self, data: Any, samples: int, test_tokens: int, calibrated: bool, measured: bool
    ) -> tuple[Material | None, Material | None]:
        if not isinstance(data, str | Path):
            return self._divided(self._given(data, samples), samples, _GIVEN, calibrated, measured)
        name = str(data)
        if kind_of(self.model) != "text":
            return self._divided(self._media(name, samples), samples, name, calibrated, measured)
        rows = conversations(name)
        if rows is not None:
            return self._rows(name, rows, samples, calibrated, measured)
        text, last = split_text(read_text(name))
        if not text.strip():
            raise DataError(f"{name}: the text is empty; {samples * self.length:,} tokens are needed")
        windows = (
            calibration_windows(
                text, self.tokenizer(), samples=samples, length=self.length, seed=self.seed, source=name
            )
            if calibrated
            else None
        )
        held = self._windows(last, test_tokens, f"the last tenth of {name}") if measured else None
        return self._checked(windows), self._checked(held)

    def _windows(self, text: str, tokens: int | None, name: str) -> Windows:
        return evaluation_windows(text, self.tokenizer(), self.length, tokens, name)

    def _checked(self, material: Any) -> Any:
        """The windows or sequences, after making sure that every id has a row; for an encoder-decoder, in two
        halves.
        """
        if material is None:
            return None
        for ids in material.sequences() if isinstance(material, Examples) else [material.tokens]:
            check_ids(self.model, ids, material.source, self.tokenizer())
        return replace(material, decoder=decoder_start(self.model)) if isinstance(material, Windows) else material

    def _divided(
        self, calls: list[Batch], samples: int, name: str, calibrated: bool, measured: bool
    ) -> tuple[Examples | None, Examples | None]:
        """The first `samples` examples, and the last tenth, which is not among them."""
        whole = self._examples(calls, name)
        if not measured:
            return (whole.first(samples) if calibrated else None), None
        if whole.count == 1:
            if not calibrated:
                return None, whole
            self.notes.append(
                f"no figures of quality: {name} holds one example, which calibrated; give another as test"
            )
            return whole, None
        kept = whole.count - max(1, round(whole.count * TEST_SHARE))
        before, after = whole.split(kept)
        if not after:  # one batch that cannot be divided
            self.notes.append(
                f"no figures of quality: {name} holds one batch whose tensors differ in their number of examples; give "
                "another as test"
            )
            return (whole if calibrated else None), None
        return (replace(whole, calls=before).first(samples) if calibrated else None), Examples(
            after, f"the last tenth of {name}"
        )

    def _examples(self, calls: list[Batch], name: str) -> Examples:
        calls = [part for call in calls for part in without_padding(call)]
        if not calls:
            raise DataError(f"{name}: expected batches, got none")
        for ids in (call["input_ids"] for call in calls if isinstance(call.get("input_ids"), Tensor)):
            check_ids(self.model, ids, name, None)
            limit = most_positions(self.model)
            if limit is not None and ids.shape[-1] > limit:
                raise DataError(
                    f"{name}: an example has {ids.shape[-1]} tokens, the model takes at most {limit}; cut it to that"
                )
        return Examples([self._with_decoder(call) for call in calls], name)

    def _with_decoder(self, call: Batch) -> Batch:
        """A call of an encoder-decoder that says nothing of what the decoder writes: it is given its start token
        alone.
        """
        start = decoder_start(self.model)
        if (
            start is None
            or not isinstance(call, dict)
            or any(key.startswith("decoder_inputs") or key == "decoder_input_ids" for key in call)
        ):
            return call
        note = (
            f"the decoder was given its start token alone ({start}); give decoder_input_ids or labels to calibrate it "
            "on what it writes"
        )
        if note not in self.notes:
            self.notes.append(note)
        return call | {"decoder_input_ids": torch.full((len(next(iter(call.values()))), 1), start)}

    def _given(self, data: Any, samples: int | None) -> list[Batch]:
        return taken(data, self._wanted(samples), self.seed, lambda batch: for_model(batch, self.model))

    def _media(self, name: str, samples: int | None) -> list[Batch]:
        """Images or recordings of a folder in an order that the seed draws, as many as are needed."""
        kind = kind_of(self.model)
        if kind not in ("images", "sound"):
            raise DataError(f"{name}: {type(self.model).__name__} reads {main_input(self.model)}; {way_out(kind)}")
        suffixes, calls = (IMAGES, image_calls) if kind == "images" else (SOUND, sound_calls)
        files = files_below(name, suffixes, f"{type(self.model).__name__} reads {kind} ({main_input(self.model)})")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed)).tolist()
        drawn = islice((files[i] for i in order), self._wanted(samples))
        return [for_model(call, self.model) for call in calls(self.model, self.folder, drawn, self.notes, self.trusted)]

    @staticmethod
    def _wanted(samples: int | None) -> int:
        """Examples to read so that nine tenths of them are as many as calibrate; practically all where nobody says."""
        return 1 << 40 if samples is None else max(samples + 1, math.ceil(samples / (1 - TEST_SHARE)))

    def _rows(
        self, name: str, rows: list[tuple[int, Any]], samples: int, calibrated: bool, measured: bool
    ) -> tuple[Any, Any]:
        """Conversations: `samples` drawn from the first nine tenths of the file, and the last tenth."""
        cut = len(rows) - max(1, round(len(rows) * TEST_SHARE)) if len(rows) > 1 else 1
        if calibrated and cut < samples:
            raise DataError(
                f"{name}: {samples} conversations are needed, there are {cut} to calibrate with; ask for --samples "
                f"{cut}"
            )
        order = torch.randperm(cut, generator=torch.Generator().manual_seed(self.seed))[:samples].sort().values.tolist()
        drawn = self._checked(self._chats(name, [rows[i] for i in order])) if calibrated else None
        held = (
            self._checked(self._chats(f"the last tenth of {name}", rows[cut:], name))
            if measured and rows[cut:]
            else None
        )
        return drawn, held

    def _chats(self, source: str, rows: list[tuple[int, Any]], path: str | None = None) -> Examples:
        tokenizer = self.tokenizer()
        calls = [
            for_model({"input_ids": sequence(path or source, number, row, tokenizer, self.length)}, self.model)
            for number, row in rows
        ]
        return Examples([self._halved(call) for call in joined(calls, 1)], source)

    def _halved(self, call: Batch) -> Batch:
        """For an encoder-decoder, the first half of a conversation to read and the second to write."""
        start = decoder_start(self.model)
        if start is None:
            return call
        read, written = call["input_ids"].tensor_split(2, dim=1)
        begun = torch.full_like(written[:, :1], start)
        return call | {"input_ids": read, "decoder_input_ids": torch.cat([begun, written[:, :-1]], 1)}
