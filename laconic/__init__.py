"""laconic compresses trained neural networks: schemes in, smaller verified models out, with numbers that can be
believed.

Its names are loaded when the first of them is used (they are listed in `laconic.api`), so that `import laconic` costs
nothing. Besides them, every method of `laconic.methods` is an attribute of the package (`laconic.GPTQ`,
`laconic.KMeans`, ...), and so is every module.
"""

import sys
from importlib import import_module

from laconic.disk import registration as _registration
from laconic.version import __version__ as __version__

TYPE_CHECKING = False  # as typing has it, without its import: a command begins here
if TYPE_CHECKING:
    from typing import Any

    from laconic.api import *  # noqa: F403

_FUNCTIONS = frozenset({"recover", "search"})
"""Public functions that live in a module of the same name."""


class _Package(type(sys)):  # type: ignore[misc]  # types.ModuleType, likewise
    """Python makes an imported module an attribute of its package; a function of that name is not to be replaced by
    it."""

    def __setattr__(self, name: str, value: "Any") -> None:
        if not (name in _FUNCTIONS and isinstance(value, type(sys))):
            super().__setattr__(name, value)


def __getattr__(name: str) -> "Any":
    """A public name, a method or a module. Methods are found where they are: adding one edits no list."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    from importlib.util import find_spec

    if name not in _FUNCTIONS and find_spec(f"laconic.{name}") is not None:
        return import_module(f"laconic.{name}")
    from laconic import api
    from laconic.scheme.text import known_methods

    found = vars(api).get(name) if name in (*api.__all__, "__all__") else known_methods().get(name)
    if found is None:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from laconic import api
    from laconic.scheme.text import known_methods

    return sorted({*globals(), *api.__all__, *known_methods()})


sys.modules[__name__].__class__ = _Package
_registration.register()
