"""transformers learns to read compressed directories when both packages are imported, whichever comes first, and
neither loads the other.
"""

import sys
from importlib import import_module

TYPE_CHECKING = False  # as typing has it, without its import: a command begins here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"
"""The module that holds transformers' table of quantizers; no model is loaded without it."""


def register() -> None:
    """Register `laconic.disk.hf` now if transformers' quantizers are loaded, otherwise as soon as they are."""
    if _QUANTIZERS in sys.modules:
        import_module("laconic.disk.hf")
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """Sees one import: that of transformers' quantizers. It is found and loaded as always; then `laconic.disk.hf` is
    imported.
    """

    def find_spec(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _QUANTIZERS:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[assignment,method-assign]
        return spec


def _then_register(execute: "Callable[[ModuleType], Any]") -> "Callable[[ModuleType], None]":
    def executed(module: "ModuleType") -> None:
        execute(module)
        import_module("laconic.disk.hf")

    return executed
