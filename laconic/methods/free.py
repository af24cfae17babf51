"""A hyper-parameter left open: a scheme with `Free` values is a family of schemes, of which a search names the best."""

import math
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

from laconic.errors import SchemeError


@dataclass(frozen=True, repr=False)
class Free:
    """A hyper-parameter that a search chooses: a number of the open interval (low, high), an integer of low ... high,
    or one of `choices`.

    Stands in any hyper-parameter's place, as in `FilterPrune(sparsity=Free(0, 1)) >> Cast("float16")`. `log` asks for a
    search on the logarithm. The variable is called `name`, or as the hyper-parameter. Equal Frees of one
    hyper-parameter are one variable.
    Raises: SchemeError for bounds that are reversed, equal or not finite, and for choices that are none or repeat.
    Source: Condensa sections 3.1 and 6 (sparsity, and other hyper-parameters as future work).
    """

    low: float | None = None
    high: float | None = None
    integer: bool = False
    log: bool = False
    choices: tuple[Any, ...] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if (
                not isinstance(self.choices, tuple)
                or not self.choices
                or any(c in self.choices[:i] for i, c in enumerate(self.choices))
            ):
                raise SchemeError(
                    f"Free: choices should be a tuple of one or more different values, got {self.choices!r}"
                )
            if self.low is not None or self.high is not None or self.integer or self.log:
                raise SchemeError(f"Free: give choices or bounds, not both, got {self!r}")
            return
        low, high = self.low, self.high
        if not (_is_finite(low) and _is_finite(high)) or low is None or high is None or low >= high:
            raise SchemeError(
                f"Free: the bounds should be two finite numbers, the lower one first, got {low!r} and {high!r}"
            )
        if self.log and low <= 0:
            raise SchemeError(f"Free: a logarithm needs bounds above 0, got {low!r}")
        if self.integer and not (isinstance(low, int) and isinstance(high, int)):
            raise SchemeError(f"Free: integers need integers as bounds, got {low!r} and {high!r}")

    def __repr__(self) -> str:
        if self.choices is not None:
            parts = [f"choices={self.choices!r}"]
        else:
            parts = [repr(self.low), repr(self.high)] + [
                f"{flag}=True" for flag in ("integer", "log") if getattr(self, flag)
            ]
        return f"Free({', '.join(parts + ([f'name={self.name!r}'] if self.name is not None else []))})"

    def accept(self, value: Any) -> Any:
        """The value as a plain int, float or choice; the bounds themselves are accepted. Raises: SchemeError for one
        outside.
        """
        if self.choices is not None:
            if value not in self.choices:
                raise SchemeError(f"{self!r}: {value!r} is none of the choices")
            return self.choices[self.choices.index(value)]
        assert self.low is not None
        assert self.high is not None
        number = float(value) if isinstance(value, Real) else math.nan
        if not self.low <= number <= self.high or (self.integer and number != int(number)):
            raise SchemeError(
                f"{self!r}: expected {'an integer' if self.integer else 'a number'} between the bounds, got {value!r}"
            )
        return int(number) if self.integer else number


def _is_finite(bound: Any) -> bool:
    return isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)


def free_within(value: Any) -> list[tuple[str, Free]]:
    """Every (hyper-parameter, Free) of a method and of the methods within it, in the order of the arguments."""
    if not is_dataclass(value) or isinstance(value, Free | type):
        return []
    found: list[tuple[str, Free]] = []
    for f in fields(value):
        inner = getattr(value, f.name)
        found += [(f.name, inner)] if isinstance(inner, Free) else free_within(inner)
    return found
