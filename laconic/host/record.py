"""Records: frozen dataclasses that are written as JSON, read back, and read by key as their JSON is."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from laconic.errors import CheckpointError


@dataclass(frozen=True)
class Record:
    """What was found out, as values with names. `record["name"]` reads what `record.to_json()["name"]` is, for code
    that reads JSON as well.

    `OPTIONAL` names the fields whose keys are not in the JSON where the value is None.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """The fields in their order, records within them as JSON too."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: plain(value) for name, value in told.items() if value is not None or name not in self.OPTIONAL}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote. Other keys are passed over. Raises: CheckpointError naming a field that is
        not there."""
        known = {f.name: told[f.name] for f in fields(cls) if f.name in told}
        for f in fields(cls):
            if f.name not in known and f.default is MISSING and f.default_factory is MISSING:
                raise CheckpointError(
                    f"a {cls.__name__} without {f.name!r}: the file is damaged, or of another version"
                )
        return cls(**known)

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where the JSON does not have it."""
        return self.to_json().get(key, default)


def plain(value: Any) -> Any:
    """Records, and those in lists, tuples and dictionaries, as JSON; any other value as it is."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
