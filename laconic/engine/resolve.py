"""From a scheme to a plan: what every site of a model gets, and, where the scheme is one method, what a whole file
needs beside it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from laconic.engine.plan import Plan, numbered
from laconic.errors import SchemeError
from laconic.host.foreign import Foreign
from laconic.methods.arguments import check_types
from laconic.methods.base import Method, check_last
from laconic.methods.fitting import difference, fitted, treats
from laconic.methods.free import free_within
from laconic.methods.rtn import RTN
from laconic.model.sites import Slot
from laconic.scheme.expressions import nearest
from laconic.scheme.keep import Keep
from laconic.scheme.text import Choice, Predicate, Rule, Scheme

T = TypeVar("T")
Fit = Literal["fit", "strict"]
"""What becomes of a group (or another tile) that does not divide a matrix: the largest of its divisors that does, or a
refusal.
"""

SMALL = 2048
"""Matrices of fewer entries stay: an error there costs as much as in a large one, and all of them together hardly
count.
"""
_SMALL_SHARE = (
    0.1  # of the body's entries; where small matrices hold more than that, they are what there is to compress
)
_LEAST_BITS = 6
"""Bits of an embedding or head of which nothing is said: a step per row, entropy-coded.

books-llama-7m in 3.79 MB (KL on dracula / WikiText-2, nats per token): .0022 / .0042 with a 6-bit embedding and
matrices at 4.09 bits, .0226 / .0516 with the embedding in bfloat16 and matrices at 2.25 bits
(`benchmarks/whole_file.py`).
"""
_MOST_BITS = (
    8  # of a grid; a method that spends a bit more than this is not one of grids, and leaves embeddings and heads alone
)


def resolve(
    scheme: Scheme,
    slots: Sequence[Slot],
    *,
    whole_file: bool = False,
    keep: str | Sequence[str] = (),
    group: Fit = "fit",
    notes: list[str] | None = None,
) -> Plan:
    """What happens to every slot under a scheme; `notes` collects what the user must hear.

    A plan or function says it for every site. One method is for the body: the matrices that are no embedding, output
    head or router. With `whole_file`, as compression has it, it is what a file needs: embeddings and heads are rounded
    at b bits, but 6 at least and 8 at most, b the bits per weight the method spends on the body, a step per row and
    entropy-coded; from b = 9 on they stay (8-bit grids with their scales lie below). Routers and matrices under 2048
    entries stay, unless these hold more than a tenth of the body. Without it, as training and searches have it, all
    outside the body stays.

    `keep`: patterns of sites that stay whatever the scheme says; one without a wildcard is also compared with every
    part of a dotted name and with the role ("router", "embedding", "head"). Tiles that do not divide a matrix are
    exchanged by `methods.fitting` where the method is applied; `group="strict"` refuses them.
    Raises: SchemeError when a rule or pattern matches nothing, a site matches no rule, a method cannot treat a site's
    shape, or nothing is left.
    """
    if not slots:
        raise SchemeError("the model has no linear, convolution or embedding layer to compress")
    if group not in ("fit", "strict"):
        raise SchemeError(f"group: expected 'fit' or 'strict', got {group!r}")
    plan = Plan.of(_chosen(scheme, slots, whole_file))
    if not plan.methods and isinstance(scheme, Method):
        raise SchemeError("the model has embeddings or an output head only; name them in a plan to compress them")
    plan = plan.keeping({slot: f"keep {pattern!r}" for slot, pattern in _matched(patterns(keep), slots).items()})
    if keep and not plan.methods:
        raise SchemeError(f"keep: nothing is left to compress; {', '.join(map(repr, patterns(keep)))} match every site")
    _check_shapes(plan.methods, group, notes if notes is not None else [])
    return plan


def _chosen(scheme: Scheme, slots: Sequence[Slot], whole_file: bool) -> Mapping[Slot, Choice]:
    """What a scheme says of every slot."""
    if isinstance(scheme, Keep):
        return dict.fromkeys(slots, scheme)
    if isinstance(scheme, Method):
        check_types("scheme", scheme)
        if whole_file:
            return _of_a_file(scheme, slots)
        return {slot: scheme if slot.role == "body" else Keep(_role(slot)) for slot in slots}
    if callable(scheme):
        return {slot: _returned(_asked(scheme, slot), slot) for slot in slots}
    return _first_matches(list(scheme), slots)


def patterns(keep: str | Sequence[str]) -> list[str]:
    """The patterns of sites that stay: one may be given as a text."""
    return [keep] if isinstance(keep, str) else list(keep)


def _of_a_file(scheme: Method, slots: Sequence[Slot]) -> dict[Slot, Choice]:
    """One method, over a whole model: see `resolve`."""
    body = [slot for slot in slots if slot.role == "body"]
    if not body:
        return dict.fromkeys(slots, Keep())
    small = {slot for slot in slots if slot.entries < SMALL}
    if sum(slot.entries for slot in body if slot in small) > _SMALL_SHARE * sum(slot.entries for slot in body):
        small = set()
    spent = _bits_per_weight(scheme, [slot for slot in body if slot not in small])
    bits = min(max(_LEAST_BITS, round(spent)), _MOST_BITS)
    rounded = RTN(bits=bits, group="channel", codec="ans") if spent < _MOST_BITS + 1 else None
    chosen: dict[Slot, Choice] = {}
    for slot in slots:
        if slot.role in ("body", "embedding", "head") and slot in small:
            chosen[slot] = Keep(f"small: under {SMALL} entries")
        elif slot.role == "body":
            chosen[slot] = scheme
        else:
            chosen[slot] = rounded if rounded and slot.role in ("embedding", "head") else Keep(_role(slot))
    return chosen


def _bits_per_weight(scheme: Method, slots: Sequence[Slot]) -> float:
    """What a method spends on sites, on average; those it cannot treat do not count (`_check_shapes` refuses them by
    name).
    """
    sizes = [
        (fitted(scheme, slot.shape).expected_bits(slot.shape), slot.entries)
        for slot in slots
        if _treatable(scheme, slot)
    ]
    return sum(bits for bits, _ in sizes) / max(sum(entries for _, entries in sizes), 1)


def _treatable(scheme: Method, slot: Slot) -> bool:
    try:
        return treats(fitted(scheme, slot.shape), [slot.shape])
    except SchemeError:
        return False


def _role(slot: Slot) -> str:
    return {"body": "", "head": "output head"}.get(slot.role, slot.role)


def _matched(patterns: Sequence[str], slots: Sequence[Slot]) -> dict[Slot, str]:
    """The pattern that keeps a slot, for those that are kept. Raises: SchemeError for a pattern that keeps nothing."""
    found: dict[Slot, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SchemeError(f"keep: expected patterns such as '*.lm_head' or 'router', got {pattern!r}")
        hits = [slot for slot in slots if _keeps(pattern, slot)]
        if not hits:
            raise SchemeError(f"keep {pattern!r} matches no site{nearest(pattern, _site_words(slots))}")
        for slot in hits:
            found.setdefault(slot, pattern)
    return found


def _keeps(pattern: str, slot: Slot) -> bool:
    """A pattern against a site's names; a bare word also against every part of them, and against the role."""
    if any(fnmatchcase(name, pattern) for name in slot.names):
        return True
    bare = not any(sign in pattern for sign in "*?[")
    return bare and (pattern == slot.role or any(f".{pattern}." in f".{name}." for name in slot.names))


