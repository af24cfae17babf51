"""Quality of what is stored: perplexity, distance from the original, error bars. Models run block by block, so size
does not matter."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.data.chats import conversations
from laconic.data.modality import accepts, check_length, is_language_model, kind_of
from laconic.data.reading import Material, Reader
from laconic.disk.load import CompressedCheckpoint, load, load_tokenizer, open_source
from laconic.disk.originals import Checkpoint
from laconic.disk.store import stored_bytes
from laconic.errors import DataError
from laconic.host.ambient import undisturbed
from laconic.host.machine import pick_device, pick_dtype
from laconic.measure.harness import refuse_code, run_tasks
from laconic.model.batches import Batch, to_device
from laconic.model.calling import COMPARED, LOGITS, call
from laconic.model.opened import check_call, open_blocks
from laconic.model.residence import Residence

Opened = Checkpoint | CompressedCheckpoint
_RESAMPLES = 1000  # of the bootstrap over windows
_TOKENS = 4096  # per forward pass


@dataclass(frozen=True)
class Quality:
    """What is measured over windows of text that each begin with the tokens `start`; what follows them is predicted,
    from position 2 on.

    `nats_per_token` is the mean negative log-likelihood, `perplexity` its exponential. Against a reference: `kl` = mean
    over positions of KL(reference || model) in nats, `top1` the share of positions where both name the same token
    first, `excess` the difference in nats per token. `*_interval` are 95 % bootstrap intervals over windows (of the
    paired difference, for `excess`).
    """

    data: str
    tokens: int
    nats_per_token: float
    perplexity: float
    perplexity_interval: tuple[float, float]
    reference_perplexity: float | None = None
    excess: float | None = None
    excess_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1: float | None = None
    start: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def outputs(source: Opened, batches: Sequence[Batch], dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """The model's output for each batch; every block is read and decoded once, for all batches together. Take them all,
    in order."""
    blocks, residence, _ = open_blocks(source, dtype, device, batches[0] if batches else None)
    hidden: list[Tensor] = []
    if blocks is not None:
        calls = blocks.capture(batches)
        hidden = [c.hidden for c in calls]
        for i in range(len(blocks)):
            with residence.hold(blocks.block_path(i)), torch.no_grad():
                hidden = [blocks.run(i, h, c).cpu() for h, c in zip(hidden, calls, strict=True)]
    with residence.hold(""):
        for k, batch in enumerate(batches):
            with torch.no_grad():  # not around the yield: a caller's gradient mode is its own
                output = (
                    blocks.tail(hidden[k], batch)
                    if blocks is not None
                    else call(source.skeleton, to_device(batch, device))
                )
            yield output


def predicts(model: nn.Module, material: Material) -> bool:
    """Whether the model predicts the material's next tokens, so that it has a likelihood."""
    return is_language_model(model) and next(material.sequences(), None) is not None


