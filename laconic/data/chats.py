"""Conversations in JSON lines as sequences of tokens, each as the tokenizer's chat template writes it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.data.text import decoded, json_lines, start_tokens
from laconic.errors import DataError
from laconic.host.foreign import Foreign

_KEYS = ("messages", "prompt")


def conversations(source: str) -> list[tuple[int, dict[str, Any]]] | None:
    """The rows of a JSONL file of conversations ("messages", or "prompt" and "completion") with their lines' numbers;
    None for other data.

    Raises: DataError for a file whose rows are not all of that kind.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    try:
        rows = list(json_lines(path, decoded(path)))
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error
    if not rows or "text" in rows[0][1] or not any(key in rows[0][1] for key in _KEYS):
        return None
    for number, row in rows:
        if not any(key in row for key in _KEYS):
            raise DataError(
                f"{path}: line {number}: the first line has 'messages' or 'prompt', this one "
                f"{', '.join(sorted(row)) or 'nothing'}"
            )
    return rows


def sequence(path: str, number: int, row: dict[str, Any], tokenizer: Any, length: int) -> Tensor:
    """The token ids [1, at most length] of one row. Raises: DataError naming the line."""
    where = f"{path}: line {number}"
    prompt, completion = row.get("prompt"), row.get("completion", "")
    if "messages" in row:
        ids = _templated(where, row["messages"], row.get("tools"), tokenizer)
    elif isinstance(prompt, str) and isinstance(completion, str):
        ids = [
            *start_tokens(tokenizer),
            *tokenizer(prompt + completion, add_special_tokens=False, verbose=False)["input_ids"],
        ]
    elif isinstance(prompt, list) and isinstance(completion, list | str):
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        ids = _templated(where, prompt + answer, row.get("tools"), tokenizer)
    else:
        raise DataError(f"{where}: expected 'prompt' and 'completion' as strings or as lists of messages")
    if len(ids) < 2:
        raise DataError(f"{where}: comes to {len(ids)} tokens; at least 2 are needed")
    return torch.tensor([ids[:length]])


def _templated(where: str, messages: Any, tools: Any, tokenizer: Any) -> list[int]:
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        raise DataError(f"{where}: expected 'messages' as a list of objects with 'role' and 'content'")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: the tokenizer has no chat template to write messages with; give texts, or 'prompt' and "
            "'completion' as strings"
        )
    with Foreign(DataError, f"{where}: the tokenizer's chat template does not take it"):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
