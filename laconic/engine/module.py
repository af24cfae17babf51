"""Any nn.Module in memory: compress it in place, save it, load it into a module of the same architecture."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.data.loaders import taken, uncached, without_padding
from laconic.disk.files import atomically, disk_errors
from laconic.disk.lock import locked
from laconic.disk.state import check_storable, check_values, guard, not_stored, plain_value, state_of, tensors_of
from laconic.disk.store import (
    MANIFEST,
    Compressed,
    manifest_of,
    pack_weights,
    remove_shards,
    same_tensor,
    stored_bytes,
    write_manifest,
)
from laconic.disk.tensors import Reader, is_finite
from laconic.engine.coverage import coverage
from laconic.engine.passes import (
    Extras,
    allocate,
    compression_stages,
    data_free_stages,
    refuse_rounding,
    refuse_structures,
    survey_stages,
)
from laconic.engine.plan import Plan
from laconic.engine.report import Report
from laconic.engine.resolve import Fit, patterns, resolve
from laconic.engine.solve import put_back, solve_stage
from laconic.engine.unmeasured import naming_batches, unmeasured_notes
from laconic.engine.walk import Loss, Shelf, default_loss, parameters_of
from laconic.errors import CheckpointError, DataError, SchemeError, VerificationError
from laconic.host.ambient import refuse_inference, undisturbed
from laconic.host.progress import Log, Progress, peak_memory
from laconic.host.record import plain
from laconic.host.told import SiteRecord
from laconic.model.batches import Batch, to_device, usable
from laconic.model.blocks import InMemory, find_chain, open_chain
from laconic.model.calling import call, called_with, in_evaluation
from laconic.model.sites import INPUTS, Slot, find_slots, stored_uses, uses_of, views_in
from laconic.model.usage import Use, in_sight
from laconic.scheme.text import Scheme, describe
from laconic.surgery.reshape import Shapes, rebuild
from laconic.weights import Weight, install
from laconic.weights.demands import Demands, demands_of, set_demands

Score = Callable[[nn.Module], float]
_log = logging.getLogger("laconic")


@undisturbed()
def compress_module(
    model: nn.Module,
    scheme: Scheme,
    data: Iterable[Batch] | None = None,
    *,
    score: Score | None = None,
    loss: Loss | None = None,
    samples: int = 1024,
    true_sequential: bool = False,
    keep: str | Sequence[str] = (),
    group: Fit = "fit",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Report]:
    """Compress a module in place: its matrices are replaced by installed Weights that decode on every read.

    `data`: batches the model can be called with (a tensor, a dict, or a tuple whose first entry is the input), as many as hold `samples`
    examples; what an `attention_mask` leaves out is cut off. `keep`: patterns of sites that stay as they are; `group`: "fit" or "strict", where
    a group does not divide a matrix (`engine.resolve`). `score(model)` is measured before and after. `loss(output, generator)` is the
    scalar whose gradients methods see that need them: by default cross-entropy against sampled labels for outputs [batch, classes] or
    `.logits`, else a random projection.
    Returns the module and a report. Raises: SchemeError, DataError, CheckpointError (a weight that is not finite); the module is then as
    it was, for which calibrated methods keep a copy of its matrices until the end. A `score` that raises leaves the module as it measured it.
    """
    progress, started = progress or Log(), time.time()
    check_values(model)
    refuse_inference(model)
    batches = (
        [usable(part) for batch in taken(data, samples, seed) for part in without_padding(uncached(batch, model))]
        if data is not None
        else []
    )
    uses, reasons = _uses(model, batches)
    slots = find_slots(model, uses)
    notes: list[str] = []
    plan = resolve(scheme, slots, whole_file=True, keep=keep, group=group, notes=notes)
    refuse_structures(plan)
    refuse_rounding(model, plan)
    for note in notes:
        progress.say(note)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise CheckpointError(f"{name}: holds NaN or infinity")
    original, covered = plain_bytes(model), coverage(model, plan, reasons)
    count = sum(p.numel() for p in model.parameters())
    if not batches and plan.reads_data:
        raise DataError(f"{describe(scheme)}: needs calibration data; pass data=, an iterable of batches")
    with _at_rest(model):
        before = score(model) if score is not None else None
        with naming_batches(batches), in_sight(model), undisturbed(seed):
            weights, records = _run(model, plan, batches, loss, true_sequential, seed, progress, notes)
        for slot, weight in weights.items():
            for path, name in slot.users:
                install(model.get_submodule(path), name, weight, slot.view)
        guard(model)
        after = score(model) if score is not None else None
    notes += unmeasured_notes(records, count, progress)
    notes += [
        f"the score {when} compression is {value}"
        for when, value in (("before", before), ("after", after))
        if not _is_number(value)
    ]
    stored = sum(record.bits for record in records) // 8
    kept = original - sum(record.original_bytes or 0 for record in records)
    report = Report(
        {
            "scheme": describe(scheme), "keep": patterns(keep),
            "seed": seed, "sites": plain(records), "parameters": count, "original_bytes": original,
            "expected_bytes": kept + stored, "metrics": {"score": after, "reference_score": before} if score is not None else {},
            "seconds": time.time() - started, "peak_memory": {"actual": peak_memory()}, "notes": notes, "coverage": covered,
        }
    )  # fmt: skip
    return model, report


def _uses(model: nn.Module, batches: list[Batch]) -> tuple[dict[str, Use] | None, dict[str, str]]:
    """How the first batch shows the parameters to be used whose modules do not say it, and why some are no sites; None without data.

    Raises: DataError when the model cannot be called with it.
    """
    if not batches:
        return None, {}
    first = to_device(batches[0], next(model.parameters()).device)
    with _at_rest(model), in_sight(model), undisturbed(0), called_with(model, first, "batch 0 of the calibration data"):
        with torch.no_grad():
            call(model, first)
        uses = uses_of(model, lambda: call(model, first))
    return uses.found(), uses.why_not()


def _is_number(score: float | None) -> bool:
    """Whether a score, if there is one, is finite."""
    return score is None or math.isfinite(score)


def plain_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of a plain module's state, every tie once."""
    tensors = [
        value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)
    ]  # extra state can be anything
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; every module's mode and every parameter's flag are put back."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with in_evaluation(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _run(
    model: nn.Module, plan: Plan, batches: list[Batch], loss: Loss | None, true_sequential: bool, seed: int, progress: Progress,
    notes: list[str],
) -> tuple[dict[Slot, Weight], list[SiteRecord]]:  # fmt: skip
    residence = InMemory(model)
    blocks, why = open_chain(residence, find_chain(model), batches[0] if batches else None)
    if why:
        notes.append(f"{why}; the whole model is run for every unit")
        progress.say(notes[-1])
    spread, needs = plan.allocations(), plan.surveyed
    extras = Extras()
    if spread or any(needs.values()):
        stages = data_free_stages(residence, list(needs))
        if any(needs.values()):
            stages = survey_stages(blocks, residence, batches, list(needs), needs, seed, Shelf(), loss or default_loss)
        plan = allocate(stages, plan, spread, extras, model, seed, progress, notes)
    wanted = plan.needs
    running = any(w & INPUTS for w in wanted.values())
    slots = list(plan.methods)
    weights: dict[Slot, Weight] = {}
    records: list[SiteRecord] = []
    progress.start("compressing", sum(slot.entries * slot.columns for slot in slots))
    with ExitStack() as undo:
        for stage in compression_stages(blocks, residence, batches, slots, wanted, true_sequential, Shelf(), []):
            for slot, weight, found in solve_stage(stage, plan.methods, model, extras.given, seed):
                weights[slot] = weight
                parameter = parameters_of(model, [slot])[slot].detach()
                record = replace(found, original_bytes=parameter.nbytes)
                if running:
                    undo.callback(parameter.copy_, parameter.clone())
                    for layer in slot.layers(model):
                        undo.callback(set_demands, layer, demands_of(layer))
                    put_back(model, slot, weight)
                records.append(record)
                progress.advance(slot.entries * slot.columns, slot.name)
                progress.site(record)
        undo.pop_all()
    return weights, records


