"""Checks of hyper-parameters that more than one recovery has."""

from laconic.errors import SchemeError
from laconic.recover.steps import Steps


def check_counts(how: object, least: int, **numbers: object) -> None:
    """Raises SchemeError unless all are whole numbers from `least` on."""
    for name, number in numbers.items():
        if type(number) is not int or number < least:
            raise SchemeError(f"{type(how).__name__}: {name} is a whole number, at least {least}, got {number!r}")


def check_steps(how: object, learn: object) -> None:
    """Raises SchemeError unless this is `Steps(...)`."""
    if not isinstance(learn, Steps):
        raise SchemeError(f"{type(how).__name__}: learn should be Steps(...), got {learn!r}")


def check_choice(how: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises SchemeError unless a value is one of some words."""
    if not (isinstance(value, str) and value in choices):
        said = getattr(how, "__name__", type(how).__name__)  # a function's own, or the class's
        raise SchemeError(f"{said}: {name} should be {' or '.join(map(repr, choices))}, got {value!r}")
