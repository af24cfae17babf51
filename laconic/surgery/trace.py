"""One forward pass watched: attention calls, what feeds and what consumes them, and decisions that depend on the
data.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from laconic.errors import SurgeryError
from laconic.surgery.ports import Conv
from laconic.surgery.verify import flat

MASKS_ONLY = "masks without thinning still work: --no-thin on the command line (thin=False in a search)"
DECISIONS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist"}
PRODUCTS: tuple[Callable[..., Any], ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
JOINS: tuple[Callable[..., Any], ...] = (torch.cat, torch.concat, torch.concatenate)
RESHAPES: tuple[Callable[..., Any], ...] = (
    torch.flatten,
    torch.reshape,
    Tensor.flatten,
    Tensor.reshape,
    Tensor.view,
    Tensor.unflatten,
)
SOFTMAXES: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)
BARRIERS = {"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0", "MvBackward0"}


@dataclass
class Attention:
    """One attention: queries, keys and values [batch, heads, ...], the output's stand-in (a leaf), and the linear
    layers around it.

    `producers`: for each of the three, the layers that feed it and their outputs; `consumers`: the layers that read it
    and their inputs.
    """

    place: str
    tensors: list[Tensor]
    output: Tensor
    producers: list[dict[str, Tensor]]
    consumers: dict[str, Tensor] = field(default_factory=dict)


class Watch(TorchFunctionMode):
    """Notes attentions while a model runs, and cuts the autograd graph at each of them: what attention mixes is
    followed here, not there.

    `made_by` and `outputs` say of autograd nodes which linear layer or convolution made them, and what it gave;
    `inputs` holds the last input of each linear layer; `roots` are the tensors at which the graph was cut.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack: list[str] = [""]
        self.made_by: dict[Any, str] = {}
        self.outputs: dict[Any, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.attentions: list[Attention] = []
        self.roots: list[Tensor] = []
        self.reached: set[str] = set()
        self.joins: dict[
            Any, tuple[int, int, list[int]]
        ] = {}  # autograd node of a concatenation -> dimension, rank, sizes
        self.folds: dict[
            Any, tuple[int, bool]
        ] = {}  # autograd node of a reshape -> entries per channel; whether channels are unfolded
        self._derived: dict[int, Tensor] = {}  # tensors without a gradient that were computed from activations
        self._products: dict[Any, tuple[Tensor, Tensor]] = {}  # autograd node of a 4-D product -> its operands
        self._weights: dict[Any, tuple[Tensor, Tensor] | None] = {}  # autograd node of a softmax -> queries and keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        derived = any(a.requires_grad or id(a) in self._derived for a in flat((args, kwargs)))
        if derived and name in DECISIONS:
            raise SurgeryError(
                f"{self.stack[-1] or type(self.model).__name__}: Tensor.{name} makes the computation depend on the "
                "values of activations, "
                f"which no graph can follow; {MASKS_ONLY}"
            )
        if func is F.scaled_dot_product_attention:
            bound = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])][:3]
            return self._attend(bound, func(*args, **kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and derived and not result.requires_grad:
            self._derived[id(result)] = result
        if isinstance(result, Tensor) and result.grad_fn is not None and (func in JOINS or func in RESHAPES):
            self._note_shape(func, args, kwargs, result)
        if isinstance(result, Tensor) and result.dim() == 4 and result.grad_fn is not None:
            if func in SOFTMAXES:
                self._weights[result.grad_fn] = self._operands_behind(args[0] if args else kwargs["input"])
            elif func in PRODUCTS:
                return self._product(args, result)
        return result

    def _note_shape(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        given = args[0] if args else kwargs.get("input", kwargs.get("tensors"))
        if func in JOINS:
            dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            # an empty cache may have a single dimension
            sizes = [t.shape[dimension] if t.dim() == result.dim() else 0 for t in given]
            self.joins[result.grad_fn] = (dimension % result.dim(), result.dim(), sizes)
        elif given.dim() > 2 and result.dim() == 2 and given.shape[0] == result.shape[0]:
            self.folds[result.grad_fn] = (result.shape[1] // given.shape[1], False)
        elif given.dim() == 2 and result.dim() > 2 and given.shape[0] == result.shape[0]:
            self.folds[result.grad_fn] = (given.shape[1] // result.shape[1], True)

    def _operands_behind(self, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        found, _ = walk(scores, self._products)
        return self._products[found[0]] if len(found) == 1 else None

    def _product(self, args: Any, result: Tensor) -> Tensor:
        """A product of which the left side is attention weights is attention's output."""
        found, _ = walk(args[0], {**self._weights, **self._products, **self.made_by})
        behind = self._weights.get(found[0]) if len(found) == 1 else None
        if behind is not None:
            return self._attend([behind[0], behind[1], args[1]], result)
        self._products[result.grad_fn] = (args[0], args[1])
        return result

    def _attend(self, tensors: list[Tensor], output: Tensor) -> Tensor:
        """Put a leaf in the place of attention's output and remember which linear layers fed it."""
        producers = [self.behind(tensor) for tensor in tensors]
        self.roots += {id(made): made for found in producers for made in found.values()}.values()
        self.roots += [
            tensor for tensor, found in zip(tensors, producers, strict=True) if tensor.requires_grad and not found
        ]
        stand = output.detach().requires_grad_()
        self.attentions.append(Attention(self.stack[-1], tensors, stand, producers))
        return stand

    def behind(self, tensor: Tensor) -> dict[str, Tensor]:
        """The layers whose outputs a tensor of any shape was made of, without another product in between, and these
        outputs."""
        return {self.made_by[node]: self.outputs[node] for node in walk(tensor, self.made_by)[0]}

    def _enter(self, path: str, inputs: tuple[Any, ...], linear: bool) -> None:
        self.stack.append(path)
        self.reached.add(path)
        if not linear or not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].requires_grad:
            return
        if not isinstance(self.model.get_submodule(path), Conv):
            self.inputs[path] = inputs[0]
        if self.attentions:
            _, leaves = walk(inputs[0], self.made_by)
            for attention in self.attentions:
                if any(leaf is attention.output for leaf in leaves):
                    attention.consumers[path] = inputs[0]

    def _leave(self, path: str, output: Any, linear: bool) -> None:
        self.stack.pop()
        if linear and isinstance(output, Tensor) and output.grad_fn is not None:
            self.made_by[output.grad_fn] = path
            self.outputs[output.grad_fn] = output

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        """The mode and the hooks, for one forward pass."""
        with ExitStack() as undo:
            for path, module in self.model.named_modules():
                linear = isinstance(module, nn.Linear | Conv | Conv1D)
                enter = module.register_forward_pre_hook(lambda _, inputs, p=path, w=linear: self._enter(p, inputs, w))
                leave = module.register_forward_hook(lambda _, __, output, p=path, w=linear: self._leave(p, output, w))
                undo.callback(enter.remove)
                undo.callback(leave.remove)
            undo.enter_context(self)
            yield self


def walk(tensor: Tensor, stops: Any) -> tuple[list[Any], list[Tensor]]:
    """The first nodes of `stops` behind a tensor of any shape in the autograd graph, and the leaves reached without
    passing one, or any other product.
    """
    if tensor.grad_fn is None:
        return [], [tensor] if tensor.requires_grad else []
    return walk_node(tensor.grad_fn, stops)


def walk_node(start: Any, stops: Any) -> tuple[list[Any], list[Tensor]]:
    """`walk` from a node of the autograd graph, itself included."""
    found: list[Any] = []
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            found.append(node)
        elif hasattr(node, "variable"):  # an autograd leaf; the nodes have no common class to test for
            leaves.append(node.variable)
        elif node.name() not in BARRIERS:
            stack.extend(following for following, _ in node.next_functions)
    return found, leaves
