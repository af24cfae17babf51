"""The dependency graph's groups of layers, read into the union-find."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from laconic.surgery.ports import Conv, extent, sides
from laconic.surgery.union import Key, Union
from laconic.surgery.verify import FAILURES, first_line

LOST = "no channel index can be followed"

PLAIN = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Relu",
    "Hardtanh",
    "Mean",
    "MaxPool",
    "AvgPool",
    "AdaptiveAvgPool",
    "Dropout",
    "Silu",
    "Gelu",
    "Unsqueeze",
    "Squeeze",
    "Alias",
    "TBackward",
    "Mm",
    "Addmm",
    "Clone",
    "ToCopy",
)
"""Operations that leave channels where they are, by the start of their names: not worth a word in a reason."""


def join_layers(graph: Any, model: nn.Module, union: Union) -> None:
    """Join what the dependency graph couples: every output row of every layer with all that has to be cut with it."""
    paths: dict[Any, str] = {module: path for path, module in model.named_modules()}
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    reader = _Names(graph, union, paths, names)
    covered: set[int] = set()
    for layer in [m for m in graph.module2node if isinstance(m, nn.Linear | Conv | Conv1D)]:
        if id(layer) in covered:
            continue
        pruner = graph.get_pruner_of_module(layer)
        rows = list(range(pruner.get_out_channels(layer)))
        root = list(reader.nodes(layer, True, True, rows))
        try:
            items = list(graph.get_pruning_group(layer, pruner.prune_out_channels, rows))
        except FAILURES as error:
            union.marks += [
                (node, f"its graph cannot be followed: {type(error).__name__}: {first_line(error)}") for node in root
            ]
            continue
        for item in items:
            target = item.dep.target.module
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            reader.join(root, target, out, graph.is_in_channel_pruning_fn(item.dep.handler), item)
            if (
                isinstance(target, nn.Linear | Conv | Conv1D)
                and out
                and len(set(item.idxs)) == graph.get_out_channels(item.dep.target)
            ):
                covered.add(id(target))


@dataclass(frozen=True)
class _Names:
    """What is needed to name a node of the graph: the paths of modules, and the names of parameters that no known
    module holds.
    """

    graph: Any
    union: Union
    paths: dict[Any, str]
    names: dict[Any, str]

    def join(self, root: list[int], target: Any, out: bool, into: bool, item: Any) -> None:
        """Join the rows of a root layer with the indices of one member of its group."""
        if isinstance(target, nn.PReLU) and not sides(target):  # one slope for all channels
            return
        if target not in self.paths and not isinstance(target, nn.Parameter):
            self.remark(root, target)
            return
        places = list(self.nodes(target, out, into, item.idxs))
        for place, index in zip(places, item.root_idxs, strict=True):
            if index is None or place < 0:
                name = self.paths.get(target, self.names.get(target, ""))
                self.union.marks += [(node, f"{LOST} into {name} ({type(target).__name__})") for node in root]
                return
            self.union.join(root[index], place)

    def remark(self, root: list[int], operation: Any) -> None:
        """Note an operation that channels pass, or that they reach the output."""
        kind, text = type(operation).__name__, str(operation)
        name = text[text.find("(") + 1 : text.rfind(")")] if kind == "_ElementWiseOp" else kind.strip("_")
        for node in {self.union.find(n) for n in root}:
            if kind == "_OutputOp":
                self.union.marks.append((node, "its channels reach the model's output"))
            elif not name.startswith(PLAIN):
                self.union.ops.append((node, name))

    def nodes(self, target: Any, out: bool, into: bool, indices: Iterable[int]) -> Iterator[int]:
        """The union's node of every index of a module or parameter; -1 for an index that it does not have."""
        block = 1
        if isinstance(target, nn.Parameter):
            path, _, name = self.names[target].rpartition(".")
            dimension = self.graph.module2node[target].pruning_dim % target.dim()
            key: Key = (path, f"{name}:{dimension}")
            size = target.shape[dimension]
        elif known := sides(target):
            side = "out" if out else "in"
            if len(known) == 1:
                side = known[0]
            key, size = (self.paths[target], side), extent(target, side)
            if isinstance(target, nn.GroupNorm):
                block = target.num_channels // size
            elif isinstance(target, Conv) and side == "through":
                block = (target.out_channels if out or not into else target.in_channels) // size
        else:  # channels pass through it in a way that is not known: it gets a node to carry the mark
            key, size = (self.paths[target], "unknown"), 1
            self.union.add(key, size)
            self.union.marks.append(
                (self.union.node(key, 0), f"{self.paths[target]} ({type(target).__name__}) cannot be cut by channel")
            )
            yield from (self.union.node(key, 0) for _ in indices)
            return
        self.union.add(key, size)
        for index in indices:
            yield self.union.node(key, index // block) if 0 <= index // block < size else -1