def half_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The types of a module's 16-bit float tensors, by name."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)}


@undisturbed()
def save(
    model: nn.Module, path: str | Path, *, shapes: Shapes | None = None, types: Mapping[str, torch.dtype] | None = None, **fields: Any
) -> int:  # fmt: skip
    """Write a module with installed Weights to a directory (safetensors and one JSON); returns the bytes of its files.

    Every entry of the state dict that is not an installed Weight's is stored as it is, parametrizations of other makes among them, or in the
    type that `types` names, which has to hold its values exactly; every tie is stored once. Buffers that are not persistent are the
    constructor's and are not stored: the manifest says what they were. `shapes`: for a thinned module, how it differs from the original
    architecture (`surgery.shapes(thinned, original)`). `fields` go into the manifest. A model saved here before is replaced.
    Raises: SchemeError, before anything is written, for a layer that rounds its inputs or adds a bias but has no installed Weight any more (a plain
    tensor cannot say so), for a tensor that is not exact in its type, and for state that a safetensors file cannot hold, by name; VerificationError
    if what was written does not hold every entry.
    """
    for name, layer in model.named_modules():
        if isinstance(demands := demands_of(layer), Demands):
            reason = "is stored as a plain tensor, which would forget it; save the module before `bake`"
            raise SchemeError(f"{name}: {demands.told()} and {reason}")
    state = state_of(model)
    check_storable(model, state)
    if shapes:
        fields["shapes"] = shapes
    if buffers := not_stored(model):
        fields["not_stored"] = buffers
    first: dict[int, str] = {}
    for name, weight in state.weights.items():
        first.setdefault(id(weight), name)
    tensors, specs = pack_weights({name: state.weights[name] for name in first.values()})
    under: dict[int, str] = {}
    for name, tensor in state.plain.items():
        if under.setdefault(id(tensor), name) == name:
            value = plain_value(tensor)
            tensors[name] = _in_type(name, value, types[name]) if types and name in types else value
    folder = Path(path)
    with locked(folder), disk_errors(folder):
        again = (folder / MANIFEST).is_file()
        atomically(folder / "model.safetensors", tensors)
        write_manifest(folder, manifest_of([{"specs": specs}], **fields, **views_in(model)))
        if again:
            remove_shards(folder)
    stored = Compressed(folder)
    missing = [name for name, tensor in state.plain.items() if under[id(tensor)] not in stored.files.tensors]
    missing += [name for name, weight in state.weights.items() if first[id(weight)] not in stored.weights]
    if missing:
        raise VerificationError(f"{folder}: {missing[0]} was not stored")
    return stored_bytes(folder)


