"""A compressed directory made better part by part: one block of the original and one of the compressed model in memory
at a time.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from laconic.disk.companions import companions
from laconic.disk.integrity import SEALS, digest
from laconic.disk.load import CompressedCheckpoint, open_source
from laconic.disk.lock import locked
from laconic.disk.originals import Checkpoint
from laconic.disk.output import Run, check_out
from laconic.disk.store import manifest_of, pack_weights
from laconic.disk.verify import checksum
from laconic.errors import RecoveryError, SchemeError, VerificationError
from laconic.host.ambient import undisturbed
from laconic.host.machine import pick_device, versions
from laconic.host.progress import Log, Progress
from laconic.model.batches import Batch
from laconic.model.blocks import BlockModel, find_chain, open_chain
from laconic.model.calling import in_evaluation
from laconic.model.residence import Residence
from laconic.recover.batches import digests
from laconic.recover.blockwise import Reconstruction, Trained, trainee_of, why_left, within
from laconic.recover.reconstruct import Fitting, reconstruct
from laconic.recover.targets import Matched, Part, chain_parts
from laconic.weights import Weight, unpack
from laconic.weights.demands import Demands
from laconic.weights.spec import nested

_OURS = ("format", "schema", "weights", "specs", "copied", "run", *SEALS)
"""What a manifest says of the files it lies beside, and not of how the model was made."""
_CHUNK = 1 << 28  # bytes of tensors that nothing changes, stored at a time


@undisturbed(0)
def reconstruct_directory(
    original: str | Path,
    start: str | Path,
    how: Reconstruction,
    batches: Sequence[Batch],
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the blocks of the compressed directory `start` to answer as those of the model it was made of, and write
    the result to `out`.

    `batches`: at least two minibatches the model can be called with, `how.samples` of which are used. Every finished
    part is stored at once, so that a run that was interrupted goes on from there (`resume`). The whole model is never
    judged here, for it is never in memory: a part is kept as it was where held-out minibatches show no gain. Returns
    for every part the error before and after, relative to the start's, and notes.
    Memory: a block of either model in float32, what is trained in it with its gradients, and four states per minibatch.
    Raises: SchemeError (a recovery that needs more than this), RecoveryError (no chain of blocks), CheckpointError,
    OutputError, VerificationError.
    """
    progress, out = progress or Log(), Path(out)
    theirs, ours = _opened(original, start, trust_remote_code)
    if not isinstance(how, Reconstruction):
        raise SchemeError(
            f"{how!r}: a compressed directory is trained part by part: by AdaRound(...) or Blockwise(...)"
        )
    batches = list(batches)[: how.samples]
    if len(batches) < 2:
        raise SchemeError(f"{how!r}: expected at least two minibatches, one of them to check on, got {len(batches)}")
    with locked(out):
        check_out(out, resume=resume, overwrite=overwrite)
        run = Run(out, _fingerprint(theirs, ours, how, batches, seed), resume=resume, overwrite=overwrite)
        if not run.closed:
            _Walk(theirs, ours, how, batches, run, seed, pick_device(device), progress).run()
            _finish(ours, how, run, trust_remote_code)
        told: dict[str, Any] = json.loads((out / "laconic.json").read_text(encoding="utf-8"))["reconstruction"]
    return told


def _opened(original: str | Path, start: str | Path, trusted: bool) -> tuple[Checkpoint, CompressedCheckpoint]:
    theirs, ours = (open_source(source, trust_remote_code=trusted) for source in (original, start))
    if not isinstance(theirs, Checkpoint):
        raise SchemeError(f"{original}: is compressed; expected the model that {start} was made of")
    if not isinstance(ours, CompressedCheckpoint):
        raise SchemeError(f"{start}: expected a compressed directory to start from; make one with laconic compress")
    ours.check()
    return theirs, ours


