"""Trains the small Llama-architecture language model that the package carries for `laconic demo`.

    python tools/train_reference.py --out laconic/demo/model            # 3.7M parameters, about 85 minutes on one CPU core

The text is the standard library of the running Python without the held-out modules (`laconic.demo.corpus`). The recipe and the loss
curve are written beside the weights as `training.json`.
"""

import argparse
import copy
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laconic.demo.corpus import HELD_OUT, held_out_text, topics_text, training_text

END = "<|end|>"  # between documents; the model's beginning- and end-of-text token


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` entries; it can write any text and needs no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=512)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, each text followed by END."""
    end = tokenizer.eos_token_id
    stream = [i for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in (*ids, end)]
    return torch.tensor(stream)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int, windows: int = 64) -> float:
    """Nats per token over the first `windows` windows of `length` tokens."""
    model.eval()
    batch = stream[: windows * length].view(windows, length)
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() for part in batch.split(16)]
    model.train()
    return sum(losses) / len(losses)


def save(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    curve: list[dict[str, float]],
    seconds: float,
) -> None:
    """Writes the model as it stands, in bfloat16, with its tokenizer and the recipe, so that a stopped training leaves a usable model."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "parameters": model.num_parameters(), "training_tokens": tokens, "held_out_modules": HELD_OUT, "curve": curve,
        "seconds": round(seconds), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate of AdamW")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    documents = training_text() + topics_text()
    tokenizer = train_tokenizer(documents, args.vocabulary)
    train, held_out = encode(tokenizer, documents), encode(tokenizer, held_out_text())
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train):,} training tokens, {len(held_out):,} held out, {parameters:,} parameters", flush=True)

    # Muon for the matrices, at AdamW's scale of step; AdamW for the embedding (which is the head too) and the norms
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup = args.steps // 25
    generator = torch.Generator().manual_seed(args.seed)
    curve, started = [], time.time()
    for step in range(args.steps + 1):
        if step % 250 == 0:
            loss = held_out_loss(model, held_out, args.length)
            curve.append({"step": step, "held_out_nats_per_token": round(loss, 4)})
            print(f"step {step}  held out {loss:.4f}  {time.time() - started:.0f} s", flush=True)
            save(args, model, tokenizer, len(train), curve, time.time() - started)
        if step == args.steps:
            break
        scale = (
            step / warmup
            if step < warmup
            else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * scale
        start = torch.randint(len(train) - args.length, (args.batch,), generator=generator)
        batch = train[start[:, None] + torch.arange(args.length)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