def _in_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.to(dtype)
    if not same_tensor(found.to(tensor.dtype), tensor):
        raise SchemeError(f"{name}: has {tensor.dtype} values that {dtype} does not hold exactly")
    return found


@undisturbed()
def load_into(model: nn.Module, path: str | Path, *, verify: bool = True) -> nn.Module:
    """Install a saved directory's Weights and tensors into a freshly built module of the same architecture.

    A thinned module's directory says its shapes: the module, built as the original was, is brought to them first. What is stored is compared
    with its checksums first, about a second per GB, unless `verify` is False.
    Raises: CheckpointError when the directory is damaged, a stored tensor has no place in the module, a place in the module has no tensor,
    two stored tensors differ where the module has one, or the module has no values of its own to set (meta device, lazy layers); no weight is
    changed then.
    """
    stored = Compressed(Path(path), verify=verify)
    if verify:
        stored.verify()
    check_values(model)
    refuse_inference(model)
    rebuild(model, stored.manifest.get("shapes", {}))
    plain = stored.names - set(stored.weights)
    uses = stored_uses(model, stored.manifest.get("views", {}), stored.weights)
    slots = {name: slot for slot in find_slots(model, uses) for name in slot.parameters}
    for name, spec in stored.weights.items():
        if name not in slots or tuple(spec["shape"]) != slots[name].shape:
            raise CheckpointError(
                f"{path}: stores {name} as {spec['shape']}, the module has {slots[name].shape if name in slots else 'no such weight'}"
            )
        stored.check_layers(name, slots[name].layers(model))
    with stored.files.open() as reader:
        places = _places(model, stored, plain, reader)
        for name, weight in {name: stored.weight(name) for name in stored.weights}.items():
            for user, parameter in slots[name].users:
                install(model.get_submodule(user), parameter, weight, slots[name].view)
        _set_plain(model, places, plain, reader, stored.path)
    told, here = stored.manifest.get("not_stored", {}), not_stored(model)
    for name in sorted(here.keys() & told.keys()) if isinstance(told, dict) else ():
        if told[name] != here[name] and str(told[name]).split(":")[0] == here[name].split(":")[0]:
            _log.warning(
                "%s: the buffer %s is not persistent, so it was not stored, and here it is another one than in the saved module",
                path,
                name,
            )
    guard(model)
    return model


