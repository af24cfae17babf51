"""The proof: a channel may be cut when a network in which it is silent and one in which it is gone compute the same."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from laconic.model.batches import Batch
from laconic.surgery.coupling import Coupling, Group, remove
from laconic.surgery.heads import Heads, counted
from laconic.surgery.ports import Port, held, hush, produces, spread
from laconic.surgery.verify import FAILURES, answers, apart, first_line, sift

TOLERANCE = 1e-5  # relative, in float32: rounding was seen to stay below 1e-6, wrong indices are off by far more


def prove(
    network: nn.Module,
    batch: Batch,
    tried: Coupling,
    heads: dict[int, Heads],
    candidates: Sequence[int],
    generator: torch.Generator,
) -> tuple[list[int], list[Group], dict[int, str]]:
    """The groups that can be cut, as they have to be cut, and why the others cannot. `heads`: by group, for those that
    are attentions'.
    """
    groups = list(tried.groups)
    halves = {i: _half(groups[i], generator) for i in candidates}

    def test(items: Sequence[int], silent: bool = True) -> str | None:
        numbers = torch.cat([halves[i] for i in items])
        coupling = Coupling({}, tuple(groups[i] for i in items), tried.ports)
        return _differs(network, batch, coupling, numbers, silent)

    kept, wrong = sift(candidates, test)
    for i in [i for i in wrong if i in heads]:  # hand-written attention may keep its sizes as attributes
        plain = groups[i]
        for counts in counted(network, [*heads[i].rows, *heads[i].columns], heads[i]):
            groups[i] = replace(plain, counts=counts)
            if test([i]) is None and test([*kept, i]) is None:
                kept.append(i)
                del wrong[i]
                break
            groups[i] = plain
    before = answers(network, batch)

    def unheard(i: int) -> bool:
        return apart(before, _silenced(network, batch, tried.ports, halves[i])) == 0.0

    for i in [i for i in kept if unheard(i)]:  # what nobody hears proves nothing: the other half may be heard
        halves[i] = _others(groups[i], halves[i])
        reason = test([i]) if len(halves[i]) and not unheard(i) else _UNHEARD
        if reason is not None:
            kept.remove(i)
            wrong[i] = reason
    read, _ = sift(sorted(kept), lambda items: test(items, False))
    groups = [replace(group, by_input=i in read) for i, group in enumerate(groups)]
    return sorted(kept), groups, wrong


_UNHEARD = (
    "silencing it does not change the output on this example, which then cannot show that it may be cut; try another "
    "example"
)


def _others(group: Group, chosen: Tensor) -> Tensor:
    """The channels of a group that are not chosen."""
    numbers = torch.arange(*group.ids)
    return numbers[~torch.isin(numbers, chosen)]


def _half(group: Group, generator: torch.Generator) -> Tensor:
    """A random half of a group's channels, at least one and not all."""
    order = torch.randperm(len(group), generator=generator)
    return (order[: max(1, len(group) // 2)] + group.ids[0]).sort().values


def _differs(network: nn.Module, batch: Batch, coupling: Coupling, numbers: Tensor, silent: bool) -> str | None:
    """What goes wrong when some channels are made silent (or unread) and then cut; None when nothing does."""
    subject = copy.deepcopy(network)
    _silence(subject, coupling.ports, numbers, silent)
    try:
        whole = answers(subject, batch)
        remove(subject, coupling, numbers)
        distance = apart(whole, answers(subject, batch))
    except FAILURES as error:
        return f"cutting it breaks the forward pass: {first_line(error)}"
    if distance <= TOLERANCE:
        return None
    what = "its shape" if distance == float("inf") else f"{distance:.1e} of its size"
    return f"cutting silent channels changes the output by {what}"


def _silence(subject: nn.Module, ports: Sequence[Port], numbers: Tensor, silent: bool = True) -> None:
    """Make channels silent in place, or (not `silent`) unread: zero what every layer reads of them."""
    for port in ports:
        module = subject.get_submodule(port.path)
        chosen = torch.isin(port.ids, numbers).nonzero().flatten()
        if len(chosen) and (produces(module, port.side) if silent else port.side == "in"):
            _, dimension, weight, block = next(held(module, port.side))
            weight.index_fill_(dimension, spread(chosen, block), 0)
        if silent and port.side != "in":
            hush(module, port.side, chosen)


def _silenced(network: nn.Module, batch: Batch, ports: Sequence[Port], numbers: Tensor) -> list[Tensor]:
    """The network's output without some channels."""
    subject = copy.deepcopy(network)
    _silence(subject, ports, numbers)
    return answers(subject, batch)
