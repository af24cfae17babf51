"""Token windows for calibration and evaluation, from files, directories, the hub, or the model itself; splits that
share nothing.

A window begins as the tokenizer begins a text: with the tokens it puts before one (`<bos>` of Gemma, Llama, Mistral),
if any.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.errors import CheckpointError, DataError
from laconic.host.foreign import Foreign

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
TEST_SHARE = (
    0.1  # of a text given for calibration, at its end, is kept for the report's figures and never calibrated on
)
_CHARACTERS = 16  # read per token wanted, at first: even code in a small vocabulary takes fewer


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length], where they come from, and the ids each window begins with because the tokenizer
    begins a text so.

    The first position and those start tokens are never predicted. The hash changes with any token. An encoder-decoder's
    encoder reads the first half of each window, its decoder, which begins with the id `decoder`, writes the second.
    """

    tokens: Tensor
    source: str
    start: tuple[int, ...] = ()
    decoder: int | None = None

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.tokens.shape[1]

    def batches(self, size: int) -> list[dict[str, Any]]:
        """The model's keyword arguments for `size` windows at a time."""
        return [self._call(part) for part in self.tokens.split(size)]

    def _call(self, part: Tensor) -> dict[str, Any]:
        if self.decoder is None:
            return {"input_ids": part, "use_cache": False}
        read, written = part.tensor_split(2, dim=1)
        begun = torch.full_like(written[:, :1], self.decoder)
        return {"input_ids": read, "decoder_input_ids": torch.cat([begun, written[:, :-1]], 1), "use_cache": False}

    def first(self, count: int) -> "Windows":
        """The first `count` windows."""
        return replace(self, tokens=self.tokens[:count])

    def sequences(self) -> Iterator[Tensor]:
        """The token ids of every window, in order [length]."""
        yield from self.tokens

    def describe(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {
            "source": self.source,
            "sha256": self.hash,
            "windows": list(self.tokens.shape),
            "start": list(self.start),
        }


def read_text(source: str | Path) -> str:
    """The text of a file, of all text files of a directory (by name), or of a hub data set "hub:name[:config[:split]]".

    Raises: DataError when nothing is there, it cannot be read, or it is no text.
    """
    if str(source).startswith("hub:"):
        return _hub_text(str(source)[4:])
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
            if not files:
                raise DataError(f"{path}: no text files ({', '.join(TEXT_SUFFIXES)}) in this directory")
            return "\n\n".join(_file_text(file) for file in files)
        if path.is_file():
            return _file_text(path)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error
    raise DataError(
        f"{source}: no such file or directory; a hub data set is written 'hub:name:config:split', the model's own text "
        "'self'"
    )


def _file_text(path: Path) -> str:
    text = decoded(path)
    return (
        text
        if path.suffix.lower() != ".jsonl"
        else "\n\n".join(_row_text(path, number, row) for number, row in json_lines(path, text))
    )


def decoded(path: Path) -> str:
    """A file's text: UTF-8 with or without a byte order mark, lines ended by "\\n", "\\r\\n" or "\\r". Raises:
    DataError, OSError.
    """
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}: not UTF-8 text but UTF-16, by its first two bytes; write it anew, for example: iconv -f UTF-16 "
            "-t UTF-8"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if "\0" in text:
        raise DataError(f"{path}: not text: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with the numbers of their lines, which "\\n" alone ends. Raises: DataError naming a
    line that is none.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: line {number}: every line should be a JSON object with a 'text': {error}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number}: every line should be a JSON object with a 'text', found a {type(row).__name__}"
            )
        yield number, row