class _Finished:
    """A compressed directory in which what a run has finished stands in place of what it began with."""

    def __init__(self, start: CompressedCheckpoint, run: Run) -> None:
        self.start, self.run = start, run
        self.weights: dict[str, Weight] = {}
        self.plain: dict[str, Tensor] = {}

    def weight(self, name: str) -> Weight:
        """The weight of a parameter, as far as the run has come."""
        found = self.run.weight_files().get(name)
        if found is None:
            return self.start.stored.weight(name)
        file, spec = found
        with safe_open(file, framework="pt") as reader:
            keys = [key for key in reader.keys() if key.startswith(name + ".")]  # noqa: SIM118
            tensors = {key: reader.get_tensor(key).clone() for key in keys}
        return unpack(spec, nested(tensors, name))

    def read(self, names: list[str]) -> dict[str, Tensor]:
        done = self.run.weight_files()
        found = {
            name: self.start.slots[name].view.restore(self.weight(name).forward()) for name in names if name in done
        }
        for part in self.run.parts().values():
            wanted = [name for name in names if name in part["plain"]]
            if wanted:
                with safe_open(self.run.file(part["part"]), framework="pt") as reader:
                    found |= {name: reader.get_tensor(name).clone() for name in wanted}
        return found | self.start.read([name for name in names if name not in found])

    def demands(self, name: str) -> Demands | None:
        return Demands.of(self.weight(name)) if name in self.start.stored.weights else None

    def nbytes(self, name: str) -> int:
        return self.start.nbytes(name)


@dataclass
class _Walk:
    """The parts of a directory that are not finished, one after the other."""

    theirs: Checkpoint
    start: CompressedCheckpoint
    how: Reconstruction
    batches: list[Batch]
    output: Run
    seed: int
    device: torch.device
    progress: Progress

    def __post_init__(self) -> None:
        self.finished = _Finished(self.start, self.output)
        self.slots = list(dict.fromkeys(self.start.slots.values()))
        chain = find_chain(self.theirs.skeleton)
        theirs = Residence(self.theirs.skeleton, self.theirs, chain, torch.float32, self.device)
        ours = Residence(self.start.skeleton, self.finished, chain, torch.float32, self.device)
        self.original, self.compressed = self._blocks(theirs, chain), self._blocks(ours, chain)

    def _blocks(self, residence: Residence, chain: str | None) -> BlockModel:
        found, why = open_chain(residence, chain, self.batches[0])
        if found is None:
            raise RecoveryError(f"{why or 'the model shows no chain of blocks'}; recover it as a module in memory")
        return found

    def run(self) -> None:
        how = Matched(self.how.per, self.how.target, self.how.fisher, self.seed)
        done = len(self.output.parts())
        self.progress.start("reconstructing", self.how.total_on(self.compressed.model, self.slots))
        self.progress.advance(done * self.how.steps, "finished before")
        with in_evaluation(self.original.model), in_evaluation(self.compressed.model):
            for part in chain_parts(self.original, self.compressed, self.batches, self.slots, how, done=done):
                self._part(part)

    def _part(self, part: Part) -> None:
        """Train a part, put what was found into the block that is held, and store it."""
        sites = []
        for slot in within(part, self.slots):
            W = slot.view.matrix(self.original.model.get_parameter(slot.parameter))
            sites.append(Trained(slot, None, self.finished.weight(slot.parameter), W))
        names = {name for slot in self.slots for name in slot.parameters}
        prefix = f"{part.path}."
        beside = {name: p for name, p in part.module.named_parameters() if prefix + name not in names}
        stored = self.start.read([prefix + name for name, state in beside.items() if self.how.along(state)])
        types = {name: tensor.dtype for name, tensor in stored.items()}
        trainee = trainee_of(self.how, part, sites, beside, types, {})
        fitting = Fitting(0.0, 0.0)
        if trainee.relaxations or trainee.beside:
            fitting = reconstruct(part, trainee, self.how, self.seed, self.device)
        weights: dict[str, Weight] = {}
        plain: dict[str, Tensor] = {}
        if fitting.found is not None:
            with torch.no_grad():
                for slot, weight in fitting.found.weights.items():
                    self.compressed.model.get_parameter(slot.parameter).copy_(slot.view.restore(weight.forward()))
                    weights[slot.parameter] = weight
                for name, state in fitting.found.beside.items():
                    part.module.get_parameter(name).copy_(state)
                    plain[prefix + name] = state.cpu().to(types.get(prefix + name, state.dtype))
        tensors, specs = pack_weights(weights)
        told = {"part": part.path, "before": fitting.before, "after": fitting.after, "steps": fitting.taken}
        told["note"] = why_left(part.path, fitting) if fitting.found is None else ""
        sums = {name: checksum(weight, name) for name, weight in weights.items()}
        record = {
            "specs": specs,
            "sites": [],
            "plain": sorted(plain),
            "checksums": sums,
            "told": told,
            "number": len(self.output.parts()),
        }
        self.output.commit(part.path, tensors | plain, record)
        self.progress.advance(self.how.steps, part.path)
        if told["note"]:
            self.progress.say(str(told["note"]))


