"""Any module with its compressed weights, in a directory: saved, and loaded into a module of the same architecture."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.disk.files import atomically, disk_errors
from laconic.disk.lock import locked
from laconic.disk.ours import TENSORS, remove_shards
from laconic.disk.places import install_stored, slots_of
from laconic.disk.state import check_storable, check_values, guard, not_stored, plain_value, state_of, tensors_of
from laconic.disk.store import (
    MANIFEST,
    Compressed,
    manifest_of,
    pack_weights,
    same_tensor,
    stored_bytes,
    write_manifest,
)
from laconic.disk.tensors import Reader
from laconic.disk.verify import Computed
from laconic.disk.verify import verify as read_back
from laconic.errors import CheckpointError, SchemeError
from laconic.host.ambient import refuse_inference, undisturbed
from laconic.model.sites import views_in
from laconic.surgery.reshape import Shapes, rebuild
from laconic.weights import unpack
from laconic.weights.demands import Demands, demands_of
from laconic.weights.spec import nested

_log = logging.getLogger("laconic")


@undisturbed()
def save(
    model: nn.Module,
    path: str | Path,
    *,
    shapes: Shapes | None = None,
    types: Mapping[str, torch.dtype] | None = None,
    **fields: Any,
) -> int:
    """Write a module with installed Weights to a directory (safetensors and one JSON); returns the bytes of its files.

    Every entry of the state dict that is not an installed Weight's is stored as it is, parametrizations of other makes
    among them, or in the type that `types` names, which has to hold its values exactly; every tie is stored once.
    Buffers that are not persistent are the constructor's and are not stored: the manifest says what they were.
    `shapes`: for a thinned module, how it differs from the original architecture (`surgery.shapes(thinned, original)`).
    `fields` go into the manifest. A model saved here before is replaced.
    Raises: SchemeError, before anything is written, for a layer that rounds its inputs or adds a bias but has no
    installed Weight any more (a plain tensor cannot say so), for a tensor that is not exact in its type, and for state
    that a safetensors file cannot hold, by name; VerificationError if what was written, read back, is not what the
    module holds, each weight in the types that its kind is stored in.
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
        atomically(folder / TENSORS, tensors)
        write_manifest(folder, manifest_of([{"specs": specs}], **fields, **views_in(model)))
        if again:
            remove_shards(folder)
    computed = {name: Computed.of(unpack(spec, nested(tensors, name))) for name, spec in specs.items()}
    kept = {
        name: partial(tensors.__getitem__, name) for name, tensor in state.plain.items() if under[id(tensor)] == name
    }
    read_back(Compressed(folder), computed, kept)
    return stored_bytes(folder)


def _in_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.to(dtype)
    if not same_tensor(found.to(tensor.dtype), tensor):
        raise SchemeError(f"{name}: has {tensor.dtype} values that {dtype} does not hold exactly")
    return found


@undisturbed()
def load_into(model: nn.Module, path: str | Path, *, verify: bool = True) -> nn.Module:
    """Install a saved directory's Weights and tensors into a freshly built module of the same architecture.

    A thinned module's directory says its shapes: the module, built as the original was, is brought to them first. What
    is stored is compared with its checksums first, about a second per GB, unless `verify` is False.
    Raises: CheckpointError when the directory is damaged, a stored tensor has no place in the module, a place in the
    module has no tensor, two stored tensors differ where the module has one, or the module has no values of its own to
    set (meta device, lazy layers); no weight is changed then.
    """
    stored = Compressed(Path(path), verify=verify)
    if verify:
        stored.verify()
    check_values(model)
    refuse_inference(model)
    rebuild(model, stored.manifest.get("shapes", {}))
    plain = stored.names - set(stored.weights)
    slots = slots_of(model, stored)
    with stored.files.open() as reader:
        places = _places(model, stored, plain, reader)
        install_stored(model, stored, slots)
        _set_plain(model, places, plain, reader, stored.path)
    told, here = stored.manifest.get("not_stored", {}), not_stored(model)
    for name in sorted(here.keys() & told.keys()) if isinstance(told, dict) else ():
        if told[name] != here[name] and str(told[name]).split(":")[0] == here[name].split(":")[0]:
            _log.warning(
                "%s: the buffer %s is not persistent, so it was not stored, and here it is another one than in the "
                "saved module",
                path,
                name,
            )
    guard(model)
    return model


def _places(model: nn.Module, stored: Compressed, plain: set[str], reader: Reader) -> dict[str, Any]:
    """Every entry of the module's state dict, once it is certain that each has exactly one stored value. Raises:
    CheckpointError.
    """
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
    """Give every plain entry of the state its stored value; entries that the module makes when asked
    (hooks, extra state) go its own way.
    """
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
