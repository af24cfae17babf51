"""Which rows of the layers around an attention belong to which group of heads: measured through gradients, not read off
names.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.surgery.trace import Attention


@dataclass(frozen=True)
class Heads:
    """An attention cut by groups of heads that share keys and values. `rows` and `columns`: the group of every index of
    a layer, -1 for none.

    `counts` and `widths`: numbers of heads, and of entries, that hand-written code may keep as attributes, with the
    number per group.
    """

    groups: int
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    counts: dict[int, int]
    widths: dict[int, int]


def find_heads(attention: Attention, generator: torch.Generator) -> Heads | str:
    """The groups of an attention, or why there are none.

    A group is a key head with the query heads that use it; keys repeated for the queries before the product are
    recognised.
    """
    if any(tensor.dim() != 4 for tensor in attention.tensors):
        return "its queries, keys and values are not [batch, heads, tokens, entries]"
    if not all(attention.producers):
        return "its queries, keys and values do not come from nn.Linear layers"
    if not attention.consumers:
        return "no nn.Linear consumes its output"
    heads = [tensor.shape[1] for tensor in attention.tensors]
    if any(h != heads[2] and heads[0] % h for h in heads):
        return f"its {heads[0]} query heads are not a multiple of its {heads[1]} key heads"
    for groups in (g for g in range(heads[2], 0, -1) if all(h % g == 0 for h in heads)):
        rows: dict[str, Tensor] = {}
        whole = True
        for tensor, made in zip(attention.tensors, attention.producers, strict=True):
            whole = whole and _trace_rows(tensor, made, groups, rows, generator)
        if whole:
            columns = _trace_columns(attention, groups, generator)
            if columns is None:
                return "the layer behind it mixes heads before its product"
            per_group = {1, heads[0] // groups, heads[1] // groups}
            widths = {int((ids >= 0).sum()) // groups for ids in (*rows.values(), *columns.values())}
            return Heads(groups, rows, columns, {n * groups: n for n in per_group}, {n * groups: n for n in widths})
    return "a row of its queries, keys or values feeds several heads"


def _trace_rows(
    tensor: Tensor, outputs: dict[str, Tensor], groups: int, rows: dict[str, Tensor], generator: torch.Generator
) -> bool:
    """Note which group of heads each row of the producers feeds; False when a row feeds several, or none of the
    tensor's heads has a row.

    With the gradient g of <u, tensor> and g' of <u x group number, tensor>, a row that feeds group j alone has g' =
    (j + 1) g.
    """
    u = torch.randn(tensor.shape, generator=generator)
    number = torch.arange(tensor.shape[1]) // (tensor.shape[1] // groups) + 1
    found = ratios(tensor, list(outputs.values()), u, u * number.reshape(1, -1, 1, 1))
    anything = False
    for path, ratio in zip(outputs, found, strict=True):
        if ratio is None:
            continue
        group, exact = ratio
        if not exact:
            return False
        known = rows.setdefault(path, torch.full((len(group),), -1))
        if bool(((group >= 0) & (known >= 0) & (group != known)).any()):
            return False
        rows[path] = torch.where(group >= 0, group, known)
        anything = anything or bool((group >= 0).any())
    return anything


def ratios(tensor: Tensor, sources: list[Tensor], u: Tensor, scaled: Tensor) -> list[tuple[Tensor, bool] | None]:
    """Per source [..., n]: round(g' / g) - 1 of every index (-1 where g is zero), and whether g' is that multiple of g
    exactly.
    """
    once = torch.autograd.grad(tensor, sources, u, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(tensor, sources, scaled, retain_graph=True, allow_unused=True)
    found: list[tuple[Tensor, bool] | None] = []
    for g, h in zip(once, twice, strict=True):
        if g is None or h is None:
            found.append(None)
            continue
        g, h = g.double().flatten(0, -2), h.double().flatten(0, -2)  # noqa: PLW2901
        energy = g.square().sum(0)
        number = torch.where(energy > 0, (g * h).sum(0) / energy.clamp_min(1e-300), torch.zeros(()).double()).round()
        error = (h - number * g).square().sum(0)
        found.append((number.long() - 1, bool((error <= 1e-6 * energy * number.clamp_min(1).square()).all())))
    return found


def _trace_columns(attention: Attention, groups: int, generator: torch.Generator) -> dict[str, Tensor] | None:
    """The group of every input column of the consumers; None when a column gets more than one entry of the output."""
    found: dict[str, Tensor] = {}
    heads = attention.output.shape[1]
    for path, given in attention.consumers.items():
        u = torch.randn(given.shape, generator=generator)
        turned = attention.output
        number = torch.arange(1, given.shape[-1] + 1)
        grads = [
            torch.autograd.grad(given, turned, w, retain_graph=True, allow_unused=True)[0] for w in (u, u * number)
        ]
        if grads[0] is None or grads[1] is None:
            return None
        g, h = (grad.double().transpose(1, 2).flatten(0, 1) for grad in grads)  # [batch x tokens, heads, entries]
        energy = g.square().sum(0)
        if bool((energy == 0).any()):
            return None
        column = ((g * h).sum(0) / energy).round()
        if bool(((h - column * g).square().sum(0) > 1e-6 * energy * column.square()).any()):
            return None
        ids = torch.full((given.shape[-1],), -1)
        ids[column.long().flatten() - 1] = (torch.arange(heads) // (heads // groups)).repeat_interleave(column.shape[1])
        found[path] = ids
    return found


def counted(model: nn.Module, paths: list[str], heads: Heads) -> list[tuple[tuple[str, str, int], ...]]:
    """Attributes of the module around an attention that may hold its sizes, as (path, name, per group): fewest first,
    each list a guess.

    Guesses are tried one after the other; only one whose thinned network computes the same is used.
    """
    owner = _common(paths)
    named: list[tuple[str, str, int]] = []
    sized: list[tuple[str, str, int]] = []
    for name, value in vars(model.get_submodule(owner)).items():
        low = name.lower()
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        plain = not any(word in low for word in ("dim", "size", "group", "rep", "embed"))
        if plain and ("head" in low or "kv" in low) and value in heads.counts:
            named.append((owner, name, heads.counts[value]))
        elif value in heads.widths and value > heads.groups:
            sized.append((owner, name, heads.widths[value]))
    return [*([tuple(named)] if named else []), *([(*named, *sized)] if sized else [])]


def _common(paths: list[str]) -> str:
    """The deepest module that holds all of some modules."""
    split = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