def _places(model: nn.Module, stored: Compressed, plain: set[str], reader: Reader) -> dict[str, Any]:
    """Every entry of the module's state dict, once it is certain that each has exactly one stored value. Raises: CheckpointError."""
    places = state_of(model).plain
    if extra := sorted(plain - set(places)):
        raise CheckpointError(f"{stored.path}: stores {extra[0]}, which the module does not have")
    by_identity: dict[int, list[str]] = {}
    for name, tensor in places.items():
        by_identity.setdefault(id(tensor), []).append(name)
    for names in by_identity.values():
        found = [name for name in names if name in plain or name in stored.weights]
        if not found:
            raise CheckpointError(f"{stored.path}: does not store {names[0]}")
        place, values = places[names[0]], [reader.get(name) for name in found if name in plain]
        if len(found) > 1 and (len(values) < len(found) or not all(same_tensor(value, values[0]) for value in values)):
            raise CheckpointError(
                f"{stored.path}: stores {found[0]} and {found[1]} as two tensors, the module has one for both"
            )
        if values and isinstance(place, Tensor):
            kinds = [
                (t.is_floating_point(), t.is_complex(), t.dtype if not t.is_floating_point() else None)
                for t in (values[0], place)
            ]
            if values[0].shape != place.shape or kinds[0] != kinds[1]:
                here, there = (f"{list(t.shape)} {t.dtype}" for t in (values[0], place))
                raise CheckpointError(f"{stored.path}: stores {found[0]} as {here}, the module has {there}")
    return places


def _set_plain(model: nn.Module, places: dict[str, Any], plain: set[str], reader: Reader, path: Path) -> None:
    """Give every plain entry of the state its stored value; entries that the module makes when asked (hooks, extra state) go its own way."""
    own = {id(tensor) for _, tensor in tensors_of(model)}
    made = [name for name in plain if id(places[name]) not in own]
    with torch.no_grad():
        for name in plain.difference(made):
            places[name].copy_(reader.get(name))
    if not made:
        return
    try:
        model.load_state_dict({name: reader.get(name).clone() for name in plain}, strict=False)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the module does not take {made[0]}: {error}") from error
    now = state_of(model).plain
    for name in made:
        if not (
            isinstance(now[name], Tensor) and same_tensor(plain_value(now[name]), reader.get(name).to(now[name].dtype))
        ):
            raise CheckpointError(
                f"{path}: the module did not take the stored {name}; its state dict gives back another value"
            )
