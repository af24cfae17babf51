"""Quality of what is stored: perplexity, distance from the original, error bars. Models run block by block, so size does not matter."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.blocks import Batch, BlockModel, call, find_chain, to_device
from laconic.data import Windows, evaluation_windows, read_text
from laconic.errors import DataError, SchemeError
from laconic.load import Checkpoint, CompressedCheckpoint, load, load_tokenizer, open_source
from laconic.machine import pick_device, pick_dtype
from laconic.residence import Residence
from laconic.store import stored_bytes

Source = Checkpoint | CompressedCheckpoint
_RESAMPLES = 1000  # of the bootstrap over windows
_TOKENS = 4096  # per forward pass
LOGITS = 1 << 24  # per forward pass
COMPARED = 1 << 22  # logits compared at a time


@dataclass(frozen=True)
class Quality:
    """What is measured over windows of text; positions 2 to length of every window are predicted.

    `nats_per_token` is the mean negative log-likelihood, `perplexity` its exponential. Against a reference: `kl` = mean over positions of
    KL(reference || model) in nats, `top1` the share of positions where both name the same token first, `excess` the difference in nats per
    token. `*_interval` are 95 % bootstrap intervals over windows (of the paired difference, for `excess`).
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_blocks(source: Source, dtype: torch.dtype | None, device: torch.device) -> tuple[BlockModel | None, Residence]:
    """The source as a chain of blocks that come into memory one at a time, or None where its structure has no chain."""
    path = find_chain(source.skeleton)
    residence = Residence(source.skeleton, source, path, dtype, device)
    return (BlockModel(residence, path) if path is not None else None), residence


