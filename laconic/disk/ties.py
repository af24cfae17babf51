"""Which names of a model are one tensor: what its config says, and what the stored tensors say where they contradict
it.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from laconic.errors import CheckpointError
from laconic.model.sites import tied_names

Same = Callable[[str, str], bool]
"""Whether two stored names have the same values."""


def apart(model: nn.Module, stored: Collection[str], same: Same) -> list[str]:
    """The names that the model ties to another, but that are stored beside it with other values: each has to be a
    tensor of its own.

    Raises: CheckpointError for names that cannot differ, since they belong to one module. Cost: one read of ties that
    are stored more than once.
    """
    found = differing(tied_names(model), getattr(model, "all_tied_weights_keys", None) or {}, stored, same)
    for reference, name in found:
        if _owner(model, name) is _owner(model, reference):
            raise CheckpointError(
                f"{reference} and {name} are one tensor of one module, but are stored with different values"
            )
    return [name for _, name in found]


def differing(
    groups: Iterable[list[str]], sources: Mapping[str, str], stored: Collection[str], same: Same
) -> list[tuple[str, str]]:
    """Of every group of tied names, those that are stored with other values than the group's reference:
    (reference, name).

    `sources`: target -> source. As transformers does while it loads (`tie_weights`): the source is compared with every
    target that is stored too; where the source is not stored, the first target is in its place.
    """
    found = []
    for names in groups:
        present = [name for name in names if name in stored]
        if len(present) < 2:
            continue
        source = next((sources[name] for name in names if name in sources), names[0])
        targets = [name for name in sources if name in present] + present
        reference = source if source in present else targets[0]
        found += [(reference, name) for name in present if name != reference and not same(reference, name)]
    return found


def separate(model: nn.Module, names: Collection[str]) -> None:
    """Give each of these parameters, which the model ties to others, a tensor of its own on the meta device."""
    for name in names:
        owner, parameter = _owner(model, name), name.rpartition(".")[2]
        like = owner._parameters[parameter]
        assert like is not None
        owner._parameters[parameter] = nn.Parameter(
            torch.empty_like(like, device="meta"), requires_grad=like.requires_grad
        )
        keys = getattr(model, "all_tied_weights_keys", None)
        if keys:
            keys.pop(name, None)


def untie_config(config: Any, wanted: list[list[str]], build: Callable[[Any], nn.Module]) -> bool:
    """Let a config say what the model is, so that every reader agrees: `tie_word_embeddings` is switched off where it
    was on.

    It is left as it is, and False returned, where a model built from the changed config has other ties than `wanted`
    (an encoder and a decoder that share their embedding but not the head, say): a reader then has to go by what is
    stored.
    """
    changed = copy.deepcopy(config)
    _switch_off(changed)
    if sorted(tied_names(build(changed))) != sorted(wanted):
        return False
    _switch_off(config)
    return True


def _switch_off(config: Any) -> None:
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
