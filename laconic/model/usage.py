"""How a parameter is used: where the operand of a product lies in it, and as which matrix the products show it."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laconic.model.products import Dims, Product, products
from laconic.weights import View

T = TypeVar("T")


class Owners(dict[int, list[tuple[T, Tensor]]]):
    """Parameters by their storage: which of them the operand of a product is a part of. Several may share one storage
    (flattened ones).
    """

    def __init__(self, parameters: Iterable[tuple[T, Tensor]]) -> None:
        super().__init__()
        for key, tensor in parameters:
            self.setdefault(tensor.untyped_storage()._cdata, []).append((key, tensor))

    def of(self, w: Tensor) -> tuple[T, Tensor] | None:
        """The parameter that holds every entry of w (any shape), or None."""
        start, stop = _extent(w)
        for key, tensor in self.get(w.untyped_storage()._cdata, ()):
            first, last = _extent(tensor)
            if first <= start and stop <= last:
                return key, tensor
        return None


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the one behind its last."""
    start = int(tensor.storage_offset())
    return start, start + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n)


@dataclass(frozen=True)
class Place:
    """Where the operand of a product lies in a site: as W x (`forward`) or as x W; its row group (None: all of them),
    first row and column.
    """

    forward: bool
    group: int | None = None
    row: int = 0
    column: int = 0


