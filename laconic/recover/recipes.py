"""Published ways to train a compressed language model, as a scheme and a recovery."""

from dataclasses import dataclass

from laconic.errors import SchemeError
from laconic.recover.finetune import FineTune
from laconic.recover.losses import KL
from laconic.recover.schedules import Cosine
from laconic.recover.steps import Steps


@dataclass(frozen=True)
class Recipe:
    """A scheme, how it is trained, and the windows it is trained on: tokens per window, windows per minibatch, and
    where text comes from if none is given ("self": the model's own).
    """

    scheme: str
    how: FineTune
    length: int
    batch: int
    data: str | None = None


def dkm(bits: int = 3, embedding_bits: int = 8) -> Recipe:
    """Weight clustering during fine-tuning: every matrix by `DKM(bits)`, the embedding by clusters of `embedding_bits`.

    AdamW at 5e-5, betas (0.9, 0.95), no weight decay, gradients clipped at 1.0, 64 windows of 256 tokens a step, 2
    epochs.
    Source: Cho et al. 2023 (eDKM) section 3.
    """
    learn = Steps("adamw", lr=5e-5, lr_end=5e-5, momentum=0.9, beta2=0.95, clip=1.0)
    scheme = f"DKM(bits={embedding_bits}, iterations=1) if role == 'embedding' else DKM(bits={bits})"
    return Recipe(scheme, FineTune(epochs=2, checks=8, learn=learn), length=256, batch=64)


def llm_qat(bits: int = 4, embedding_bits: int = 8) -> Recipe:
    """Data-free quantization-aware training: text the model writes itself, the original's logits to learn from,
    straight-through rounding.

    Symmetric min-max grids per output channel, the cross-entropy with the original's softmax (which has the gradient of
    the KL), AdamW at 2e-5 without weight decay, one epoch. Weights only: activations and the KV cache, which the paper
    rounds as well, stay as they are.
    Source: Liu et al. 2023 (LLM-QAT) sections 3.1-3.3 and 4.1 (the rate falls by a cosine).
    """
    learn = Steps("adamw", lr=2e-5, clip=1.0, schedule=Cosine(), loss=KL(temperature=1.0))
    table, matrix = (f"RTN(bits={b}, group='channel', symmetric=True)" for b in (embedding_bits, bits))
    scheme = f"{table} if role == 'embedding' else {matrix}"
    return Recipe(scheme, FineTune(epochs=1, checks=8, learn=learn), length=256, batch=8, data="self")


def recipe(name: str, bits: int | None = None) -> Recipe:
    """The recipe of a name, dkm or llm-qat, at its usual bits (3, 4) or others. Raises: SchemeError for another
    name.
    """
    known = {"dkm": dkm, "llm-qat": llm_qat}
    if name not in known:
        raise SchemeError(
            f"unknown method {name!r}; known: {', '.join(known)}. Others are given by --scheme and --recovery"
        )
    return known[name]() if bits is None else known[name](bits)
