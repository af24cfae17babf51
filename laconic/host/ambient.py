"""What a caller has set for all of torch: set aside while laconic works, so that it gives the same bytes anywhere, and put back."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from laconic.errors import CheckpointError
from laconic.model.blocks import mapped

_AUTOCAST = ("cpu", "cuda", "xpu", "hpu", "mps")


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Inside: float32 by default, on the CPU where no device is named, no autocast, gradients where they are asked for, no inference mode.

    Afterwards all of it is as it was, and so are the random generators of torch, Python and NumPy. `seed` sets them inside, for models that
    draw numbers when they run. As a decorator it holds for every call. Cost: a copy of the generators' states.
    """
    with ExitStack() as stack:
        for restore in _generators():
            stack.callback(restore)
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
        if seed is not None:
            _seed(seed)
        yield


def _generators() -> list[Callable[[], Any]]:
    """What puts the random generators back to their present states; those of GPUs only where there are any in use."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restore: list[Callable[[], Any]] = [
        lambda: random.setstate(python), lambda: np.random.set_state(numpy), lambda: torch.set_rng_state(cpu),
    ]  # fmt: skip
    if torch.cuda.is_initialized():
        gpus = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(gpus))
    return restore


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed would move every GPU's generator too, asked for or not
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def refuse_inference(model: nn.Module) -> None:
    """Raises CheckpointError for a module made under `torch.inference_mode`: torch lets nobody change or differentiate its tensors."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise CheckpointError(
                f"{name}: was made under torch.inference_mode, so it cannot be changed; build or load the model outside of it"
            )


def usable(value: Any) -> Any:
    """A batch in which tensors made under `torch.inference_mode` are copies that gradients can pass through."""
    return mapped(value, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
