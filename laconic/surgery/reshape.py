"""A thinned network as plain values: what differs from the original architecture, and the original brought to those
sizes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laconic.errors import CheckpointError
from laconic.surgery.ports import Conv, Norm

Shapes = dict[str, dict[str, dict[str, Any]]]
"""Module path -> {"counts": {attribute: integer}, "tensors": {name: shape}}, of what differs only; JSON."""


def shapes(thinned: nn.Module, original: nn.Module) -> Shapes:
    """What distinguishes a thinned module from the module it was made of: sizes of tensors and integer attributes, by
    module path.

    Both may hold installed Weights. Raises: CheckpointError when the two are not of one architecture.
    """
    found: Shapes = {}
    modules = dict(thinned.named_modules())
    for path, old in original.named_modules():
        if ".parametrizations" in f".{path}":
            continue
        if path not in modules or not _alike(modules[path], old):
            raise CheckpointError(
                f"{path or 'the module'}: expected {type(old).__name__}, as in the original, got "
                f"{_kind(modules.get(path))}"
            )
        new = modules[path]
        counts = {name: value for name, value in _counts(new).items() if _counts(old).get(name, value) != value}
        sizes = {
            name: list(getattr(new, name).shape)
            for name in _tensors(old)
            if getattr(new, name).shape != getattr(old, name).shape
        }
        if counts or sizes:
            found[path] = {"counts": counts, "tensors": sizes}
    return found


def rebuild(module: nn.Module, shapes: Any) -> nn.Module:
    """Bring a freshly built module of the original architecture to thinned sizes, in place; the values of changed
    tensors are empty.

    Ties stay ties. Raises: CheckpointError for paths, attributes or tensors that the module does not have, for sizes
    that are not between 1 and the original, and for counts that disagree with the tensors; the module is then as it
    was.
    """
    if not isinstance(shapes, dict):
        raise CheckpointError(f"shapes: expected a dictionary by module path, got {type(shapes).__name__}")
    modules = dict(module.named_modules())
    plan: list[tuple[nn.Module, dict[str, int], dict[str, list[int]]]] = []
    for path, entry in shapes.items():
        if path not in modules:
            raise CheckpointError(f"shapes: the module has no part {path!r}")
        if (
            not isinstance(entry, dict)
            or set(entry) != {"counts", "tensors"}
            or not all(isinstance(part, dict) for part in entry.values())
        ):
            raise CheckpointError(f"shapes: {path}: expected counts and tensors, got {entry!r}")
        _check(path, modules[path], entry["counts"], entry["tensors"])
        plan.append((modules[path], entry["counts"], entry["tensors"]))
    _check_ties(module, modules, shapes)
    made: dict[int, Tensor] = {}
    for part, counts, sizes in plan:
        for name, size in sizes.items():
            old = getattr(part, name)
            if id(old) not in made:
                empty = torch.empty(size, dtype=old.dtype, device=old.device)
                made[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        for name, value in counts.items():
            setattr(part, name, value)
    for part, _, sizes in plan:
        for name in sizes:
            setattr(part, name, made[id(getattr(part, name))])
    return module


def _check(path: str, module: nn.Module, counts: dict[str, Any], sizes: dict[str, Any]) -> None:
    old_counts, old_tensors = _counts(module), _tensors(module)
    for name, value in counts.items():
        if name not in old_counts:
            raise CheckpointError(f"shapes: {path}: {type(module).__name__} has no integer {name!r}")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= old_counts[name]:
            raise CheckpointError(
                f"shapes: {path}.{name}: expected an integer from 1 to {old_counts[name]}, got {value!r}"
            )
    for name, size in sizes.items():
        if name not in old_tensors:
            raise CheckpointError(f"shapes: {path}: {type(module).__name__} has no tensor {name!r}")
        old = tuple(getattr(module, name).shape)
        sound = isinstance(size, list) and len(size) == len(old)
        if not sound or any(
            isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= o for n, o in zip(size, old, strict=True)
        ):
            raise CheckpointError(f"shapes: {path}.{name}: expected a shape within {list(old)}, got {size!r}")
    expected = _implied(
        module,
        {name: tuple(sizes.get(name, getattr(module, name).shape)) for name in old_tensors},
        {**old_counts, **counts},
    )
    for name, value in expected.items():
        if counts.get(name, old_counts[name]) != value:
            raise CheckpointError(
                f"shapes: {path}.{name}: its tensors say {value}, the counts {counts.get(name, old_counts[name])}"
            )


def _implied(module: nn.Module, sizes: dict[str, tuple[int, ...]], counts: dict[str, int]) -> dict[str, int]:
    """The counts that follow from the tensors of a layer; none for modules that are not known."""
    weight = sizes.get("weight")
    if weight is None:
        return {}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, Conv):
        wide, narrow = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        return {wide: weight[0], narrow: weight[1] * counts["groups"]}
    if isinstance(module, Conv1D):
        return {"nx": weight[0], "nf": weight[1]}
    return {"num_features": weight[0]} if isinstance(module, Norm) else {}


def _check_ties(module: nn.Module, modules: dict[str, nn.Module], shapes: Any) -> None:
    """Whoever shares a changed tensor must change it in the same way."""
    sizes = {
        id(getattr(modules[p], name)): (f"{p}.{name}", size)
        for p, entry in shapes.items()
        for name, size in entry["tensors"].items()
    }
    for path, part in module.named_modules():
        for name in _tensors(part):
            found = sizes.get(id(getattr(part, name)))
            if found is not None and shapes.get(path, {"tensors": {}})["tensors"].get(name) != found[1]:
                raise CheckpointError(f"shapes: {found[0]} and {path}.{name} are one tensor, but not of one shape")


def _counts(module: nn.Module) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and name[:1] != "_"
    }


def _tensors(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and buffers, those with an installed Weight included."""
    names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    chains = getattr(module, "parametrizations", None)
    return names + (list(chains) if isinstance(chains, nn.ModuleDict) else [])


def _alike(new: nn.Module, old: nn.Module) -> bool:
    """Of one class; a parametrized module has a class of its own, made from its layer's."""
    return type(old) in type(new).__mro__ or type(new) in type(old).__mro__ or _plain(new) is _plain(old)


def _plain(module: nn.Module) -> type:
    return (
        type(module).__mro__[1]
        if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict)
        else type(module)
    )


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__
