"""`Keep`: what a scheme says of a tensor that is left as it is. It is no method: nothing is computed, and nothing
composes with it."""

from dataclasses import dataclass, field
from typing import NoReturn

from laconic.errors import SchemeError


@dataclass(frozen=True, repr=False)
class Keep:
    """Leaves a tensor as the checkpoint has it, in its own type, byte for byte; `reason` says why, for plans and
    reports.

    Raises: SchemeError where it stands in a composition, and for a reason that is no text.
    """

    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise SchemeError(f"Keep: reason should be str, got {self.reason!r}")

    def __rshift__(self, other: object) -> NoReturn:
        raise SchemeError(f"{self!r} >> {other!r}: {UNCOMPOSED}")

    def __add__(self, other: object) -> NoReturn:
        raise SchemeError(f"{self!r} + {other!r}: {UNCOMPOSED}")

    def __repr__(self) -> str:
        return f"Keep(reason={self.reason!r})" if self.reason else "Keep()"


UNCOMPOSED = "Keep stands for the tensor as it is and cannot be part of a composition"
