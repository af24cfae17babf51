"""Where in a model stored weights belong: one rule for every reader, whatever it then makes of them."""

from collections.abc import Mapping

from torch import nn

from laconic.disk.store import Compressed
from laconic.errors import CheckpointError
from laconic.model.sites import Slot, find_slots, stored_uses
from laconic.weights import install


def slots_of(model: nn.Module, stored: Compressed, places: Mapping[str, str] | None = None) -> dict[str, Slot]:
    """The slot of `model` that each stored weight belongs to, by stored name.

    `places`: the parameter that each stored name is in a model that has other names (the base model, another head);
    what is not in it has no place. Without it every stored weight must have one, under its own name. Parameters that
    only use could tell are seen as what was stored.
    Raises: CheckpointError naming the first weight that has no place, another shape than its place, or asks for what
    its layers cannot do.
    """
    named = {name: name for name in stored.weights} if places is None else dict(places)
    views = stored.manifest.get("views", {})
    if isinstance(views, Mapping):
        views = {named[name]: view for name, view in views.items() if name in named}
    by_parameter = {
        parameter: slot
        for slot in find_slots(model, stored_uses(model, views, named.values()))
        for parameter in slot.parameters
    }
    found: dict[str, Slot] = {}
    for name, place in named.items():
        slot, shape = by_parameter.get(place), tuple(stored.weights[name]["shape"])
        if slot is None or slot.shape != shape:
            there = "no such weight" if slot is None else f"{place} as {slot.shape}"
            raise CheckpointError(f"{stored.path}: stores {name} as {shape}, the model has {there}")
        stored.check_layers(name, slot.layers(model))
        found[name] = slot
    return found


def install_stored(model: nn.Module, stored: Compressed, slots: Mapping[str, Slot]) -> None:
    """Put the stored weights in the places of `slots_of`. Raises: CheckpointError for one that cannot be read; nothing
    is installed then.
    """
    weights = {name: stored.weight(name) for name in slots}
    for name, slot in slots.items():
        for path, parameter in slot.users:
            install(model.get_submodule(path), parameter, weights[name], slot.view)
