"""How a learning rate goes over a run: a factor of the first rate, minibatch by minibatch, as a value."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from laconic.errors import SchemeError


@dataclass(frozen=True)
class Schedule(ABC):
    """The rate of minibatch t of T is lr f(t). `warmup` is a share of the minibatches, 0 to below 1: over those W =
    warmup T the rate rises,

        f(t) = (t + 1) / (W + 1)  for t < W,    f(t) = fall((t - W) / (T - W - 1))  after it, with fall(0) = 1.

    Raises: SchemeError for a share out of range.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.warmup, int | float) and 0 <= self.warmup < 1):
            raise SchemeError(
                f"{type(self).__name__}: warmup is a share of the minibatches, 0 to below 1, got {self.warmup!r}"
            )

    def factor(self, t: int, total: int) -> float:
        """f(t) of minibatch t of `total`."""
        rising = round(self.warmup * total)
        if t < rising:
            return (t + 1) / (rising + 1)
        return self.fall((t - rising) / max(total - rising - 1, 1))

    @abstractmethod
    def fall(self, x: float) -> float:
        """The factor behind the warm-up, where a share x of the minibatches that are left is done, 0 to 1."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The rate stays what it is."""

    def fall(self, x: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Falling(Schedule):
    """A rate that ends at `end` times the first one."""

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.end, int | float) and 0 <= self.end <= 1):
            raise SchemeError(f"{type(self).__name__}: end is a share of the first rate, 0 to 1, got {self.end!r}")


@dataclass(frozen=True)
class Linear(_Falling):
    """fall(x) = 1 - (1 - end) x."""

    def fall(self, x: float) -> float:
        return 1 - (1 - self.end) * x


@dataclass(frozen=True)
class Cosine(_Falling):
    """fall(x) = end + (1 - end) (1 + cos(pi x)) / 2. Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, without
    restarts.
    """

    def fall(self, x: float) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class Geometric(_Falling):
    """fall(x) = end^x: by equal factors. Source: Condensa section 4 (decay over each minibatch)."""

    end: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end == 0:
            raise SchemeError("Geometric: a rate that falls by equal factors never ends at 0; give an end above it")

    def fall(self, x: float) -> float:
        return self.end**x
