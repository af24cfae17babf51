"""Finding the channels of a network: from its graph to numbered, proved groups."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from laconic.model.batches import Batch
from laconic.model.sites import Slot, find_slots
from laconic.surgery.coupling import Coupling, Group
from laconic.surgery.graph import Traced, trace
from laconic.surgery.heads import Heads
from laconic.surgery.layers import LOST
from laconic.surgery.ports import Port, produces
from laconic.surgery.proof import prove
from laconic.surgery.union import Key
from laconic.surgery.verify import few, laboratory, stir


def couple(model: nn.Module, example: Batch, *, seed: int = 0) -> Coupling:
    """Find every channel of a module in memory that can be cut, with all that must be cut along with it.

    Rows are joined along the dependency graph (residual sums, concatenations, grouped convolutions, norms, flattening)
    and around attentions (groups of heads that share keys). Nothing is believed: in a float32 copy with moved weights,
    a random half of the channels of every group is silenced and thinned, and the two must agree to 1e-5 of the output;
    groups that do not are in `refused`. `example`: a batch without labels; its first four samples are used. The model
    and the global random state stay as they are.
    Raises: SurgeryError when no graph can be traced. Source: Fang et al. 2023 (dependency graph); Condensa, section
    3.4.
    Cost: one copy, one traced pass, two passes and a copy per test; two tests if all groups pass, about 2 log2(n) more
    for each group that does not.
    """
    generator = torch.Generator().manual_seed(seed)
    network, batch = laboratory(model), few(example, generator)
    slots = find_slots(network)
    stir(network, generator)
    traced = trace(network, batch, generator)
    network.requires_grad_(False)
    tried, heads = _groups(network, traced)
    reasons, notes = _reasons(traced, tried)
    kept, groups, wrong = prove(
        network,
        batch,
        tried=tried,
        heads=heads,
        candidates=[i for i in range(len(tried.groups)) if i not in reasons],
        generator=generator,
    )
    reasons |= {i: text + notes[i] for i, text in wrong.items()}
    final = _renumber(tried, groups, kept)
    refused = traced.refused + [f"{_names(groups[i].layers)}: {reasons[i]}" for i in sorted(reasons)]
    refused += _unseen(network, slots, traced)
    return Coupling(_channels(slots, network, final.ports), final.groups, final.ports, refused)


def _unseen(network: nn.Module, slots: list[Slot], traced: Traced) -> list[str]:
    """Layers that no pass came through, or of which the graph knows nothing."""
    whole = [path for path, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    lines = [f"{path}: torch's MultiheadAttention fixes its own width, so its heads cannot be cut" for path in whole]
    for slot in slots:
        if not any(path in traced.reached or path.rpartition(".")[0] in whole for path, _ in slot.users):
            lines.append(f"{slot.name}: its module was not called on the example")
        elif slot.role != "embedding" and not any(
            (path, side) in traced.union.sizes for path, _ in slot.users for side in ("out", "through")
        ):
            lines.append(f"{slot.name}: the graph does not follow it")
    return lines


def _groups(network: nn.Module, traced: Traced) -> tuple[Coupling, dict[int, Heads]]:
    """Classes of indices that pass through the same ports, as groups of numbered channels; and which of them are
    heads.
    """
    union = traced.union
    together: dict[frozenset[Key], list[list[tuple[Key, int]]]] = {}
    for members in union.members().values():
        together.setdefault(frozenset(key for key, _ in members), []).append(members)
    ids = {key: torch.full((size,), -1) for key, size in union.sizes.items()}
    groups: list[Group] = []
    heads: dict[int, Heads] = {}
    first = 0
    order = {path: i for i, (path, _) in enumerate(network.named_modules())}
    for keys, classes in sorted(together.items(), key=lambda item: min(order[path] for path, _ in item[0])):
        makers = sorted(
            {path for path, side in keys if produces(network.get_submodule(path), side)}, key=order.__getitem__
        )
        if not makers:
            continue
        for number, members in enumerate(classes, first):
            for key, index in members:
                ids[key][index] = number
        found = [traced.heads[key] for key in keys if key in traced.heads]
        if found:
            heads[len(groups)] = found[0]
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", makers[0])
        groups.append(Group(kind, tuple(makers), (first, first + len(classes)), bool(found)))
        first += len(classes)
    real = {key: value for key, value in ids.items() if key not in traced.heads and key[1] != "unknown"}
    ports = tuple(Port(path, side, value) for (path, side), value in real.items() if bool((value >= 0).any()))
    return Coupling({}, tuple(groups), ports), heads


def _reasons(traced: Traced, tried: Coupling) -> tuple[dict[int, str], list[str]]:
    """Why the graph says that a group cannot be cut, for those; and for every group what a failed proof should
    mention.
    """
    union = traced.union
    marked: dict[int, dict[str, None]] = {}
    passed: dict[int, dict[str, None]] = {}
    for place, notes in ((marked, union.marks), (passed, union.ops)):
        for node, text in notes:
            place.setdefault(union.find(node), {})[text] = None
    consumed = torch.zeros(len(tried), dtype=torch.bool)
    roots: dict[int, int] = {}
    for port in tried.ports:
        if port.side == "in":
            consumed[port.ids[port.ids >= 0]] = True
        for index, number in enumerate(port.ids.tolist()):
            roots.setdefault(number, union.find(union.node((port.path, port.side), index)))
    reasons: dict[int, str] = {}
    remarks: list[str] = []
    for i, group in enumerate(tried.groups):
        numbers = range(*group.ids)
        texts = list(dict.fromkeys(text for n in numbers for text in marked.get(roots[n], ())))
        ops = list(dict.fromkeys(text for n in numbers for text in passed.get(roots[n], ())))
        if not texts and not bool(consumed[list(numbers)].all()):
            texts = ["no layer reads its channels: they reach the model's output"]
        if not texts and len(group) < 2:
            texts = [
                "all its heads are one group, which has to stay"
                if group.heads
                else "it has a single channel, which has to stay"
            ]
        note = f" (its channels pass through {', '.join(ops[:6])})" if ops else ""
        lost = [text for text in texts if text.startswith(LOST)]
        texts = [text for text in texts if not text.startswith(LOST)] + [text + note for text in lost[:1]]
        if texts:
            reasons[i] = "; ".join(texts[:3])
        remarks.append(note)
    return reasons, remarks


def _renumber(tried: Coupling, groups: list[Group], kept: list[int]) -> Coupling:
    """Only the groups that are kept, their channels numbered from zero."""
    table = torch.full((len(tried) + 1,), -1)
    final: list[Group] = []
    first = 0
    for i in kept:
        size = len(groups[i])
        table[slice(*groups[i].ids)] = torch.arange(first, first + size)
        final.append(replace(groups[i], ids=(first, first + size)))
        first += size
    # -1 picks the last entry, which is -1
    ports = [Port(port.path, port.side, table[port.ids]) for port in tried.ports]
    return Coupling({}, tuple(final), tuple(port for port in ports if bool((port.ids >= 0).any())))


def _channels(slots: list[Slot], network: nn.Module, ports: tuple[Port, ...]) -> dict[str, Tensor]:
    """The channel of every row of every site."""
    found: dict[str, Tensor] = {}
    by_path = {port.path: port for port in ports if produces(network.get_submodule(port.path), port.side)}
    for slot in slots:
        port = next((by_path[path] for path, name in slot.users if path in by_path and name == "weight"), None)
        found[slot.name] = torch.full((slot.rows,), -1)
        if port is not None:
            found[slot.name] = port.ids.repeat_interleave(slot.rows // len(port.ids))
    return found


def _names(layers: Sequence[str]) -> str:
    return ", ".join(layers[:4]) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
