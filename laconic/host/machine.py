"""What a run is made on and with: devices and precisions by name, versions, the machine."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from laconic.errors import SchemeError


def pick_dtype(name: str) -> torch.dtype:
    """The computing precision a name stands for. Raises: SchemeError for an unknown one."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise SchemeError(f"dtype {name!r}: expected {', '.join(known)}")
    return known[name]


def pick_device(name: str) -> torch.device:
    """The device a name stands for; "auto" is a CUDA device if there is one. Raises: SchemeError for one that is not
    there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # what has no values, as "meta", is no device to compute on
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0].split(". ")[0]
        raise SchemeError(f"device {name!r}: {reason}") from error
    return device


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("laconic", "torch", "transformers", "safetensors", "constriction", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree"
    return found


def machine() -> dict[str, Any]:
    """What the run was made on."""
    return {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()}
