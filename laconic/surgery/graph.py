"""Which indices of which ports are one channel: torch-pruning's dependency graph and the heads of attentions, joined by
union-find.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laconic.errors import LaconicError, SurgeryError
from laconic.model.batches import Batch
from laconic.model.calling import call
from laconic.surgery.heads import Heads, find_heads, ratios
from laconic.surgery.indices import place_indices
from laconic.surgery.layers import join_layers
from laconic.surgery.ports import extent, sides
from laconic.surgery.trace import MASKS_ONLY, Watch
from laconic.surgery.union import Key, Union
from laconic.surgery.verify import FAILURES, first_line, flat


@dataclass
class Traced:
    """What a traced network says of itself: its classes of indices, its attentions' heads, and what was never run."""

    union: Union
    heads: dict[Key, Heads] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)


def trace(model: nn.Module, batch: Batch, generator: torch.Generator) -> Traced:
    """Run a private copy of a model once and join all indices that are one channel.

    Raises: SurgeryError when no graph can be traced, naming what failed.
    """
    watch = Watch(model)

    def forward(network: nn.Module, given: Batch) -> list[Tensor]:
        with watch.watching():
            output = call(network, given)
        ends = [tensor for tensor in flat(output) if tensor.grad_fn is not None]
        if not ends:
            raise SurgeryError(
                f"{type(model).__name__}: no tensor of its output can be traced back to its weights; {MASKS_ONLY}"
            )
        return ends + watch.roots

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _dependency_graph(model, batch, forward)
            place_indices(graph, watch)
            traced = Traced(Union(), reached=watch.reached)
            join_layers(graph, model, traced.union)
    except LaconicError:
        raise
    except FAILURES as error:
        where = watch.stack[-1] or type(model).__name__
        raise SurgeryError(
            f"{where}: no graph can be traced: {type(error).__name__}: {first_line(error)}; {MASKS_ONLY}"
        ) from error
    _join_heads(watch, traced, generator)
    _join_halves(watch, traced.union, generator)
    _join_ties(model, traced.union)
    return traced


def _dependency_graph(model: nn.Module, batch: Batch, forward: Callable[[nn.Module, Batch], list[Tensor]]) -> Any:
    try:
        import torch_pruning
        from torch_pruning.pruner.function import LinearPruner
    except ImportError as error:
        raise SurgeryError("cutting networks needs torch-pruning: pip install 'laconic[surgery]'") from error

    class Conv1DPruner(LinearPruner):  # type: ignore[misc]  # GPT-2's linear layer, which computes x W
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.weight.shape[1]

        def get_in_channels(self, layer: Any) -> int:
            return layer.weight.shape[0]

    return torch_pruning.DependencyGraph().build_dependency(
        model, batch, forward_fn=forward, customized_pruners={Conv1D: Conv1DPruner()}, verbose=False
    )


def _join_heads(watch: Watch, traced: Traced, generator: torch.Generator) -> None:
    """Join the rows and columns around each attention that belong to one group of heads."""
    union, model = traced.union, watch.model
    for number, attention in enumerate(watch.attentions):
        found = find_heads(attention, generator)
        if isinstance(found, str):
            traced.refused.append(
                f"{attention.place or type(model).__name__}: its attention heads cannot be cut: {found}"
            )
            continue
        key = ("", f"attention {number}")
        union.add(key, found.groups)
        traced.heads[key] = found
        for side, layers in (("out", found.rows), ("in", found.columns)):
            for path, ids in layers.items():
                union.add((path, side), len(ids))
                for index, group in enumerate(ids.tolist()):
                    if group >= 0:
                        union.join(union.node(key, group), union.node((path, side), index))


def _join_halves(watch: Watch, union: Union, generator: torch.Generator) -> None:
    """Join the rows of a layer that holds several in one, as a fused gate and value, with the columns in which they
    meet.

    The dependency graph follows a split of the last dimension by its first part only.
    """
    for path, given in watch.inputs.items():
        columns = given.shape[-1]
        behind = watch.behind(given)
        wide = {
            p: made
            for p, made in behind.items()
            if p != path and made.shape[-1] > columns and made.shape[-1] % columns == 0
        }
        if not wide or any((p, "out") not in union.sizes for p in wide) or (path, "in") not in union.sizes:
            continue
        u = torch.randn(given.shape, generator=generator)
        for source, ratio in zip(
            wide, ratios(given, [*wide.values()], u, u * torch.arange(1, columns + 1)), strict=True
        ):
            if ratio is not None and ratio[1] and len(ratio[0]) == union.sizes[(source, "out")]:
                for row, column in enumerate(ratio[0].tolist()):
                    if column >= 0:
                        union.join(union.node((source, "out"), row), union.node((path, "in"), column))


def _join_ties(model: nn.Module, union: Union) -> None:
    """A parameter that two layers share is cut once: their rows and columns are joined."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(getattr(module, "weight", None), Tensor):
            continue
        other = first.setdefault(id(module.weight), path)
        if other == path:
            continue
        for side in ("out", "in", "through"):
            if (path, side) in union.sizes or (other, side) in union.sizes:
                _join_tie(model, union, (other, side), (path, side))


def _join_tie(model: nn.Module, union: Union, a: Key, b: Key) -> None:
    for path, side in (a, b):
        module = model.get_submodule(path)
        if side in sides(module):
            union.add((path, side), extent(module, side))
    if a in union.sizes and b in union.sizes and union.sizes[a] == union.sizes[b]:
        for index in range(union.sizes[a]):
            union.join(union.node(a, index), union.node(b, index))
        return
    for key in (a, b):
        for index in range(union.sizes.get(key, 0)):
            union.marks.append(
                (union.node(key, index), f"its weight is shared by {a[0]} and {b[0]}, which hold it differently")
            )
