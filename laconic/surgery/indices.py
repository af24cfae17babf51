"""How indices change in concatenations and reshapes: from the sizes seen in the forward pass, not inferred from the
layers around them.

torch-pruning infers these sizes from the nearest layers, which fails where a map is flattened behind a concatenation,
or where a part comes from the model's input.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from laconic.surgery.trace import Watch, walk_node


@dataclass(frozen=True)
class _Shift:
    """Index of a part <-> index of the whole."""

    start: int
    size: int
    back: bool

    def __call__(self, indices: list[Any]) -> list[Any]:
        if self.back:
            return [i._replace(idx=i.idx - self.start) for i in indices if self.start <= i.idx < self.start + self.size]
        return [i._replace(idx=i.idx + self.start) for i in indices]


@dataclass(frozen=True)
class _Flattened:
    """Channel <-> its entries in a flattened map."""

    entries: int
    back: bool

    def __call__(self, indices: list[Any]) -> list[Any]:
        if self.back:
            return list(dict.fromkeys(i._replace(idx=i.idx // self.entries) for i in indices))
        return [i._replace(idx=i.idx * self.entries + k) for i in indices for k in range(self.entries)]


def place_indices(graph: Any, watch: Watch) -> None:
    """Put exact index mappings on the graph's edges, and keep the graph from inferring its own there."""
    from torch_pruning.ops import OPTYPE

    for node in graph.module2node.values():
        # heads are followed elsewhere; torch-pruning's own rule divides by zero on other expansions
        if node.type == OPTYPE.EXPAND:
            node.type = OPTYPE.ELEMENTWISE
            for edge in (
                *node.dependencies,
                *(e for other in node.inputs for e in other.dependencies if e.target is node),
            ):
                edge.index_mapping[:] = [None, None]
    known = [node for node in graph.module2node.values() if node.grad_fn in watch.joins or node.grad_fn in watch.folds]
    for node in known:
        node.type = OPTYPE.ELEMENTWISE
        for edge in (
            *node.dependencies,
            *(e for other in (*node.inputs, *node.outputs) for e in other.dependencies if e.target is node),
        ):
            edge.index_mapping[:] = [None, None]
    for node in known:
        if node.grad_fn in watch.joins:
            dimension, rank, sizes = watch.joins[node.grad_fn]
            if dimension == _axis(node.grad_fn, rank, watch):
                _place_join(node, sizes)
        else:
            entries, unfolds = watch.folds[node.grad_fn]
            for other in node.inputs:
                _map(node, other, _Flattened(entries, not unfolds))
                _map(other, node, _Flattened(entries, unfolds))


def _place_join(node: Any, sizes: list[int]) -> None:
    by_node = {other.grad_fn: other for other in node.inputs}
    start = 0
    for size, (made, _) in zip(sizes, node.grad_fn.next_functions, strict=True):
        other = by_node.get(made)
        if other is not None:
            _map(node, other, _Shift(start, size, True))
            _map(other, node, _Shift(start, size, False))
        start += size


def _map(source: Any, target: Any, mapping: Any) -> None:
    """Put a mapping on the first edge between two nodes that has none."""
    for edge in source.dependencies:
        if edge.target is target and edge.index_mapping[1] is None:
            edge.index_mapping[1] = mapping
            return


def _axis(node: Any, rank: int, watch: Watch) -> int | None:
    """The dimension that holds channels: the last behind linear layers, the second behind convolutions; None if that is
    not clear.
    """
    found, _ = walk_node(node, watch.made_by)
    linear = {isinstance(watch.model.get_submodule(watch.made_by[n]), nn.Linear | Conv1D) for n in found}
    if len(linear) != 1:
        return None
    return rank - 1 if linear.pop() else 1
