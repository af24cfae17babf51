"""Token windows for calibration and evaluation, from files, directories, the hub, or the model itself; splits that share nothing."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_TEST_SHARE = 0.1  # of a text given for calibration, at its end, is kept for the report's figures and never calibrated on
_CHARACTERS = 16  # read per token wanted, at first: even code in a small vocabulary takes fewer


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length], where they come from, and a hash that changes with any of them."""

    tokens: Tensor
    source: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    def batches(self, size: int) -> list[dict[str, Any]]:
        """The model's keyword arguments for `size` windows at a time."""
        return [{"input_ids": part, "use_cache": False} for part in self.tokens.split(size)]


def read_text(source: str | Path) -> str:
    """The text of a file, of all text files of a directory (by name), or of a hub data set "hub:name[:config[:split]]".

    Raises: DataError when nothing is there, or it is no text.
    """
    if str(source).startswith("hub:"):
        return _hub_text(str(source)[4:])
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{path}: no text files ({', '.join(TEXT_SUFFIXES)}) in this directory")
        return "\n\n".join(_file_text(file) for file in files)
    if not path.is_file():
        raise DataError(f"{source}: no such file or directory; a hub data set is written 'hub:name:config:split', the model's own text 'self'")
    return _file_text(path)


def _file_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return text
    try:
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: every line should be a JSON object with a 'text': {error}") from error


def _hub_text(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("hub data sets need the 'eval' extra: pip install 'laconic[eval]'") from error
    parts = name.split(":")
    config, split = (parts[1] or None) if len(parts) > 1 else None, parts[2] if len(parts) > 2 else "train"
    try:
        rows = load_dataset(parts[0], config, split=split)
        return "\n\n".join(rows["text"])
    except (ValueError, KeyError, OSError, ConnectionError) as error:
        raise DataError(f"hub:{name}: cannot be read as a data set with a 'text' column: {error}") from error


def split_text(text: str) -> tuple[str, str]:
    """(for calibration, for the report): the last tenth, from a line's start, belongs to the report alone."""
    cut = text.find("\n", int(len(text) * (1 - _TEST_SHARE))) + 1
    return (text[:cut], text[cut:]) if cut > 0 else (text, "")


def calibration_windows(text: str, tokenizer: Any, samples: int, length: int, seed: int, source: str) -> Windows:
    """`samples` windows of `length` tokens from line starts drawn at random by a private generator.

    Raises: DataError saying how many tokens are needed when the text is too short for windows that do not overlap.
    """
    if not text.strip():
        raise DataError(f"{source}: the text is empty; {samples * length:,} tokens are needed ({samples} windows of {length})")
    if len(text) <= samples * length * _CHARACTERS * 2:
        ids = _tokens(tokenizer, text)
        if len(ids) < samples * length:
            fits = len(ids) // length
            hint = f", or ask for --samples {fits}" if fits else ""
            raise DataError(f"{source}: {samples * length:,} tokens are needed ({samples} windows of {length}), the text has {len(ids):,}{hint}")
        whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        chosen = torch.randperm(len(whole), generator=_generator(seed))[:samples]
        return Windows(whole[chosen.sort().values], source)
    generator = _generator(seed)
    rows: list[Tensor] = []
    reach = length * _CHARACTERS
    while len(rows) < samples:
        start = int(torch.randint(len(text) - reach, (1,), generator=generator))
        start = text.find("\n", start) + 1
        ids = _tokens(tokenizer, text[start : start + reach])
        if len(ids) < length:  # few characters per token, or near the end of the text
            reach = min(2 * reach, len(text) // 2)
            continue
        rows.append(torch.tensor(ids[:length]))
    return Windows(torch.stack(rows), source)


def evaluation_windows(text: str, tokenizer: Any, length: int, tokens: int | None, source: str) -> Windows:
    """The text tokenised once and cut into windows of `length` that do not overlap; the first `tokens` tokens of it, if given.

    Raises: DataError when there is not even one window.
    """
    reach = len(text) if tokens is None else tokens * _CHARACTERS
    ids = _tokens(tokenizer, text[:reach])
    if tokens is not None and len(ids) < tokens and reach < len(text):
        ids = _tokens(tokenizer, text)
    ids = ids[: tokens if tokens is not None else len(ids)]
    if len(ids) < length:
        raise DataError(f"{source}: at least {length:,} tokens are needed (one window), the text has {len(ids):,}")
    return Windows(torch.tensor(ids[: len(ids) // length * length]).view(-1, length), source)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample_windows(model: Any, samples: int, length: int, seed: int, batch: int = 32, progress: Callable[[float], None] | None = None) -> Windows:
    """Text the model writes itself: each window starts from a random token, goes on greedily for 4 tokens, then samples from the model.

    `progress` is told of every batch how many windows it was.
    Source: LLM-QAT (Liu et al. 2023) section 3.1: data-free calibration by next-token generation, deterministic at first, then stochastic.
    """
    rows = []
    for ids in sampled_batches(model, samples, length, _generator(seed), batch):
        rows.append(ids)
        if progress is not None:
            progress(len(ids))
    return Windows(torch.cat(rows), "self")


@torch.no_grad()
def sampled_batches(model: Any, samples: int, length: int, generator: torch.Generator, batch: int = 32) -> Iterator[Tensor]:
    """The windows of `sample_windows`, as many at a time as are written together [batch, length]."""
    table = model.get_input_embeddings().weight
    vocabulary, device = table.shape[0], table.device
    special = {i for i in (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) if isinstance(i, int)}
    for start in range(0, samples, batch):
        count = min(batch, samples - start)
        ids = torch.randint(vocabulary, (count, 1), generator=generator)
        past = None
        for position in range(1, length):
            output = model(input_ids=(ids[:, -1:] if past is not None else ids).to(device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            logits[:, sorted(special)] = -torch.inf  # an end of text would turn the rest of the window into noise
            chosen = logits.argmax(-1, keepdim=True) if position <= 4 else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, chosen], 1)
        yield ids
