"""What a run does to a model, pass by pass: survey (if a method spreads one number over many sites), compression, verification."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from laconic.disk.files import disk_errors, seal, write_tensors
from laconic.disk.load import Checkpoint, CompressedCheckpoint
from laconic.disk.output import Run
from laconic.disk.store import pack_weights, same_tensor
from laconic.engine.plan import Plan, numbered
from laconic.engine.solve import checksum, matrix_of, put_back, solve_stage
from laconic.engine.statistics import Statistics
from laconic.engine.walk import (
    Loss,
    Needs,
    Shelf,
    Stage,
    default_loss,
    parameters_of,
    survey,
    survey_whole,
    walk,
    walk_whole,
)  # fmt: skip
from laconic.errors import SchemeError, VerificationError
from laconic.host.progress import Progress
from laconic.host.record import plain
from laconic.host.told import SiteRecord
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.methods.channels import MODULES_ONLY
from laconic.model.batches import Batch
from laconic.model.blocks import BlockModel, Residency
from laconic.model.sites import NONE, Site, Slot, Stats
from laconic.weights import Weight, unpack
from laconic.weights.base import asks_its_layer
from laconic.weights.demands import Demands, why_not
from laconic.weights.inputs import inputs_of

_PART = 1 << 27  # bytes compared at a time


class Overlay:
    """A checkpoint in which the weights a run has finished stand in the original ones' places."""

    def __init__(self, checkpoint: Checkpoint, run: Run, slots: Sequence[Slot]) -> None:
        self.checkpoint, self.run = checkpoint, run
        self.views = {name: slot.view for slot in slots for name in slot.parameters}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        finished = self.run.weight_files()
        found = self.checkpoint.read([name for name in names if name not in finished])
        for name in names:
            if name in finished:
                found[name] = self.views[name].restore(read_weight(*finished[name], name).forward())
        return found

    def demands(self, name: str) -> Demands | None:
        finished = self.run.weight_files().get(name)
        return (
            Demands.of(read_weight(*finished, name)) if finished is not None and asks_its_layer(finished[1]) else None
        )

    def nbytes(self, name: str) -> int:
        return self.checkpoint.nbytes(name)


def read_weight(file: Path, spec: dict[str, Any], name: str) -> Weight:
    """One weight of a part's file."""
    with safe_open(file, framework="pt") as reader:
        names = [key for key in reader.keys() if key.startswith(name + ".")]  # noqa: SIM118
        tensors = {key[len(name) + 1 :]: reader.get_tensor(key).clone() for key in names}
    return unpack(spec, tensors)


def refuse_structures(plan: Plan) -> None:
    """Raises SchemeError if a method has to know which rows are one channel of the network, where nobody can tell it."""
    for slot in plan.structures[:1]:
        raise SchemeError(f"{slot.name}: {plan.methods[slot]!r} has to know which rows are one channel; {MODULES_ONLY}")


def refuse_rounding(model: nn.Module, plan: Plan) -> None:
    """Raises SchemeError, naming the way out, if a method rounds the inputs of layers that cannot do so (convolutions, look-ups)."""
    refused: dict[Slot, str] = {}
    for slot, inputs in plan.rounding.items():
        for layer in slot.layers(model):
            if (reason := why_not(layer, inputs, plan.methods[slot].scales_columns)) is not None:
                refused.setdefault(slot, reason)
    if not refused:
        return
    slot, reason = next(iter(refused.items()))
    names = list(dict.fromkeys(numbered(found.name) if "." in found.name else found.name for found in refused))
    more = f" (and of {len(refused) - 1} more sites)" if len(refused) > 1 else ""
    rules = ", ".join(f"({name!r}, Keep())" for name in names)
    keep = " ".join(f"--keep {name!r}" for name in names)
    raise SchemeError(
        f"{slot.name}{more}: {reason}; leave them out with {keep}, or in a plan: [{rules}, ('*', {plan.methods[slot]!r})]"
    )