def _row_text(path: Path, number: int, row: dict[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        found = (
            f"'text' is a {type(text).__name__}"
            if "text" in row
            else f"found {', '.join(sorted(row)) or 'an empty one'}"
        )
        raise DataError(
            f"{path}: line {number}: every line should be a JSON object with a 'text' that is a string: {found}"
        )
    return text


def _hub_text(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("hub data sets need the 'eval' extra: pip install 'laconic[eval]'") from error
    parts = name.split(":")
    config, split = (parts[1] or None) if len(parts) > 1 else None, parts[2] if len(parts) > 2 else "train"
    with Foreign(DataError, f"hub:{name}: cannot be read as a data set with a 'text' column"):
        return "\n\n".join(load_dataset(parts[0], config, split=split)["text"])


def split_text(text: str) -> tuple[str, str]:
    """(for calibration, for the report): the last tenth, from a line's start, belongs to the report alone."""
    cut = text.find("\n", int(len(text) * (1 - TEST_SHARE))) + 1
    return (text[:cut], text[cut:]) if cut > 0 else (text, "")


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids a tokenizer puts before a text of its own accord: `<bos>` for Gemma, Llama and Mistral, none for GPT-2
    and Qwen.

    What it puts behind one (the end of sequence of T5) is not among them.
    """
    whole = _tokens(tokenizer, "a", special=True)
    bare = _tokens(tokenizer, "a")
    found = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:found])


def calibration_windows(text: str, tokenizer: Any, samples: int, length: int, seed: int, source: str) -> Windows:
    """`samples` windows of `length` tokens, start tokens included, from line starts drawn at random by a private
    generator.

    Raises: DataError saying how many tokens are needed when the text is too short for windows that do not overlap.
    """
    start = start_tokens(tokenizer)
    each = _room(length, start)
    if not text.strip():
        raise DataError(
            f"{source}: the text is empty; {samples * each:,} tokens are needed ({samples} windows of {length})"
        )
    if len(text) <= samples * each * _CHARACTERS * 2:
        ids = _tokens(tokenizer, text)
        if len(ids) < samples * each:
            fits = len(ids) // each
            hint = f", or ask for --samples {fits}" if fits else ""
            raise DataError(
                f"{source}: {samples * each:,} tokens are needed ({samples} windows of {length}), the text has "
                f"{len(ids):,}{hint}"
            )
        whole = torch.tensor(ids[: len(ids) // each * each]).view(-1, each)
        chosen = torch.randperm(len(whole), generator=generator_of(seed))[:samples]
        return _windows(whole[chosen.sort().values], source, start)
    generator = generator_of(seed)
    rows: list[Tensor] = []
    reach = each * _CHARACTERS
    while len(rows) < samples:
        place = int(torch.randint(len(text) - reach, (1,), generator=generator))
        place = text.find("\n", place) + 1
        ids = _tokens(tokenizer, text[place : place + reach])
        if len(ids) < each:  # few characters per token, or near the end of the text
            reach = min(2 * reach, len(text) // 2)
            continue
        rows.append(torch.tensor(ids[:each]))
    return _windows(torch.stack(rows), source, start)


def evaluation_windows(text: str, tokenizer: Any, length: int, tokens: int | None, source: str) -> Windows:
    """The text tokenised once and cut into windows that do not overlap, each `length` tokens with the start tokens
    before it.

    With `tokens`, as many windows as that many tokens fill, start tokens included. With start tokens every token of a
    window's text is predicted, the first one from them; without, all but the first. Of a text of one window that is
    lm-eval's rolling log-likelihood.
    Raises: DataError when there is not even one window.
    """
    start = start_tokens(tokenizer)
    each = _room(length, start)
    wanted = None if tokens is None else tokens // length * each
    reach = len(text) if wanted is None else max(wanted, each) * _CHARACTERS
    ids = _tokens(tokenizer, text[:reach])
    if wanted is not None and len(ids) < wanted and reach < len(text):
        ids = _tokens(tokenizer, text)
    if tokens is not None and tokens < length:
        raise DataError(f"{source}: at least {length:,} tokens are needed (one window), {tokens:,} were asked for")
    if len(ids) < each:
        raise DataError(f"{source}: at least {each:,} tokens are needed (one window), the text has {len(ids):,}")
    ids = ids[:wanted]
    return _windows(torch.tensor(ids[: len(ids) // each * each]).view(-1, each), source, start)


def _room(length: int, start: tuple[int, ...]) -> int:
    """How many tokens of a text a window holds beside the start tokens."""
    if length <= len(start):
        raise DataError(
            f"windows of {length} tokens: the tokenizer begins a text with {len(start)} of its own; ask for a larger "
            "--length"
        )
    return length - len(start)


def _windows(texts: Tensor, source: str, start: tuple[int, ...]) -> Windows:
    before = torch.tensor(start, dtype=texts.dtype).expand(len(texts), -1)
    return Windows(torch.cat([before, texts], 1), source, start)


def _tokens(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    with Foreign(CheckpointError, "the model's tokenizer fails on a text"):
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