def _site_words(slots: Sequence[Slot]) -> list[str]:
    """What a pattern can have meant: last parts of names, whole names, roles."""
    ends = sorted({"*." + name.rsplit(".", 1)[-1] for slot in slots for name in slot.names})
    parts = {part for slot in slots for name in slot.names for part in name.split(".") if not part.isdigit()}
    roles = {slot.role for slot in slots} - {"body"}
    return [*ends, *sorted(parts | roles), *sorted({name for slot in slots for name in slot.names})]


def _check_shapes(methods: dict[Slot, Method], group: Fit, notes: list[str]) -> None:
    """Every method against its site's shape; one note for like sites whose tiles are exchanged. Raises: SchemeError
    with the site's name.
    """
    exchanged: Counter[tuple[str, str]] = Counter()
    for slot, method in methods.items():
        check_types(slot.name, method)
        try:
            check_last(method)
            got = fitted(method, slot.shape)
            got.expected_bits(slot.shape)
            if got != method and group == "strict":
                method.expected_bits(slot.shape)
        except SchemeError as error:
            way_out = "" if free_within(method) else f"; {_way_out(slot, method)}"
            raise SchemeError(f"{slot.name}: {error}{way_out}") from error
        if got != method:
            exchanged[numbered(slot.name), f"{difference(method, got)}: {slot.columns} columns"] += 1
    notes += [f"{name}{f' ({n} sites)' if n > 1 else ''}: {text}" for (name, text), n in exchanged.items()]


def _way_out(slot: Slot, method: Method) -> str:
    """The plan that gives a site a method of its own: the same with other tiles, where that is all it takes, else
    `Keep()`.
    """
    own: Choice = Keep()
    if _treatable(method, slot):
        own = fitted(method, slot.shape)
    pattern = "*." + slot.name.rsplit(".", 1)[-1] if "." in slot.name else slot.name
    return (
        f"give it a rule of its own in a plan, [({pattern!r}, {own!r}), ('*', {method!r})], or leave it out with "
        f"keep={pattern!r}"
    )


def _asked(function: Callable[[Slot], T], slot: Slot) -> T:
    """What a function of the user's says of a slot. Raises: SchemeError naming the slot and the line, whatever the
    function raises.
    """
    with Foreign(SchemeError, slot.name):
        return function(slot)


def _returned(choice: Any, slot: Slot) -> Choice:
    if not isinstance(choice, Method | Keep):
        raise SchemeError(f"{slot.name}: the scheme function should return a method, it returned {choice!r}")
    return choice


def _first_matches(rules: list[Rule], slots: Sequence[Slot]) -> dict[Slot, Choice]:
    for rule in rules:
        if not (
            isinstance(rule, tuple)
            and len(rule) == 2
            and (isinstance(rule[0], str) or callable(rule[0]))
            and isinstance(rule[1], Method | Keep)
        ):
            raise SchemeError(f"a rule is a pair (pattern or predicate, method), got {rule!r}")
    chosen: dict[Slot, Choice] = {}
    used: set[int] = set()
    for slot in slots:
        hits = [i for i, (test, _) in enumerate(rules) if _matches(test, slot)]
        if not hits:
            raise SchemeError(
                f"{slot.name}: no rule of the plan matches it; end the plan with ('*', Keep()) to leave the rest as it "
                "is"
            )
        chosen[slot] = rules[hits[0]][1]
        used.update(hits)
    for i, (test, _) in enumerate(rules):
        if i not in used:
            names = sorted(
                {"*." + name.rsplit(".", 1)[-1] for slot in slots for name in slot.names}
                | {n for s in slots for n in s.names}
            )
            raise SchemeError(
                f"rule {i + 1} ({getattr(test, 'text', test)!r}) matches no site{nearest(str(test), names)}"
            )
    return chosen


def _matches(test: str | Predicate, slot: Slot) -> bool:
    return any(fnmatchcase(name, test) for name in slot.names) if isinstance(test, str) else bool(_asked(test, slot))
