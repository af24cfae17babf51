"""What happens to a model: the method of every site that is compressed, and why the others stay."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from laconic.errors import CheckpointError
from laconic.methods.allocation import Allocation, Measured
from laconic.methods.base import Method
from laconic.methods.fitting import fitted
from laconic.model.sites import GRADIENTS, MEASURED, NONE, Slot, Stats
from laconic.scheme.keep import Keep
from laconic.scheme.text import Choice, parse
from laconic.weights.inputs import Inputs


@dataclass(frozen=True)
class Plan:
    """What happens to a model: `methods` of the sites that are compressed; of the others, in `kept`, why they stay (""
    where a scheme just says so).

    `slots` are all of them in the model's order, which both dictionaries have too. What follows from a method is asked
    of it and stored nowhere else: its statistics, whether it rounds its inputs, whether it cuts channels. A tie is one
    slot with several users. Blocks that are left out, and blocks that take another's weights, get a field each beside
    `kept` once something makes such a plan and something carries it out.
    """

    slots: tuple[Slot, ...]
    methods: dict[Slot, Method]
    kept: dict[Slot, str]

    @classmethod
    def of(cls, choices: Mapping[Slot, Choice]) -> Self:
        """The plan that gives every slot what was chosen for it."""
        methods = {slot: choice for slot, choice in choices.items() if not isinstance(choice, Keep)}
        kept = {slot: choice.reason for slot, choice in choices.items() if isinstance(choice, Keep)}
        return cls(tuple(choices), methods, kept)

    def having(self, methods: Mapping[Slot, Method]) -> Self:
        """The same sites under other methods, those that `methods` names."""
        return replace(self, methods={slot: methods.get(slot, method) for slot, method in self.methods.items()})

    def keeping(self, reasons: Mapping[Slot, str]) -> Self:
        """The same, but that more sites stay, for the reasons given."""
        methods = {slot: method for slot, method in self.methods.items() if slot not in reasons}
        kept = {
            slot: reasons[slot] if slot in reasons else self.kept[slot] for slot in self.slots if slot not in methods
        }
        return replace(self, methods=methods, kept=kept)

    def fitted(self) -> Self:
        """The same with tiles that divide each site's shape (`methods.fitting`), as the methods are applied."""
        return self.having({slot: fitted(method, slot.shape) for slot, method in self.methods.items()})

    def allocations(self) -> dict[Method, Allocation]:
        """The allocations, new ones, that methods ask for; sites under equal methods share one, from which unmeasured
        sites stay out.
        """
        found: dict[Method, Allocation] = {}
        for method in self.methods.values():
            if method not in found and (allocation := method.allocation()) is not None:
                found[method] = Measured(method, allocation)
        return found

    @property
    def needs(self) -> dict[Slot, Stats]:
        """The statistics that each site's own method reads."""
        return {slot: method.wants for slot, method in self.methods.items()}

    @property
    def wanted(self) -> dict[Slot, Stats]:
        """The same with what the site's allocation reads."""
        spread = self.allocations()
        return {slot: method.wants | _wants(spread.get(method)) for slot, method in self.methods.items()}

    @property
    def surveyed(self) -> dict[Slot, Stats]:
        """What has to be known of the original model before anything is compressed: for allocations all they read, for
        methods their gradients.
        """
        spread = self.allocations()
        return {
            slot: (_wants(spread.get(method)) & MEASURED) | (method.wants & GRADIENTS)
            for slot, method in self.methods.items()
        }

    @property
    def reads_data(self) -> bool:
        """Whether any method or allocation reads what only a run of the model shows."""
        return any(need & MEASURED for need in self.wanted.values())

    @property
    def structures(self) -> list[Slot]:
        """The sites whose methods have to know which rows are one channel of the network."""
        return [slot for slot, need in self.wanted.items() if need & Stats.CHANNELS]

    @property
    def rounding(self) -> dict[Slot, Inputs]:
        """The sites whose layers round their inputs, and how."""
        return {slot: inputs for slot, method in self.methods.items() if (inputs := method.rounds) is not None}

    def texts(self) -> dict[Slot, str]:
        """What happens to every slot, as expressions of the scheme language."""
        return {
            slot: repr(self.methods[slot] if slot in self.methods else Keep(self.kept[slot])) for slot in self.slots
        }

    def to_json(self) -> dict[str, str]:
        """The expressions by site, as `from_json` and people read them.

        Like sites share the entry of their name with `*` for its numbers, which says what most of them get; one that
        gets something else, or that is the only one of its kind, has an entry under its own name.
        """
        texts = self.texts()
        alike: dict[str, Counter[str]] = {}
        for slot, text in texts.items():
            alike.setdefault(numbered(slot.name), Counter())[text] += 1
        shared = {name: text for name, found in alike.items() for text, n in found.most_common(1) if n > 1}
        told: dict[str, str] = {}
        for slot, text in texts.items():
            name = numbered(slot.name)
            told[name if shared.get(name) == text else slot.name] = text
        return told

    @classmethod
    def from_json(cls, told: Mapping[str, str], slots: tuple[Slot, ...]) -> Self:
        """The plan that `to_json` wrote of these slots. Raises: CheckpointError for a site of which it says nothing,
        SchemeError for no scheme.
        """
        known: dict[str, Any] = {text: parse(text) for text in set(told.values())}
        choices: dict[Slot, Choice] = {}
        for slot in slots:
            text = told.get(slot.name, told.get(numbered(slot.name)))
            if text is None:
                raise CheckpointError(f"the plan says nothing of {slot.name}")
            choices[slot] = known[text]
        return cls.of(choices)


def plan_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a directory's manifest says was done, as `Plan.to_json` wrote it; empty where it says nothing (other
    writers, earlier versions).
    """
    told = manifest.get("plan", {})
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise CheckpointError("damaged: the manifest's plan is no table of sites")
    return told


def numbered(name: str) -> str:
    """A site's name with `*` for every number in it, which like sites of a chain of blocks have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _wants(allocation: Allocation | None) -> Stats:
    return allocation.wants if allocation is not None else NONE
