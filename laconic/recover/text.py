"""The task a language model and some text make: train, validation and test windows of one text, the loss of the next
token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from laconic.data.inputs import find_tokenizer
from laconic.data.modality import check_ids, check_length, is_language_model
from laconic.data.sampled import vocabulary_of
from laconic.data.text import calibration_windows, evaluation_windows, read_text, split_text
from laconic.disk.companions import Companions, companions
from laconic.disk.files import disk_errors, write_json
from laconic.disk.load import fetch, load_tokenizer
from laconic.disk.skeletons import read_config
from laconic.disk.store import MANIFEST, SCHEMA, read_manifest, write_manifest
from laconic.disk.tensors import TensorFiles
from laconic.errors import CheckpointError, DataError
from laconic.host.foreign import Foreign
from laconic.host.progress import Log, Progress
from laconic.recover.own_text import own_text
from laconic.recover.task import Task

_LONG = 32  # characters per token wanted: from here on windows are looked for in a text, below it is tokenised whole


@dataclass(frozen=True)
class Shuffled:
    """Minibatches of windows [batch, length] in a new order at every pass, drawn from torch's generator as a
    DataLoader's is.
    """

    tokens: Tensor
    batch: int

    def __len__(self) -> int:
        return len(self.tokens) // self.batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(self.tokens))
        for i in range(len(self)):
            yield {"input_ids": self.tokens[order[i * self.batch : (i + 1) * self.batch]], "use_cache": False}


def complete_directory(
    folder: Path, model: nn.Module, source: str | Path, trust_remote_code: bool = False
) -> list[str]:
    """Add to a saved language model what makes its folder one that `laconic.load` and transformers read: config,
    companions; returns notes.

    The config says float32, whatever the original's type: that is what the model was trained and measured in.
    """
    notes = copy_companions(folder, source, trust_remote_code)
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    write_json(
        folder / "config.json",
        config | {"dtype": "float32", "quantization_config": {"quant_method": "laconic", "schema": SCHEMA}},
        indent=2,
    )
    write_manifest(folder, read_manifest(folder), config=True)
    return notes


def copy_companions(folder: Path, source: str | Path, trust_remote_code: bool = False) -> list[str]:
    """Copy what goes with a language model to where another form of it is; returns what the user should know."""
    beside = companions_of(source, trust_remote_code)
    with disk_errors(folder):
        beside.copy_to(folder)
    return beside.notes


def companions_of(source: str | Path, trust_remote_code: bool = False) -> Companions:
    """What of a language model's directory, or hub repository, goes with every form of it."""
    folder = fetch(str(source))
    return companions(
        folder, trusted=trust_remote_code, model={tensor.file for tensor in TensorFiles(folder).tensors.values()}
    )


def text_task(
    source: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    train_tokens: int = 1_000_000,
    check_tokens: int = 32_768,
    length: int = 128,
    batch: int = 16,
    seed: int = 0,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    out: Path | None = None,
    ready: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, Task]:
    """A model directory or hub id as a module on `device`, and the task of predicting a text. `dtype`: of the module;
    "auto" is the file's own.

    Of `data`, the last tenth is for the test (unless `test` names a text of its own), the tenth before it for
    validation, the rest for training: at most `train_tokens` of it in windows of `length` drawn at random; validation
    and test use `check_tokens` each. The score is minus the mean loss, in nats per token: minus the log-perplexity.
    With `data="self"` the model writes all three (the test only if `test` names no text): no data is needed, and a
    score says how likely the model finds its own text. That text is kept in the folder `out` (`own_text`). Writing it
    takes long: `ready` is called with the model before, to find what would be refused afterwards.
    Raises: DataError when the text is too short, CheckpointError.
    """
    folder = fetch(str(source))
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{source}: is compressed already; give the original")
    TensorFiles(folder)  # pickles, which transformers would read, are refused here
    read_config(folder, trust_remote_code)  # which refuses code that nobody trusts
    with Foreign(CheckpointError, folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        ).eval()  # fmt: skip
    model = model.to(device)
    if not is_language_model(model):
        raise DataError(
            f"{source}: text needs a model that predicts the next token; describe another task in a file (--task)"
        )
    check_length(model, length)
    if data == "self":
        if ready is not None:
            ready(model)
        tokenizer = (
            find_tokenizer(folder, trust_remote_code) if test is None else load_tokenizer(folder, trust_remote_code)
        )
        return model, _own_task(
            model, tokenizer, test, train_tokens, check_tokens, length, batch, seed, progress or Log(), out
        )
    tokenizer = load_tokenizer(folder, trust_remote_code)
    text = read_text(data)
    rest, last = (text, read_text(test)) if test is not None else split_text(text)
    learning, check = split_text(rest)
    tokens = _training(learning, tokenizer, train_tokens // length, length, seed, f"training part of {data}")
    if len(tokens) < batch:
        raise DataError(
            f"training part of {data}: {len(tokens)} windows of {length} tokens do not fill a minibatch of {batch}"
        )
    check_ids(model, tokens, str(data), tokenizer)
    validation = evaluation_windows(check, tokenizer, length, check_tokens, f"validation part of {data}")
    tested = evaluation_windows(
        last, tokenizer, length, check_tokens, str(test if test is not None else f"test part of {data}")
    )
    return model, Task(Shuffled(tokens, batch), validation.batches(2 * batch), tested.batches(2 * batch))


def _own_task(
    model: nn.Module,
    tokenizer: Any,
    test: str | Path | None,
    train_tokens: int,
    check_tokens: int,
    length: int,
    batch: int,
    seed: int,
    progress: Progress,
    out: Path | None,
) -> Task:
    """The task of predicting text the model wrote itself."""
    if train_tokens < batch * length:
        raise DataError(
            f"self: {train_tokens} tokens of training do not fill a minibatch of {batch} windows of {length}"
        )
    counts = [train_tokens // length] + [max(1, check_tokens // length)] * (1 if test is not None else 2)
    told = [] if test is None else [evaluation_windows(read_text(test), tokenizer, length, check_tokens, str(test))]
    for windows in told:
        check_ids(model, windows.tokens, windows.source, tokenizer)
    own, *held = own_text(model, counts, length, seed, out, progress, vocabulary_of(model, tokenizer))
    validation, tested = [*held, *told]
    return Task(Shuffled(own.tokens, batch), validation.batches(2 * batch), tested.batches(2 * batch))


def _training(text: str, tokenizer: Any, samples: int, length: int, seed: int, source: str) -> Tensor:
    """`samples` windows drawn at random, or, of a text that has fewer, all it has [windows, length]."""
    if len(text) > _LONG * samples * length:
        return calibration_windows(text, tokenizer, samples, length, seed, source).tokens
    whole = evaluation_windows(text, tokenizer, length, None, source).tokens
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:samples].sort().values]