class Extras:
    """Gradient statistics of single sites, kept between the survey and the compression, in memory or in a run's folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"extra-{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"

    def put(self, site: Site, wanted: Stats) -> None:
        values = {}
        if wanted & Stats.FISHER and site.fisher is not None:
            values["fisher"] = site.fisher
        if wanted & Stats.OUTPUT_FISHER and site.output_fisher is not None:
            values["output_fisher"] = site.output_fisher
        if not values:
            return
        if self.folder is None:
            self._kept[site.name] = values
        else:
            with disk_errors(self.folder):
                write_tensors(self._file(site.name), values, seal(values))

    def given(self, site: Site) -> Site:
        """The site with what was kept for it."""
        values = self._kept.get(site.name, {})
        if self.folder is not None and self._file(site.name).is_file():
            values = load_file(self._file(site.name))
        return site.having(**values) if values else site


def allocate(
    stages: Iterator[Stage], plan: Plan, spread: dict[Method, Allocation], extras: Extras, model: nn.Module, seed: int, progress: Progress,
    notes: list[str],
) -> Plan:  # fmt: skip
    """Let every allocation see its sites, then give each site its own method; what the allocations have to say goes to the notes."""
    for stage in stages:
        for slot in stage.slots:
            if stage.statistics is None:
                continue
            method = plan.methods[slot]
            site = stage.statistics.describe(slot, matrix_of(model, slot), seed)
            with torch.no_grad():
                if method in spread:
                    spread[method].observe(site)
            extras.put(site, method.wants)
            stage.statistics.forget(slot)
            progress.advance(slot.entries, f"surveying {slot.name}")
    resolved = {method: allocation.resolve() for method, allocation in spread.items()}
    for allocation in spread.values():
        notes.extend(allocation.notes)
    return plan.having(
        {slot: resolved[method][slot.name] for slot, method in plan.methods.items() if method in resolved}
    )


def data_free_stages(residence: Residency, slots: Sequence[Slot]) -> Iterator[Stage]:
    """Every site alone in memory, without statistics: what an allocation sees that needs no data."""
    for slot in slots:
        with residence.hold(slot.users[0][0]):
            yield Stage(slot.name, [slot], Statistics(parameters_of(residence.model, [slot]), {slot: NONE}))


def survey_stages(
    blocks: BlockModel | None, residence: Residency, batches: Sequence[Batch], slots: Sequence[Slot], needs: Needs, seed: int, shelf: Shelf,
    loss: Loss = default_loss,
) -> Iterator[Stage]:  # fmt: skip
    """The stages of a survey of a chain, or of a whole model that has none."""
    if blocks is not None:
        yield from survey(blocks, batches, slots, needs, seed=seed, shelf=shelf, loss=loss)
        return
    with residence.hold(""):
        yield survey_whole(residence.model, batches, slots, needs, residence.device, seed=seed, loss=loss)


def compression_stages(
    blocks: BlockModel | None, residence: Residency, batches: Sequence[Batch], slots: Sequence[Slot], needs: Needs, true_sequential: bool,
    shelf: Shelf, done: Sequence[str],
) -> Iterator[Stage]:  # fmt: skip
    """The stages of the compression of a chain, or of a whole model that has none."""
    if blocks is not None:
        yield from walk(blocks, batches, slots, needs, true_sequential=true_sequential, shelf=shelf, done=done)
        return
    with residence.hold(""):
        yield from walk_whole(residence.model, batches, slots, needs, residence.device, done=done)


def commit_rest(run: Run, checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Write every tensor that is kept as it is: norms, biases, sites the plan keeps, and stored tensors no parameter uses. Returns their names."""
    compressed = {name for slot in plan.methods for name in slot.parameters}
    seen: set[int] = set()
    names = []
    for name, tensor in checkpoint.skeleton.state_dict(keep_vars=True).items():
        if name not in compressed and id(tensor) not in seen:
            names.append(name)
        seen.add(id(tensor))
    parts, done = run.parts(), []
    chunk: list[str] = []
    size = 0
    for name in [*names, ""]:
        if chunk and (not name or size + checkpoint.nbytes(name) > 1 << 28):
            label = f"kept from {chunk[0]}"
            if label not in parts:
                run.commit(label, checkpoint.read(chunk), {"specs": {}, "sites": []})
            chunk, size = [], 0
        if name and checkpoint.nbytes(name):
            chunk.append(name)
            done.append(name)
            size += checkpoint.nbytes(name)
    if checkpoint.unused and "unused" not in parts:
        with checkpoint.files.open() as reader:
            run.commit("unused", {name: reader.get(name) for name in checkpoint.unused}, {"specs": {}, "sites": []})
    return done


def verify(
    path: Path, checkpoint: Checkpoint, records: Sequence[SiteRecord], kept: list[str], progress: Progress
) -> None:
    """Read the finished directory back: every weight decodes to what was computed, every kept tensor is the original's, bit for bit.

    Raises: VerificationError naming the first that does not.
    """
    stored = CompressedCheckpoint(path, trust_remote_code=checkpoint.trust_remote_code)
    stored.check()
    progress.start("verifying what was written", len(records))
    for record in records:
        weight = stored.stored.weight(record.parameter)
        if checksum(weight) != record.checksum or weight.inputs != inputs_of(record.to_json()):
            raise VerificationError(f"{path}: {record.parameter} does not decode to what was computed")
        progress.advance(1, record.name)
    for name in kept:
        original = checkpoint.read([name])[name]
        step = max(1, _PART // max(1, original[:1].nbytes)) if original.dim() else 1
        for start in range(
            0, len(original) if original.dim() else 1, step
        ):  # mapped anew for every part, so that both need not stay in memory
            rows = slice(start, start + step) if original.dim() else ...
            if not same_tensor(stored.read([name])[name][rows], original[rows]):
                raise VerificationError(f"{path}: {name} differs from the original")


def compress_parts(
    stages: Iterator[Stage],
    plan: Plan,
    model: nn.Module,
    run: Run,
    extras: Extras,
    seed: int,
    running: bool,
    progress: Progress,
) -> None:
    """The compression pass of a directory: every stage's sites are solved, put back for what comes after, and written when complete."""
    weights: dict[str, Weight] = {}
    records: list[SiteRecord] = []
    for stage in stages:
        for slot, weight, record in solve_stage(stage, plan.methods, model, extras.given, seed):
            if running:
                put_back(model, slot, weight)
            weights[slot.parameter] = weight
            records.append(record)
            progress.advance(slot.entries * slot.columns, slot.name)
            progress.site(record)
            del weight  # which the dictionary drops when it is written
        if stage.complete and (weights or stage.slots):
            tensors, specs = pack_weights(weights)
            run.commit(stage.part, tensors, {"specs": specs, "sites": plain(records)})
            weights, records = {}, []