def outputs(source: Source, batches: Sequence[Batch], dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """The model's output for each batch; every block is read and decoded once, for all batches together. Take them all, in order."""
    blocks, residence = open_blocks(source, dtype, device)
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
                output = blocks.tail(hidden[k], batch) if blocks is not None else call(source.skeleton, to_device(batch, device))
            yield output


def is_language_model(model: nn.Module) -> bool:
    """Whether the model predicts the next token of a text."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def perplexity(
    source: Source, windows: Windows, *, reference: Source | None = None, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Quality:
    """Likelihood of the windows under a model and, given a reference, its distance from that. Cost: one forward pass of each model."""
    device = device or torch.device("cpu")
    batches = windows.batches(windows_at_once(source, windows))
    own = (output.logits for output in outputs(source, batches, dtype, device))
    if reference is None:
        return compare(windows, own)
    return compare(windows, own, (output.logits for output in outputs(reference, batches, dtype, device)))


def windows_at_once(source: Source, windows: Windows) -> int:
    """Windows per forward pass: at most 4096 tokens, and at most 2^24 logits, of which several copies are held."""
    vocabulary = getattr(source.config.get_text_config(), "vocab_size", 1) or 1
    return max(1, min(_TOKENS, LOGITS // vocabulary) // windows.tokens.shape[1])


def compare(windows: Windows, own: Iterable[Tensor], reference: Iterable[Tensor] | None = None) -> Quality:
    """Likelihood and distance from a reference out of logits [windows, length, vocabulary] that come in batches, in the windows' order."""
    columns: list[Tensor] = []
    start = 0
    for logits, original in zip(own, reference, strict=True) if reference is not None else ((logits, None) for logits in own):
        targets = windows.tokens[start : start + len(logits), 1:].to(logits.device)
        start += len(logits)
        for i, target in enumerate(targets):
            columns.append(_of_window(logits[i, :-1], original[i, :-1] if original is not None else None, target).cpu())
    table = torch.stack(columns).double()  # [windows, (nll, reference nll, kl, agreement)], means over positions
    return _summary(windows, table, reference is not None)


def _of_window(logits: Tensor, original: Tensor | None, targets: Tensor) -> Tensor:
    """Means over the positions of one window, a few positions at a time: there are several tensors as large as the logits."""
    total = torch.zeros(4 if original is not None else 1, dtype=torch.float64, device=logits.device)
    step = max(1, COMPARED // logits.shape[-1])
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        p, target = logits[here].float().log_softmax(-1), targets[here].unsqueeze(-1)
        total[0] -= p.gather(-1, target).sum(dtype=torch.float64)
        if original is not None:
            q = original[here].float().log_softmax(-1)
            total[1] -= q.gather(-1, target).sum(dtype=torch.float64)
            total[2] += (q.exp() * (q - p)).sum(-1).sum(dtype=torch.float64)
            total[3] += (p.argmax(-1) == q.argmax(-1)).sum()
    return total / len(targets)


def _summary(windows: Windows, table: Tensor, compared: bool) -> Quality:
    means = table.mean(0).tolist()
    resampled = table[torch.randint(len(table), (_RESAMPLES, len(table)), generator=torch.Generator().manual_seed(0))].mean(1)
    tokens = windows.tokens.shape[0] * (windows.tokens.shape[1] - 1)
    nll = _interval(resampled[:, 0])
    quality = Quality(windows.source, tokens, means[0], math.exp(means[0]), (math.exp(nll[0]), math.exp(nll[1])))
    if not compared:
        return quality
    return Quality(
        windows.source, tokens, means[0], math.exp(means[0]), (math.exp(nll[0]), math.exp(nll[1])), math.exp(means[1]), means[0] - means[1],
        _interval(resampled[:, 0] - resampled[:, 1]), means[2], _interval(resampled[:, 2]), means[3],
    )  # fmt: skip


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def similarity(source: Source, reference: Source, windows: Windows, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """For models that predict no text: mean cosine and relative squared error of the output against a reference's."""
    batches = [{"input_ids": batch["input_ids"]} for batch in windows.batches(windows_at_once(source, windows))]
    cosine, left, total, count = 0.0, 0.0, 0.0, 0
    for own, other in zip(outputs(source, batches, dtype, device), outputs(reference, batches, dtype, device), strict=True):
        y, z = own[0].double().flatten(0, -2), other[0].double().flatten(0, -2)
        cosine += float(torch.cosine_similarity(y, z, dim=-1).sum())
        left, total, count = left + float((y - z).square().sum()), total + float(z.square().sum()), count + len(y)
    return {"cosine": cosine / count, "relative_error": left / total}


def run_tasks(model: nn.Module, tokenizer: Any, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    """Scores of lm-eval tasks (names of its registry, or YAML files) by task and metric. Needs the 'eval' extra.

    Raises: SchemeError for a task that lm-eval does not know, or when it is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SchemeError("lm-eval tasks need the 'eval' extra: pip install 'laconic[eval]'") from error
    files = {task: Path(task) for task in tasks if task.endswith(".yaml")}
    names = [_task_name(files[task]) if task in files else task for task in tasks]
    folders = sorted({str(file.parent) for file in files.values()})
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))  # its own are thousands of files to read
    for name in names:
        if name not in manager.all_tasks:
            raise SchemeError(f"{name}: lm-eval has no task of that name; a task of your own is given as a file that ends in .yaml")
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=names, limit=limit, task_manager=manager)
    return {name: {k: v for k, v in scores.items() if isinstance(v, int | float)} for name, scores in results["results"].items()}


def _task_name(file: Path) -> str:
    """What a task's YAML file calls the task; the file may have functions in it, so it is searched and not parsed."""
    found = re.search(r"^(?:group|task)[ \t]*:[ \t]*['\"]?([^\s'\"#]+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    if found is None:
        raise SchemeError(f"{file}: expected the YAML file of an lm-eval task, with a line 'task: name'")
    return found[1]


def count_parameters(model: nn.Module) -> int:
    """Distinct parameters, ties counted once."""
    return sum(p.numel() for p in model.parameters())


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
    result: dict[str, Any] = {"source": str(source), "stored_bytes": stored_bytes(opened.path)}
    result["bits_per_weight"] = 8 * result["stored_bytes"] / count_parameters(opened.skeleton)
    if data is not None:
        windows = evaluation_windows(read_text(data), load_tokenizer(opened.path, trust_remote_code), length, tokens, data)
        other = open_source(reference, trust_remote_code=trust_remote_code) if reference is not None else None
        if is_language_model(opened.skeleton):
            result |= perplexity(opened, windows, reference=other, dtype=pick_dtype(dtype), device=pick_device(device)).as_dict()
        elif other is not None:
            result |= similarity(opened, other, windows, pick_dtype(dtype), pick_device(device))
        else:
            raise DataError(f"{source}: this model predicts no text; give the original as --reference to compare their outputs")
    if tasks:
        if isinstance(opened, CompressedCheckpoint):
            model = load(opened.path, dtype=pick_dtype(dtype), trust_remote_code=trust_remote_code)
        else:
            Residence(opened.skeleton, opened, None, pick_dtype(dtype), torch.device("cpu")).keep_all()
            model = opened.skeleton
        result["tasks"] = run_tasks(model.to(pick_device(device)), load_tokenizer(opened.path, trust_remote_code), tasks, limit)
    return result
