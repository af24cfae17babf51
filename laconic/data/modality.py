"""What a model reads: text, images or sound, how many positions of it, and which token ids. Data is checked against
that before any work.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from laconic.errors import DataError

KINDS = {"input_ids": "text", "pixel_values": "images", "input_features": "sound", "input_values": "sound"}
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
)  # what configs call it


def main_input(model: nn.Module) -> str:
    """The argument that carries what the model reads, as transformers names it: "input_ids", "pixel_values", ..."""
    return str(getattr(model, "main_input_name", "input_ids"))


def kind_of(model: nn.Module) -> str:
    """What the model reads: "text", "images", "sound", or, for another input, that input's name."""
    return KINDS.get(main_input(model), main_input(model))


def way_out(kind: str) -> str:
    """How data of a kind is given."""
    if kind == "text":
        return "give a text with --data"
    if kind in KINDS.values():
        return (
            f"give a folder of {kind} with --data, batches it can be called with in Python, or use a method that needs "
            "no data (RTN)"
        )
    return (
        "give batches it can be called with: laconic.compress(directory, scheme, data=batches); or use a method that "
        "needs no data (RTN)"
    )


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def reads_and_writes(model: nn.Module) -> bool:
    """Whether the model has a decoder that is fed a sequence of its own beside the encoder's."""
    return accepts(model, "decoder_input_ids")


def decoder_start(model: nn.Module) -> int | None:
    """The id a text begins with that the model's decoder writes, of an encoder-decoder; None of any other model."""
    if not reads_and_writes(model):
        return None
    config = text_config(model)
    told = (
        getattr(config, name, None)
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    )
    return next((i for i in told if isinstance(i, int) and i >= 0), 0)


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that is about text, or an empty object of a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_language_model(model: nn.Module) -> bool:
    """Whether the model predicts the next token of a text."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def most_positions(model: nn.Module) -> int | None:
    """The longest text the model takes, in tokens; None where neither its config nor a table of positions says.

    A learned table with a padding index numbers positions from the row after it on (RoBERTa), so it holds fewer than it
    has rows.
    """
    config = text_config(model)
    told = [value for name in _POSITIONS if isinstance(value := getattr(config, name, None), int) and value > 0]
    limit = min(told, default=None)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == limit and module.padding_idx is not None:
            tokens = getattr(config, "vocab_size", None)
            if module.num_embeddings != tokens:
                return limit - module.padding_idx - 1
    return limit


def check_length(model: nn.Module, length: int) -> None:
    """Raises: DataError for windows longer than the model takes."""
    limit = most_positions(model)
    if limit is not None and length > limit:
        raise DataError(f"windows of {length} tokens: the model takes at most {limit} tokens, ask for --length {limit}")


def input_table(model: nn.Module) -> Tensor | None:
    """The matrix [ids, width] that token ids are looked up in, where the model says which it is."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(table, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def check_ids(model: nn.Module, tokens: Tensor, source: str, tokenizer: Any) -> None:
    """Raises: DataError for a token id in `tokens` [windows, length] without a row in the model's embedding, naming
    tokenizer and embedding."""
    table = input_table(model)
    largest = int(tokens.max()) if tokens.numel() else 0
    if table is None or largest < len(table):
        return
    rows, name = (
        len(table),
        next(
            (name.removesuffix(".weight") for name, tensor in model.named_parameters() if tensor is table),
            "of its input",
        ),
    )
    who = (
        f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer):,} tokens) gives"
        if tokenizer is not None
        else "it has"
    )
    raise DataError(
        f"{source}: {who} the token id {largest:,}, but the model's embedding {name} has {rows:,} rows; the tokenizer "
        "belongs to another model"
    )
