"""A model directory, compressed into another: where its weights live meanwhile, what is written of it, and how it is
read back.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.data.reading import Material
from laconic.disk.companions import Companions
from laconic.disk.load import CompressedCheckpoint
from laconic.disk.originals import Checkpoint, original_file_bytes
from laconic.disk.output import Run
from laconic.disk.overlay import Overlay
from laconic.disk.store import manifest_of, pack_weights
from laconic.disk.verify import Computed, verify
from laconic.engine.coverage import coverage
from laconic.engine.extras import Extras
from laconic.engine.gather import data_free_stages, survey_stages, walk_stages
from laconic.engine.loop import compress
from laconic.engine.options import Options
from laconic.engine.plan import Plan
from laconic.engine.preflight import SURVEY_SAMPLES
from laconic.engine.resolve import patterns
from laconic.engine.shelf import Shelf
from laconic.engine.solve import check_layers, matrix_of, put_back, record_of
from laconic.engine.unmeasured import unmeasured_notes
from laconic.engine.walk import Stage
from laconic.host.machine import machine, pick_device, pick_dtype, versions
from laconic.host.progress import Progress
from laconic.host.record import plain
from laconic.host.told import SiteRecord
from laconic.methods.base import Method
from laconic.model.opened import open_blocks
from laconic.model.residence import Residence
from laconic.model.sites import INPUTS, Site, Slot, Stats, views_of
from laconic.scheme.text import Scheme, describe
from laconic.weights import Weight
from laconic.weights.inputs import inputs_of

_TOKENS = 4096  # that run through a block at a time


class InDirectory:
    """The output directory of a run as the place where weights live: the original is read a part at a time, and each
    part that is finished is written, so that an interrupted run goes on with the next one.

    With `statistics="compressed"` a part that was finished stands decoded in the original's place for everything that
    is run after it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        run: Run,
        windows: Material | None,
        options: Options,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.run, self.windows, self.options = checkpoint, run, windows, options
        self.model, self.device, self.progress, self.seed = checkpoint.skeleton, device, progress, options.seed
        self.extras = Extras(run.work)
        self._seen_next = False

    def settled(self, plan: Plan, allocate: Callable[[], tuple[Plan, list[str]]]) -> Plan:
        noted = self.run.notes().get("plan")
        if noted is not None:
            return Plan.from_json(noted, plan.slots)
        found, notes = allocate()
        if found is not plan:
            kept = [file.name for file in self.extras.files()]
            self.run.note(plan=found.to_json(), allocation=notes, extras=kept)
        return found

    def surveyed(self, plan: Plan) -> Iterator[Stage]:
        self.extras.clear()
        spread, needs = plan.allocations(), plan.surveyed
        concerned = [slot for slot, method in plan.methods.items() if method in spread or needs[slot]]
        self.progress.start("surveying the original model", sum(slot.entries for slot in concerned))
        if self.windows is None or not any(needs.values()):
            residence = Residence(self.model, self.checkpoint, None, None, self.device)
            return data_free_stages(residence, concerned)
        batches = self.windows.first(SURVEY_SAMPLES).batches(1)
        dtype = pick_dtype(self.options.dtype)
        blocks, residence, why = open_blocks(self.checkpoint, dtype, self.device, batches[0])
        self._say_no_chain(why)
        return survey_stages(blocks, residence, batches, concerned, needs, self.seed, Shelf(self.run.work))

    def _say_no_chain(self, why: str) -> None:
        """Note in the run, once, that a model is run whole because its blocks form no chain."""
        if why and self.run.notes().get("chain") is None:
            self.run.note(chain=f"{why}; the whole model is run for every unit")
            self.progress.say(self.run.notes()["chain"])

    def stages(self, plan: Plan) -> Iterator[Stage]:
        needs, original = plan.needs, self.options.statistics == "original"
        slots = list(needs)
        calibrated = any(wanted & INPUTS for wanted in needs.values())
        self._seen_next = calibrated and not original
        provider = self.checkpoint if original else Overlay(self.checkpoint, self.run, slots)
        windows = self.windows if calibrated else None
        first = windows.first(1).batches(1)[0] if windows is not None else None
        dtype = pick_dtype(self.options.dtype) if calibrated else None
        blocks, residence, why = open_blocks(provider, dtype, self.device, first)
        self._say_no_chain(why)
        batches = windows.batches(max(1, _TOKENS // windows.length)) if windows is not None else []
        self._say_start(slots)
        return walk_stages(
            blocks, residence, batches, slots, needs, original=original, true_sequential=self.options.true_sequential,
            shelf=Shelf(self.run.work), done=list(self.run.parts()),
        )  # fmt: skip

    def _say_start(self, slots: list[Slot]) -> None:
        """Tell of the work that begins, and of what of it was finished before."""
        finished = {name for record in self.run.parts().values() for name in record["specs"]}
        work = {slot: slot.entries * slot.columns for slot in slots}
        self.progress.start("compressing", sum(work.values()))
        self.progress.advance(sum(work[slot] for slot in slots if slot.parameter in finished), "finished before")

    def matrix(self, slot: Slot) -> Tensor:
        return matrix_of(self.model, slot)

    def observed(self, slot: Slot, site: Site, wants: Stats) -> None:
        self.extras.put(site, wants)
        self.progress.advance(slot.entries, f"surveying {slot.name}")

    def known(self, site: Site) -> Site:
        return self.extras.given(site)

    def record(self, slot: Slot, method: Method, site: Site, weight: Weight, seconds: float) -> SiteRecord:
        check_layers(self.model, slot, weight)
        return record_of(slot, method, site, weight, seconds)

    def put(self, slot: Slot, weight: Weight, record: SiteRecord) -> None:
        if self._seen_next:
            put_back(self.model, slot, weight)
        self.progress.advance(slot.entries * slot.columns, slot.name)
        self.progress.site(record)

    def commit(self, part: str, weights: dict[Slot, Weight], records: list[SiteRecord]) -> None:
        tensors, specs = pack_weights({slot.parameter: weight for slot, weight in weights.items()})
        self.run.commit(part, tensors, {"specs": specs, "sites": plain(records)})


def stored_model(
    checkpoint: Checkpoint,
    plan: Plan,
    scheme: Scheme,
    source: str,
    windows: Material | None,
    run: Run,
    beside: Companions,
    options: Options,
    progress: Progress,
) -> dict[str, Any]:
    """Compress, store and verify; returns what the report says of the model, but for its quality."""
    device = pick_device(options.device)
    home = InDirectory(checkpoint, run, windows, options, device, progress)
    plan = compress(home, plan)
    kept = commit_rest(run, checkpoint, plan)
    records = [
        replace(SiteRecord.from_json(site), original_bytes=checkpoint.on_disk(site["parameter"]))
        for part in run.parts().values()
        for site in part["sites"]
    ]
    order = {slot.name: i for i, slot in enumerate(plan.slots)}
    records.sort(key=lambda record: order[record.name])
    parameters = sum(p.numel() for p in checkpoint.skeleton.parameters())
    manifest = manifest_of(
        list(run.parts().values()),
        scheme=describe(scheme),
        keep=patterns(options.keep),
        seed=options.seed,
        versions=versions(),
        source={"name": source, "parameters": parameters},
        data=windows.describe() if windows is not None else None,
        plan=plan.fitted().to_json(),
        **views_of(checkpoint.skeleton, list(plan.methods)),
    )
    config = checkpoint.config.to_dict() | {
        "quantization_config": {"quant_method": "laconic", "schema": manifest["schema"]}
    }
    run.finish(manifest, beside, config)
    _verify(run, checkpoint, records, kept, progress)
    told = [*filter(None, [run.notes().get("chain")]), *run.notes().get("allocation", [])]
    return {
        "scheme": describe(scheme),
        "keep": patterns(options.keep),
        "seed": options.seed,
        "statistics": options.statistics,
        "data": manifest["data"],
        "sites": plain(records),
        "metrics": {},
        "notes": told + unmeasured_notes(records, parameters, progress),
        "unused": checkpoint.unused,
        "original_bytes": original_file_bytes(checkpoint),
        "parameters": parameters,
        "kept": _kept(checkpoint, kept),
        "coverage": coverage(checkpoint.skeleton, plan),
        "versions": versions(),
        "machine": machine(),
    }


def _verify(run: Run, checkpoint: Checkpoint, records: list[SiteRecord], kept: list[str], progress: Progress) -> None:
    """Read the finished directory back. Raises: CheckpointError where it is not complete, VerificationError as
    `verify`.
    """
    stored = CompressedCheckpoint(run.out, trust_remote_code=checkpoint.trust_remote_code)
    stored.check()
    progress.start("verifying what was written", len(records))
    computed = {found.parameter: Computed(found.checksum, inputs_of(found.to_json())) for found in records}
    plain = {name: partial(_kept_tensor, checkpoint, name) for name in kept}
    verify(stored.stored, computed, plain, lambda name: progress.advance(1, name))


def _kept_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read([name])[name]


def commit_rest(run: Run, checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Write every tensor that is kept as it is: norms, biases, sites the plan keeps, and stored tensors no parameter
    uses. Returns their names.
    """
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


def _kept(checkpoint: Checkpoint, names: list[str]) -> list[dict[str, Any]]:
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.skeleton.state_dict().items()}
    return [{"name": name, "bytes": checkpoint.nbytes(name), "shape": shapes[name]} for name in names]
