"""Text that a model writes itself, for want of a better one."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laconic.data.modality import input_table, text_config
from laconic.data.text import Windows, generator_of, start_tokens
from laconic.errors import DataError


@dataclass(frozen=True)
class Vocabulary:
    """What a model's own text is made of: the ids it `start`s with, and ids below `size` that are not `special`."""

    start: tuple[int, ...]
    size: int
    special: frozenset[int]


def vocabulary_of(model: Any, tokenizer: Any | None = None) -> Vocabulary:
    """The vocabulary of a model's own text; ids have a row in the embedding and, where there is a tokenizer, a token.

    A text starts as the tokenizer starts one. Without a tokenizer nobody says so; the config's `bos_token_id` is taken
    where it has a row.
    """
    config = text_config(model)
    table = input_table(model)
    rows = len(table) if table is not None else config.vocab_size
    size = rows if tokenizer is None else min(rows, len(tokenizer))
    named = _named_tokens(config)
    special = {i for ids in named.values() for i in ids}
    if tokenizer is None:
        start = tuple(i for i in named["bos_token_id"] if i < size)[:1]
    else:
        start, special = start_tokens(tokenizer), special | set(tokenizer.all_special_ids)
    if any(i >= rows for i in start):
        raise DataError(
            f"the tokenizer begins a text with the ids {list(start)}, but the model's embedding has {rows:,} rows"
        )
    return Vocabulary(start, size, frozenset(i for i in special if i < size))


def _named_tokens(config: Any) -> dict[str, list[int]]:
    """The special tokens a config names, by name; some name several."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found[name] = [
            i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int) and i >= 0
        ]
    return found


def sample_windows(
    model: Any, samples: int, length: int, seed: int, batch: int = 32, progress: Callable[[float], None] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Windows:  # fmt: skip
    """Text the model writes itself: each window begins with the vocabulary's start tokens and goes on with tokens
    sampled from the model.

    Without start tokens it begins with a random token and goes on greedily for 4 tokens before it samples. `progress`
    is told of every batch how many windows it was. Without a `vocabulary`, the embedding's rows without start tokens.
    Source: LLM-QAT (Liu et al. 2023) section 3.1: data-free calibration by next-token generation, deterministic at
    first, then stochastic.
    """
    rows = []
    for ids in sampled_batches(
        model, samples, length=length, generator=generator_of(seed), batch=batch, vocabulary=vocabulary
    ):
        rows.append(ids)
        if progress is not None:
            progress(len(ids))
    return Windows(torch.cat(rows), "self", vocabulary.start if vocabulary is not None else ())


@torch.no_grad()
def sampled_batches(
    model: Any,
    samples: int,
    length: int,
    generator: torch.Generator,
    batch: int = 32,
    vocabulary: Vocabulary | None = None,
) -> Iterator[Tensor]:
    """The windows of `sample_windows`, as many at a time as are written together [batch, length]."""
    device = next(model.parameters()).device
    if vocabulary is None:
        vocabulary = replace(vocabulary_of(model), start=())
    special, start = sorted(vocabulary.special), torch.tensor(vocabulary.start, dtype=torch.long)
    if length <= len(start):
        raise DataError(
            f"windows of {length} tokens: a text begins with {len(start)} start tokens; ask for a larger --length"
        )
    ordinary = torch.tensor([i for i in range(vocabulary.size) if i not in vocabulary.special])
    cached = "past_key_values" in inspect.signature(model.forward).parameters
    for first in range(0, samples, batch):
        count = min(batch, samples - first)
        ids = (
            start.expand(count, -1)
            if len(start)
            else ordinary[torch.randint(len(ordinary), (count, 1), generator=generator)]
        )
        greedy = 0 if len(start) else 5  # positions: a random one and what follows it
        past = None
        for position in range(ids.shape[1], length):
            more = {"past_key_values": past, "use_cache": True} if cached else {}
            output = model(input_ids=(ids[:, -1:] if past is not None else ids).to(device), **more)
            past = getattr(output, "past_key_values", None)
            logits = output.logits[:, -1].float().cpu()
            logits[:, special] = -torch.inf  # an end of text would turn the rest of the window into noise
            logits[:, vocabulary.size :] = -torch.inf  # rows that only fill up the embedding
            chosen = (
                logits.argmax(-1, keepdim=True)
                if position < greedy
                else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            )
            ids = torch.cat([ids, chosen], 1)
        yield ids
