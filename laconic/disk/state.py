"""What a module's state is made of: the Weights that stand in it, and everything else, which is stored as it is."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from laconic.disk.files import TYPES
from laconic.disk.tensors import bytes_of
from laconic.errors import CheckpointError, SchemeError
from laconic.weights import Weight
from laconic.weights.demands import Demands, demands_of
from laconic.weights.install import Installed


@dataclass(frozen=True)
class State:
    """A module's state dict in two parts that leave nothing out. A tie appears under each of its names in both.

    `weights`: what is installed, by the name of the parameter it stands for. `plain`: every other entry,
    parametrizations of the user's (weight_norm, spectral_norm) among them.
    """

    weights: dict[str, Weight]
    plain: dict[str, Any]


def state_of(model: nn.Module) -> State:
    """The state of a module. Raises: SchemeError where a parameter has another parametrization on top of an installed
    Weight.
    """
    weights: dict[str, Weight] = {}
    ours = set()
    for path, module in model.named_modules(remove_duplicate=False):
        chains = getattr(module, "parametrizations", None)
        for name, chain in chains.items() if isinstance(chains, nn.ModuleDict) else ():
            if not isinstance(chain, ParametrizationList) or not any(isinstance(step, Installed) for step in chain):
                continue
            parameter = f"{path}.{name}" if path else name
            if len(chain) > 1:
                raise SchemeError(
                    f"{parameter}: has a parametrization beside its compressed weight; remove it before the module is "
                    "stored"
                )
            step = chain[0]
            assert isinstance(step, Installed)
            weights[parameter] = step.weight
            ours.add(f"{path}.parametrizations.{name}" if path else f"parametrizations.{name}")
    entries = model.state_dict(keep_vars=True)
    return State(weights, {name: value for name, value in entries.items() if not _below(name, ours)})


def _below(name: Any, ours: set[str]) -> bool:
    """Whether an entry of the state dict lies below one of the given modules."""
    parts = name.split(".") if isinstance(name, str) else []
    return any(part == "parametrizations" and ".".join(parts[: i + 2]) in ours for i, part in enumerate(parts))


def tensors_of(model: nn.Module, *, persistent: bool = True) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and persistent buffers by name, or its other buffers; those of installed Weights are left
    out.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        if any(isinstance(part, Installed) for part in _above(model, path)):
            continue
        if persistent:
            named = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        else:
            named = {}
        for name, buffer in module._buffers.items():
            if buffer is not None and (name not in module._non_persistent_buffers_set) == persistent:
                named[name] = buffer
        for name, tensor in named.items():
            yield (f"{path}.{name}" if path else name), tensor


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way from a module to the one at `path`."""
    module = model
    yield module
    for part in path.split(".") if path else ():
        module = module._modules[part]  # type: ignore[assignment]
        yield module


def check_values(model: nn.Module) -> None:
    """Raises CheckpointError, naming the first, where parameters or buffers have no values or shapes yet: lazy layers,
    the meta device.
    """
    for name, tensor in tensors_of(model):
        if is_lazy(tensor):
            raise CheckpointError(f"{name}: a lazy layer has no shape yet; run the module on a batch first")
        if tensor.is_meta:
            raise CheckpointError(
                f"{name}: has no values, it is on the meta device; give the module memory first: "
                "module.to_empty(device='cpu')"
            )


def check_storable(model: nn.Module, state: State) -> None:
    """Raises SchemeError, naming the entry, unless a safetensors file can hold all of a module's state and the state
    dict has all of it.
    """
    for name, value in state.plain.items():
        if (reason := _why_not(name, value)) is not None:
            raise SchemeError(f"{name}: cannot be stored: {reason}")
    for name in state.plain:
        parts = name.split(".")
        above = next((".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[:i]) in state.weights), None)
        if name in state.weights or above is not None:
            raise SchemeError(
                f"{name}: cannot be stored beside the compressed weight {above or name}, whose tensors have names like "
                "it"
            )
    present = {id(value) for value in state.plain.values()}
    for name, tensor in tensors_of(model):
        if id(tensor) not in present and name not in state.plain:
            raise SchemeError(
                f"{name}: the module's state dict leaves it out (a hook, or a method of its own), so it would not be "
                "stored"
            )


def _why_not(name: Any, value: Any) -> str | None:
    """Why a safetensors file cannot hold an entry of a state dict; None if it can."""
    if not isinstance(name, str) or name == "__metadata__":
        return f"{name!r} is no name that a safetensors file can have"
    if not isinstance(value, Tensor):
        return (
            f"it is a {type(value).__name__}, not a tensor (a module's extra state, most likely), and pickles are "
            "never written"
        )
    if is_lazy(value):
        return "a lazy layer has not got its shape yet; run the module once"
    if is_traceable_wrapper_subclass(value):
        return (
            f"it is a {type(value).__name__}; make it a plain tensor first (gather what is sharded, dequantize what is "
            "quantized)"
        )
    if value.is_meta:
        return "it is on the meta device and has no values"
    if value.layout != torch.strided or value.is_quantized:
        return (
            f"it is {'quantized' if value.is_quantized else f'of layout {value.layout}'}; only plain dense tensors are "
            "stored"
        )
    if value.dtype not in TYPES:
        return f"safetensors files have no type for {value.dtype}"
    return None


def plain_value(tensor: Tensor) -> Tensor:
    """A tensor of any shape of a state as it is stored: on the CPU, contiguous, conjugates and signs carried out."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def plain_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of a plain module's state, every tie once."""
    # extra state can be anything
    tensors = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def half_types(model: nn.Module) -> dict[str, torch.dtype]:
    """The types of a module's 16-bit float tensors, by name."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)}


def not_stored(model: nn.Module) -> dict[str, str]:
    """Type and CRC-32 of every non-persistent buffer: a module's constructor makes them, and a reader can tell whether
    it made the same.
    """
    found = {}
    for name, buffer in tensors_of(model, persistent=False):
        if _why_not(name, buffer) is None:
            value = plain_value(buffer)
            crc = zlib.crc32(bytes_of(value)) if value.numel() else 0
            found[name] = f"{str(value.dtype).removeprefix('torch.')}:{crc:08x}"
    return found


def why_no_dense_checkpoint(model: nn.Module) -> str | None:
    """Why the names and tensors of a module's state dict are not what its class reads back; None if they are."""
    for path, module in model.named_modules():
        if isinstance(module, Installed):
            name = path.replace(".parametrizations", "").removesuffix(".0")
            return (
                f"{name} is a compressed weight; `laconic.save` stores it as it is, after `laconic.bake` a dense "
                "checkpoint can be written"
            )
        if isinstance(demands := demands_of(module), Demands):
            return f"{path} {demands.told()}, which a dense checkpoint would forget; store the compressed model instead"
    return None


class Guarded:
    """Stands for a transformers model's `save_pretrained` and refuses while the model holds what a dense checkpoint
    cannot say.

    What the class itself would write is read back by transformers with every compressed matrix made up anew, under a
    warning only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the class's `save_pretrained`. Raises: SchemeError, before anything is written."""
        if (reason := why_no_dense_checkpoint(self.model)) is not None:
            raise SchemeError(f"save_pretrained: {reason}")
        del self.model.save_pretrained
        return self.model.save_pretrained(*args, **options)  # type: ignore[operator]


def guard(model: nn.Module) -> None:
    """Let every model of transformers in (or above) `model` refuse to write dense checkpoints while it holds installed
    Weights or roundings.
    """
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.save_pretrained = Guarded(module)  # type: ignore[assignment]
