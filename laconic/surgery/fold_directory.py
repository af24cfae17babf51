"""A compressed model directory, folded into another one of the same format."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.companions import companions
from laconic.disk.integrity import SEALS
from laconic.disk.load import load
from laconic.disk.lock import locked
from laconic.disk.output import Run, check_out
from laconic.disk.store import Compressed, manifest_of, pack_weights, stored_bytes
from laconic.disk.verify import Computed, verify
from laconic.errors import CheckpointError, OutputError, SurgeryError, VerificationError
from laconic.model.batches import Batch
from laconic.surgery.fold import fold_scales
from laconic.surgery.folds import bench
from laconic.surgery.verify import answers, apart
from laconic.weights import installed

TOKENS = (2, 32)  # sequences and tokens of the example: every channel is seen in dozens of places


def fold_directory(
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    seed: int = 0,
    tolerance: float = 1e-5,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fold the compressed language model in `source` and write the result to `out`; returns what was folded and kept,
    and the stored bytes.

    The example is random token ids. Plain tensors that did not change are copied as they are stored; one that did is
    stored in its own type if that is exact, else in float32. What is written is read back: its weights decode to what
    was computed, and its output on the example is the source's, to `tolerance`. Nothing is written if nothing can be
    folded.
    Raises: CheckpointError, OutputError, SurgeryError (nothing to fold, or as `fold` does), VerificationError. Cost:
    the model in memory in float32, about three times.
    """
    if out.resolve() == source.resolve():
        raise OutputError(f"{out}: is the model to fold; choose another directory")
    with locked(out):
        check_out(out, resume=False, overwrite=overwrite)
        return _fold(
            source, out, overwrite=overwrite, seed=seed, tolerance=tolerance, trust_remote_code=trust_remote_code
        )


def _fold(
    source: Path, out: Path, overwrite: bool, seed: int, tolerance: float, trust_remote_code: bool
) -> dict[str, Any]:
    """`fold_directory` into a directory that is ours."""
    stored = Compressed(source)
    model = load(source, dense=False, dtype=torch.float32, trust_remote_code=trust_remote_code)
    example = _example(model, source, seed)
    expected = answers(bench(model), example)
    done, left = fold_scales(model, example, tolerance=tolerance)
    if not done:
        raise SurgeryError(f"{source}: nothing to fold: {left[0]}")
    beside = companions(
        source, trusted=trust_remote_code, model={tensor.file for tensor in stored.files.tensors.values()}, out=out
    )
    run = Run(out, {"fold": source.name}, overwrite=overwrite)
    weights = {name: weight for name, weight in installed(model).items() if name in stored.weights}
    tensors, specs = pack_weights(weights)
    run.commit("weights", tensors, {"specs": specs, "sites": []})
    run.commit("plain", _plain(stored, model), {"specs": {}, "sites": []})
    ours = ("format", "schema", "weights", "specs", "copied", "run", "folded", *SEALS)
    kept = {key: value for key, value in stored.manifest.items() if key not in ours}
    run.finish(
        manifest_of([{"specs": specs}], **kept, folded=len(done)),
        beside,
        json.loads((source / "config.json").read_text()),
    )
    verify(Compressed(out), {name: Computed.of(weight) for name, weight in weights.items()}, {})
    again = load(out, dense=False, dtype=torch.float32, trust_remote_code=trust_remote_code)
    distance = apart(expected, answers(bench(again), example))
    if distance > tolerance:
        raise VerificationError(f"{out}: its output differs from that of {source} by {distance:.1e} of its size")
    run.close()
    return {
        "source": str(source), "out": str(out), "folded": done, "kept": left, "difference": distance,
        "source_bytes": stored_bytes(source), "stored_bytes": stored_bytes(out),
    }  # fmt: skip


def _example(model: nn.Module, source: Path, seed: int) -> Batch:
    """Random token ids. Raises: CheckpointError for a model that takes none."""
    find = getattr(model, "get_input_embeddings", None)
    table = find() if callable(find) else None
    if not isinstance(table, nn.Embedding):
        raise CheckpointError(
            f"{source}: expected a language model, found {type(model).__name__}, which has no table of tokens"
        )
    return {"input_ids": torch.randint(table.num_embeddings, TOKENS, generator=torch.Generator().manual_seed(seed))}


def _plain(stored: Compressed, model: nn.Module) -> dict[str, Tensor]:
    """What is stored beside the weights, as it is or, where folding changed it, as the model has it."""
    present = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    with stored.files.open() as reader:
        for name in stored.names - set(stored.weights):
            tensor, now = reader.get(name), present.get(name)
            if now is not None and not torch.equal(tensor.to(now.dtype), now):
                exact = now.to(tensor.dtype).to(now.dtype)
                tensor = exact.to(tensor.dtype) if torch.equal(exact, now) else now.detach()
            found[name] = tensor.clone()
    return found
