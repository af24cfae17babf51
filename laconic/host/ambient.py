"""What a caller has set for all of torch: set aside while laconic works, so that it gives the same bytes anywhere, and
put back.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from laconic.errors import CheckpointError
from laconic.host.randomness import gpus_in_use, lent_generators

_AUTOCAST = ("cpu", "cuda", "xpu", "hpu", "mps")


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Inside: float32 by default, on the CPU where no device is named, no autocast, gradients where they are asked for,
    no inference mode.

    Afterwards all of it is as it was, and so are the random generators of torch, Python and NumPy. `seed` sets them
    inside, for models that draw numbers when they run. As a decorator it holds for every call. Cost: a copy of the
    generators' states.
    """
    with ExitStack() as stack:
        stack.enter_context(lent_generators(seed, gpus_in_use()))
        if torch.get_default_dtype() is not torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))  # slows every call a little, so only where it is needed
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        yield


def refuse_inference(model: nn.Module) -> None:
    """Raises CheckpointError for a module made under `torch.inference_mode`: torch lets nobody change or differentiate
    its tensors.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise CheckpointError(
                f"{name}: was made under torch.inference_mode, so it cannot be changed; build or load the model "
                "outside of it"
            )
