"""What a stored model and its original write after the same prompt."""

from pathlib import Path
from typing import Any

import torch

from laconic.data.modality import most_positions
from laconic.disk.load import load, load_tokenizer
from laconic.disk.originals import Checkpoint
from laconic.model.residence import Residence

_PROMPT, _ANSWER = 24, 60  # tokens of the generation sample


def generation_samples(
    checkpoint: Checkpoint, out: Path, tokens: torch.Tensor, device: torch.device
) -> list[dict[str, str]]:
    """What the original and the stored model write after the same prompt, the first of `tokens` [windows, length],
    greedily, each as a whole in memory in its turn.
    """
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.trust_remote_code)
    limit = most_positions(checkpoint.skeleton) or _PROMPT + _ANSWER
    prompt = tokens[:1, : min(_PROMPT, limit // 2)].to(device)
    more = min(_ANSWER, limit - prompt.shape[1])
    samples = [{"model": "prompt", "text": tokenizer.decode(prompt[0])}]
    with Residence(checkpoint.skeleton, checkpoint, None, torch.float32, device).hold(""):
        samples.append({"model": "original", "text": _greedy(checkpoint.skeleton, tokenizer, prompt, more)})
    stored = load(out, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code)
    samples.append({"model": "compressed", "text": _greedy(stored.to(device), tokenizer, prompt, more)})
    return samples


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompt: torch.Tensor, more: int) -> str:
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=more,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    return str(tokenizer.decode(ids[0, prompt.shape[1] :]))