def place_of(product: Product, view: View, groups: int, parameter: Tensor) -> Place | None:
    """Where the operand of a product lies in a parameter of any shape it is a view of; None where that is no part of
    its matrix."""
    if product.kind != "product":
        return Place(True) if product.w.numel() == parameter.numel() else None
    turned = view.turned(parameter)
    if view.lead == 2 and turned.dim() == 3 and groups > 1:
        per_group, (of_group, of_row, of_column) = turned.shape[1], turned.stride()
    else:
        matrix = turned.reshape(view.matrix_shape)
        if matrix.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            return None
        per_group, (of_row, of_column) = view.matrix_shape[0] // groups, matrix.stride()
        of_group = of_row * per_group
    rows, columns = _merged(product.w, product.rows), _merged(product.w, product.columns)
    if rows is None or columns is None:
        return None
    forward = _steps(columns, of_column) and _steps(rows, of_row)
    if not forward and not (_steps(columns, of_row) and _steps(rows, of_column)):
        return None
    offset = int(product.w.storage_offset() - parameter.storage_offset())
    group, rest = divmod(offset, of_group) if groups > 1 else (0, offset)
    row, column = (
        (rest // of_row, rest % of_row // of_column)
        if of_row >= of_column
        else (rest % of_column // of_row, rest // of_column)
    )
    count = math.prod(product.w.shape[i] for i in product.batch)
    if groups in (1, count) or (count == 1 and rows[0] == view.matrix_shape[0]):
        return Place(forward, None, row, column)
    return Place(forward, group, group * per_group + row, column) if count == 1 and rows[0] <= per_group else None


def _merged(w: Tensor, dims: Dims) -> tuple[int, int] | None:
    """The size and stride of some dimensions of w as one, if they are one; the stride of a single entry is 0."""
    sizes = [(w.shape[i], w.stride(i)) for i in dims if w.shape[i] > 1]
    if any(a[1] != b[1] * b[0] for a, b in pairwise(sizes)):
        return None
    return (math.prod(size for size, _ in sizes), sizes[-1][1]) if sizes else (1, 0)


def _steps(found: tuple[int, int], stride: int) -> bool:
    return found[0] == 1 or found[1] == stride


@dataclass(frozen=True)
class Use:
    """A matrix that products show: its view, its row groups, and whether rows of it are looked up."""

    view: View
    groups: int = 1
    looked_up: bool = False


def use_of(product: Product, parameter: Tensor) -> Use | None:
    """The matrix [out, in] of which a product's operand is all, or whole matrices out of several; None where it is
    something else.
    """
    shape, w = tuple(parameter.shape), product.w
    if product.kind != "product":
        whole = w.numel() == parameter.numel() and w.shape == parameter.shape
        return Use(View(shape), product.groups, product.kind == "lookup") if whole else None
    rows, columns = _merged(w, product.rows), _merged(w, product.columns)
    if rows is None or columns is None or not parameter.is_contiguous():
        return None
    n, out, into, total = parameter.dim(), rows[0], columns[0], parameter.numel()
    if _steps(columns, 1) and _steps(rows, into) and total % into == 0:
        per_matrix = shape[-1] == into
        view = View(shape, lead=n - 1) if per_matrix else View(shape, dims=(total // into, into))
        several = n > 2 and per_matrix and total // into != out and (total // into) % out == 0
        return Use(view, total // into // out if several else 1)
    if _steps(rows, 1) and _steps(columns, out) and total % (into * out) == 0:
        groups = total // (into * out)
        if shape[-2:] == (into, out):
            return Use(View(shape, lead=n - 1, transposed=True), groups)
        dims = (into, out) if groups == 1 else (groups, into, out)
        return Use(View(shape, lead=len(dims) - 1, transposed=True, dims=dims), groups)
    return None


class Uses(TorchFunctionMode):
    """Watches a run for products with some parameters, found by their storage; on the meta device too, where data
    decides nothing.

    There the first of everything is taken: of experts that tokens go to, of rows a condition holds for.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._known = Owners(parameters.items())
        self._seen: dict[str, set[Use | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stand_in = _DECISIONS.get(func)
        if (
            stand_in is not None
            and args
            and isinstance(args[0], Tensor)
            and args[0].is_meta
            and len(args) == 1
            and not kwargs
        ):
            return stand_in(args[0])
        if func is Tensor.split and len(args) == 2 and isinstance(args[1], list) and args[0].is_meta:
            whole = args[0].shape[kwargs.get("dim", 0)]
            if sum(args[1]) != whole:  # sizes that the data would decide
                args = (args[0], [whole, *[0] * (len(args[1]) - 1)])
        output = func(*args, **kwargs)
        for product in products(func, args, kwargs):
            owner = self._known.of(product.w)
            if owner is not None:
                name, tensor = owner
                self._seen.setdefault(name, set()).add(use_of(product, tensor))
        return output

    def found(self) -> dict[str, Use]:
        """The parameters that products agree on."""
        return {
            name: use for name, uses in self._seen.items() if len(uses) == 1 and (use := next(iter(uses))) is not None
        }

    def why_not(self) -> dict[str, str]:
        """Why the other parameters that products were seen with are no sites."""
        undecided = {name: uses for name, uses in self._seen.items() if name not in self.found()}
        return {
            name: "multiplied in parts" if len(uses) == 1 else "multiplied in more ways than one"
            for name, uses in undecided.items()
        }


def _first(condition: Tensor) -> Tensor:
    return torch.zeros(1, condition.dim(), dtype=torch.int64, device="cpu")


_DECISIONS: dict[Any, Callable[[Tensor], Any]] = {
    torch.nonzero: _first,
    Tensor.nonzero: _first,
    torch.where: lambda condition: tuple(torch.zeros(condition.dim(), 1, dtype=torch.int64, device="meta")),
    Tensor.item: lambda _: 0,
    Tensor.__bool__: lambda _: False,
    Tensor.__int__: lambda _: 0,
    Tensor.__index__: lambda _: 0,
    Tensor.__float__: lambda _: 0.0,
    Tensor.tolist: lambda t: torch.zeros(t.shape, dtype=torch.int64, device="cpu").tolist(),
}

FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    ImportError,
    ArithmeticError,
)
"""What code of a model raises on inputs that are not what it expects."""


def uses_on_meta(model: nn.Module, names: Iterable[str]) -> Uses:
    """What products of a transformers model show of some parameters: a copy on the meta device is run on inputs of the
    kind it reads.

    Experts of which the class says how they multiply are not run. What the run shows before it fails counts. Cost: the
    modules' own, with no tensor of any size; nothing of the model is changed or copied.
    """
    twin = _on_meta(model)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    uses = Uses({name: parameters[name] for name in names})
    for inputs in _example_inputs(twin):
        with torch.no_grad(), torch.device("meta"), uses:
            try:
                twin(**inputs)
                break
            except FAILURES:
                continue
    return uses


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no values."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        if is_marked(module):
            module.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
    return twin


@contextmanager
def in_sight(model: nn.Module) -> Iterator[None]:
    """A transformers model whose products can be seen inside this context: packed experts run as one product per
    expert.
    """
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    before = [
        (config, config._experts_implementation)
        for config in configs.values()
        if hasattr(config, "_experts_implementation")
    ]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def is_marked(module: nn.Module) -> bool:
    """Whether a module's class says how its packed parameters multiply, as the experts of transformers do."""
    return isinstance(getattr(module, "is_transposed", None), bool)


def _example_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """What a transformers model may be called with: its main input, or everything its signature names of which the kind
    is known.
    """
    known = inspect.signature(model.forward).parameters
    made = {name: tensor for name, tensor in _inputs_by_name(model.config).items() if name in known}
    main = getattr(model, "main_input_name", "input_ids")
    smallest = {name: tensor for name, tensor in made.items() if name == main or name.startswith("decoder_input")}
    return [inputs for inputs in (smallest, made) if inputs]


def _inputs_by_name(config: Any) -> dict[str, Tensor]:
    text, vision = config.get_text_config(), getattr(config, "vision_config", None) or config
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    size, channels = getattr(vision, "image_size", 224), getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    bins = getattr(config, "num_mel_bins", None) or getattr(text, "num_mel_bins", None) or 80
    found = {
        "input_ids": ids, "pixel_values": torch.empty(1, channels, height, width, device="meta"),
        "input_features": torch.empty(1, bins, 2 * getattr(config, "max_source_positions", 1500), device="meta"),
        "input_values": torch.empty(1, 16000, device="meta"),
    }  # fmt: skip
    return found | ({"decoder_input_ids": ids[:, :4]} if getattr(config, "is_encoder_decoder", False) else {})