def _finish(start: CompressedCheckpoint, how: Reconstruction, run: Run, trusted: bool) -> None:
    """Store what no part changed as it is, and make the directory a model.
    Raises: VerificationError when it is not what was computed.
    """
    done = {name for part in run.parts().values() for name in (*part["specs"], *part["plain"])}
    chunk: list[str] = []
    for name in [*sorted(start.stored.names - done), ""]:
        if chunk and (not name or sum(map(start.nbytes, [*chunk, name])) > _CHUNK):
            _keep(start, run, chunk)
            chunk = []
        if name:
            chunk.append(name)
    parts = list(run.parts().values())
    told = sorted((part for part in parts if part["told"] is not None), key=lambda part: int(part["number"]))
    fields = {key: value for key, value in start.stored.manifest.items() if key not in _OURS}
    fields["reconstruction"] = {"recovery": repr(how), "versions": versions(), "parts": [part["told"] for part in told]}
    files = {stored.file for stored in start.stored.files.tensors.values()}
    beside = companions(start.path, trusted=trusted, model=files, out=run.out)
    run.finish(
        manifest_of(parts, **fields), beside, json.loads((start.path / "config.json").read_text(encoding="utf-8"))
    )
    _verify(start, run, parts, trusted)
    run.verified({})
    run.close()


def _keep(start: CompressedCheckpoint, run: Run, names: list[str]) -> None:
    """Commit stored weights and tensors byte for byte."""
    weights = [name for name in names if name in start.stored.weights]
    plain = [name for name in names if name not in start.stored.weights]
    stored = [*plain, *(f"{name}.{key}" for name in weights for key in start.stored.packed(name))]
    with start.stored.files.open() as reader:
        tensors = {key: reader.get(key).clone() for key in stored}
    specs = {name: start.stored.weights[name] for name in weights}
    run.commit(
        f"kept from {names[0]}", tensors, {"specs": specs, "sites": [], "plain": plain, "told": None, "checksums": {}}
    )


def _verify(start: CompressedCheckpoint, run: Run, parts: list[dict[str, Any]], trusted: bool) -> None:
    found = CompressedCheckpoint(run.out, trust_remote_code=trusted)
    found.check()
    for part in parts:
        for name, expected in part["checksums"].items():
            if checksum(found.stored.weight(name)) != expected:
                raise VerificationError(f"{run.out}: {name} does not decode to what was trained")
    before, after = (source.stored.manifest.get("checksums", {}) for source in (start, found))
    changed = {name for part in parts if part["told"] is not None for name in (*part["specs"], *part["plain"])}
    for name in before.keys() - changed:
        if before[name] != after.get(name):
            raise VerificationError(f"{run.out}: {name} differs from {start.path}'s")


def _fingerprint(
    original: Checkpoint, start: CompressedCheckpoint, how: Reconstruction, batches: Sequence[Batch], seed: int
) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    data = hashlib.sha256(b"".join(digests(batches)))
    return {
        "original": original.path.name, "start": digest(start.stored.manifest), "recovery": repr(how), "seed": seed,
        "data": data.hexdigest()[:16], "laconic": versions()["laconic"],
    }  # fmt: skip
