"""What no method is offered: parameters that are no matrix of any product, with the reason."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.model.sites import Slot


class Uncompressed(NamedTuple):
    """A parameter of two dimensions or more that is no site, with the reason in words."""

    name: str
    shape: tuple[int, ...]
    entries: int
    reason: str


def uncompressed(
    model: nn.Module, slots: Sequence[Slot], reasons: Mapping[str, str] | None = None
) -> list[Uncompressed]:
    """What no method is offered: every parameter of two dimensions or more that is no site.

    Ties appear once. `reasons`: what `Uses.why_not` says of some. Cost: a walk over the modules.
    """
    sites = {user for slot in slots for user in slot.users}
    taken = {id(getattr(model.get_submodule(path), name)) for path, name in sites}
    found: list[Uncompressed] = []
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.dim() < 2 or id(tensor) in taken:
                continue
            taken.add(id(tensor))
            full = f"{path}.{name}".lstrip(".")
            found.append(
                Uncompressed(
                    full, tuple(tensor.shape), tensor.numel(), (reasons or {}).get(full) or _why_not(module, tensor)
                )
            )
    return found


def _why_not(module: nn.Module, tensor: Tensor) -> str:
    """Why a parameter is no site, in words."""
    if isinstance(module, parametrize.ParametrizationList):
        return "a parametrization's own tensor"
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')} values"
    if type(module).__module__.startswith("torch."):
        return f"of a layer that is not supported, {type(module).__name__}"
    return f"a parameter of {type(module).__name__} that no product was seen with"
