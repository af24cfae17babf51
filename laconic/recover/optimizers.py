"""Optimizers as values: any class of `torch.optim` by its name, with its arguments."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from laconic.errors import SchemeError
from laconic.host.ambient import undisturbed
from laconic.scheme.expressions import nearest

_GROWING = ("SGD", "ASGD")  # whose steps are as long as the gradient; all others divide by what its size has been
_REFUSED = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, AssertionError)
"""What torch raises for arguments."""


Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""What an optimizer moves: tensors, or groups of them with what is said of each group."""


class Optimizer:
    """`Optimizer("AdamW", lr=3e-4, betas=(0.9, 0.95))`: a class of `torch.optim` and its arguments but for the
    parameters.

    Raises: SchemeError for a class that torch does not have, arguments it does not take, and optimizers that need more
    than a gradient per step (LBFGS calls the model itself) or gradients of another kind (SparseAdam).
    """

    def __init__(self, name: str, **arguments: Any) -> None:
        self.name, self.arguments = name, arguments
        self._check()

    @property
    def kind(self) -> type[torch.optim.Optimizer]:
        """The class."""
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.name)
        return found

    @property
    def lr(self) -> float | None:
        """The learning rate it was given, if it was."""
        return self.arguments.get("lr")

    @property
    def momentum(self) -> float:
        """How much of a step is carried over to the next one."""
        momentum: float = self.arguments.get("momentum", 0.0)
        return momentum

    @property
    def grows(self) -> bool:
        """Whether its steps grow with the gradient."""
        return self.name in _GROWING

    def build(self, parameters: Parameters, lr: float | None = None) -> torch.optim.Optimizer:
        """The optimizer of parameters, at another learning rate if one is given. Raises: SchemeError for parameters it
        cannot move.
        """
        arguments = self.arguments if lr is None else self.arguments | {"lr": lr}
        try:
            return self.kind(parameters, **arguments)
        except _REFUSED as error:
            raise SchemeError(f"{self!r}: {error}") from error

    def state_bytes(self, parameters: Sequence[nn.Parameter]) -> int:
        """The bytes of what it keeps of these parameters between steps.

        A step is taken on shapes alone; an optimizer that looks at values takes it on zeros, one shape at a time.
        Raises: SchemeError for parameters it cannot move.
        """
        known: dict[Any, int] = {}
        total = 0
        for parameter in parameters:
            key = (tuple(parameter.shape), parameter.dtype)
            if key not in known:
                known[key] = self._state_of(*key)
            total += known[key]
        return total

    @undisturbed()
    def _state_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        for device in ("meta", "cpu"):
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            optimizer = self.build([parameter])
            parameter.grad = torch.zeros_like(parameter)
            try:
                optimizer.step()
            except _REFUSED as error:
                if device == "cpu":
                    raise SchemeError(f"{self!r}: {error}") from error
                continue
            kept = optimizer.state_dict()["state"].values()
            return sum(t.nbytes for state in kept for t in state.values() if isinstance(t, torch.Tensor))
        raise AssertionError("unreachable")

    def _check(self) -> None:
        known = sorted(
            name
            for name, cls in vars(torch.optim).items()
            if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
        )
        if self.name not in known:
            raise SchemeError(f"Optimizer: torch.optim has no {self.name!r}{nearest(str(self.name), known)}")
        taken = [name for name in inspect.signature(self.kind).parameters if name != "params"]
        for name in self.arguments:
            if name not in taken:
                raise SchemeError(f"Optimizer: {self.name} has no argument {name!r}; it takes {', '.join(taken)}")
        self._state_of((2, 2), torch.float32)

    def __repr__(self) -> str:
        return f"Optimizer({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.arguments.items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Optimizer) and (self.name, self.arguments) == (other.name, other.arguments)

    def __hash__(self) -> int:
        return hash(repr(self))
