"""What tests share: a tiny real model on disk, a site with correlated inputs, and the team's shared models where they are there."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # as laconic.host.threads does, before PyTorch is imported; for processes that tests start

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laconic.model.sites import Site
from tests.needs import shared_folder
from tests.processes import THREADS

torch.set_num_threads(THREADS)

TEXT = " ".join(
    f"The {a} {b} {c} the {d}."
    for a in ("old", "new", "red")
    for b in ("fox", "dog")
    for c in ("sees", "eats", "finds")
    for d in ("cat", "hen")
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The team's models and data; tests that need them are skipped where they are absent."""
    return shared_folder()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>")


def tiny_config(**changes: object) -> LlamaConfig:
    values = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, initializer_range=0.15, dtype="bfloat16",
    )  # fmt: skip
    return LlamaConfig(**(values | changes))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of 3 blocks with random bfloat16 weights, saved as a user's checkpoint would be. Nobody may write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(1)
    words = TEXT.replace(".", " .").split()
    lines = [" ".join(words[int(i)] for i in torch.randint(len(words), (12,), generator=generator)) for _ in range(900)]
    file.write_text("\n".join(lines) + "\n")
    return file


def make_site(rows: int = 48, columns: int = 64, seed: int = 0, groups: int = 1, spread: float = 0.6) -> Site:
    """A site whose inputs are correlated and of unequal size, with every statistic a method can ask for."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + spread * torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.exp(0.5 * torch.randn(columns, generator=generator))
    hessians, squares, magnitudes, peaks, centres, inputs = [], [], [], [], [], []
    for _ in range(groups):
        X = (torch.randn(512, columns, generator=generator) @ mix) * scale
        hessians.append(X.T @ X / len(X))
        squares.append(hessians[-1].diagonal())
        magnitudes.append(X.abs().mean(0))
        peaks.append(X.abs().amax(0))
        centres.append(X.mean(0))
        inputs.append(X)
    W = 0.05 * torch.randn(rows, columns, generator=generator)
    return Site(
        "block.0.layer", W, groups, hessian=torch.stack(hessians), squares=torch.stack(squares), magnitude=torch.stack(magnitudes),
        peak=torch.stack(peaks), centre=torch.stack(centres), low=torch.stack([X.amin(0).clamp(max=0) for X in inputs]),
        high=torch.stack([X.amax(0).clamp(min=0) for X in inputs]), sample=torch.cat(inputs)[:: 2 * groups].clone(),
        uses=torch.arange(rows, dtype=torch.float32), tokens=torch.full((groups,), 512),
        input=0,
        fisher=torch.rand(rows, columns, generator=generator), output_fisher=torch.rand(rows, generator=generator) + 0.1, channels=torch.arange(rows),
    )  # fmt: skip


def rows_agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute the same rounded matrix [out, in] agree but for ties.

    Where sums are associated differently a value can come to lie on the other side of the middle between two levels, about once in a
    million; the rest of its row follows from that. So at most one row in 16 may differ.
    """
    return int((found != expected).any(1).sum()) <= len(found) // 16


def output_loss(site: Site, Q: torch.Tensor) -> float:
    """tr(E H E^T), in float64, E = W - Q, over all groups."""
    E = (site.W - Q.detach()).double().unflatten(0, (site.groups, -1))
    assert site.hessian is not None
    return float(((E @ site.hessian.double()) * E).sum())