@undisturbed(0)
def perplexity(
    source: Opened,
    windows: Material,
    *,
    reference: Opened | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Quality:
    """Likelihood of the windows under a model and, given a reference, its distance from that. Cost: one forward pass of
    each model."""
    device = device or torch.device("cpu")
    batches = windows.batches(windows_at_once(source, windows))
    own = (output.logits for output in outputs(source, batches, dtype, device))
    if reference is None:
        return compare(windows, own)
    return compare(windows, own, (output.logits for output in outputs(reference, batches, dtype, device)))


def windows_at_once(source: Opened, windows: Material) -> int:
    """Windows per forward pass: at most 4096 tokens, and at most 2^24 logits, of which several copies are held."""
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", 1) or 1
    return max(1, min(_TOKENS, LOGITS // vocabulary) // windows.length)


def compare(windows: Material, own: Iterable[Tensor], reference: Iterable[Tensor] | None = None) -> Quality:
    """Likelihood and distance from a reference out of logits [windows, length, vocabulary] that come in batches, in the
    windows' order."""
    columns: list[Tensor] = []
    first = max(1, len(windows.start))  # the first position that is predicted
    sequences = windows.sequences()
    for logits, original in (
        zip(own, reference, strict=True) if reference is not None else ((logits, None) for logits in own)
    ):
        for i in range(len(logits)):
            targets = next(sequences)[first:].to(logits.device)
            theirs = original[i, first - 1 : -1] if original is not None else None
            columns.append(_of_window(logits[i, first - 1 : -1], theirs, targets).cpu())
    table = torch.stack(columns)  # [windows, (positions, nll, reference nll, kl, agreement)], sums over positions
    return _summary(windows, table, reference is not None)


def _of_window(logits: Tensor, original: Tensor | None, targets: Tensor) -> Tensor:
    """Sums over the positions of one window, a few positions at a time: there are several tensors as large as the
    logits."""
    total = torch.zeros(5 if original is not None else 2, dtype=torch.float64, device=logits.device)
    total[0] = len(targets)
    step = max(1, COMPARED // logits.shape[-1])
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        p, target = logits[here].float().log_softmax(-1), targets[here].unsqueeze(-1)
        total[1] -= p.gather(-1, target).sum(dtype=torch.float64)
        if original is not None:
            q = original[here].float().log_softmax(-1)
            total[2] -= q.gather(-1, target).sum(dtype=torch.float64)
            total[3] += (q.exp() * (q - p)).sum(-1).sum(dtype=torch.float64)
            total[4] += (p.argmax(-1) == q.argmax(-1)).sum()
    return total


def _summary(windows: Material, table: Tensor, compared: bool) -> Quality:
    sums = table.sum(0)
    tokens, means = int(sums[0]), (sums[1:] / sums[0]).tolist()
    drawn = table[torch.randint(len(table), (_RESAMPLES, len(table)), generator=torch.Generator().manual_seed(0))].sum(
        1
    )
    resampled = drawn[:, 1:] / drawn[:, :1]
    nll = _interval(resampled[:, 0])
    interval = math.exp(nll[0]), math.exp(nll[1])
    quality = Quality(windows.source, tokens, means[0], math.exp(means[0]), interval, start=windows.start)
    if not compared:
        return quality
    return replace(
        quality,
        reference_perplexity=math.exp(means[1]),
        excess=means[0] - means[1],
        excess_interval=_interval(resampled[:, 0] - resampled[:, 1]),
        kl=means[2],
        kl_interval=_interval(resampled[:, 2]),
        top1=means[3],
    )


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


@undisturbed(0)
def similarity(
    source: Opened, reference: Opened, windows: Material, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """For models that predict no text: mean cosine and relative squared error of the output against a reference's, over
    its last dimension."""
    batches = windows.batches(windows_at_once(source, windows))
    if not accepts(source.skeleton, "use_cache"):
        batches = [{key: value for key, value in batch.items() if key != "use_cache"} for batch in batches]
    cosine, left, total, count = 0.0, 0.0, 0.0, 0
    for own, other in zip(
        outputs(source, batches, dtype, device), outputs(reference, batches, dtype, device), strict=True
    ):
        y, z = (main_output(output).double().flatten(0, -2) for output in (own, other))
        cosine += float(torch.cosine_similarity(y, z, dim=-1).sum())
        left, total, count = left + float((y - z).square().sum()), total + float(z.square().sum()), count + len(y)
    return {"cosine": cosine / count, "relative_error": left / total}


def main_output(output: Any) -> Tensor:
    """The logits of a model's output, or the first of its tensors that has rows."""
    parts: Iterable[Any] = [output]
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, tuple):
        parts = output
    values = [getattr(output, "logits", None), *parts]
    found = next(
        (value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2),
        None,
    )
    if found is None:
        raise DataError(f"the model's output, a {type(output).__name__}, has no tensor to compare")
    return found


@undisturbed(0)
def evaluate_source(
    source: str | Path,
    *,
    reference: str | Path | None = None,
    data: str | None = None,
    length: int = 256,
    tokens: int | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a compressed or an original model: size, likelihood of a text, distance from a reference, lm-eval tasks.

    Raises: CheckpointError, DataError.
    """
    opened = open_source(source, trust_remote_code=trust_remote_code)
    if tasks and not trust_remote_code:
        refuse_code(tasks)
    result: dict[str, Any] = {"source": str(source), "stored_bytes": stored_bytes(opened.path)}
    result["bits_per_weight"] = 8 * result["stored_bytes"] / sum(p.numel() for p in opened.skeleton.parameters())
    if data is not None:
        windows = _material(opened, data, length, tokens, trust_remote_code)
        other = open_source(reference, trust_remote_code=trust_remote_code) if reference is not None else None
        if predicts(opened.skeleton, windows):
            result |= perplexity(
                opened, windows, reference=other, dtype=pick_dtype(dtype), device=pick_device(device)
            ).as_dict()
        elif other is not None:
            result |= similarity(opened, other, windows, pick_dtype(dtype), pick_device(device))
        else:
            raise DataError(
                f"{source}: this model predicts no text; give the original as --reference to compare their outputs"
            )
    if tasks:
        if isinstance(opened, CompressedCheckpoint):
            model = load(opened.path, dtype=pick_dtype(dtype), trust_remote_code=trust_remote_code)
        else:
            Residence(opened.skeleton, opened, None, pick_dtype(dtype), torch.device("cpu")).keep_all()
            model = opened.skeleton
        result["tasks"] = run_tasks(
            model.to(pick_device(device)),
            load_tokenizer(opened.path, trust_remote_code),
            tasks,
            limit,
            trust_remote_code=trust_remote_code,
        )
    return result


def _material(source: Opened, data: str, length: int, tokens: int | None, trust_remote_code: bool) -> Material:
    """Data that the model can be called with. Raises: DataError, CheckpointError."""
    if kind_of(source.skeleton) == "text" and conversations(data) is None:
        check_length(source.skeleton, length)
    reader = Reader(
        source.skeleton,
        source.path,
        cache(lambda: load_tokenizer(source.path, trust_remote_code)),
        length,
        seed=0,
        trusted=trust_remote_code,
    )
    material = reader.measured(data, tokens)
    check_call(source, material.first(1).batches(1)[0], data)
    return material
