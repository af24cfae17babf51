"""What every weight is: a stored Theta, its decoder D, the projection C onto its set, and its exact size in bits."""

from abc import ABC, abstractmethod
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.inputs import Inputs, asks_inputs, inputs_of

Spec = dict[str, Any]
"""The JSON half of a packed weight: its kind and everything that is needed to read its tensors back."""


class Weight(nn.Module, ABC):
    """A point of a set of matrices W [out, in] that take few bits.

    `forward()` decodes (D), `right_inverse(W)` projects W onto the set and keeps the side information (scales, tables, masks): the C of
    "minimise L(w) subject to w = D(Theta)". The two names are those of `torch.nn.utils.parametrize`, with which a Weight is installed.
    Float state is held as parameters with `requires_grad=False`, so a recovery method only has to switch on what it trains.
    `inputs`, which a method sets on the weight it returns, asks that the layer's inputs are rounded too, whenever it runs
    (`weights.demands`); like `output_bias` it belongs to the whole weight, never to a part of one.

    Source: Carreira-Perpinan 2017, "Model compression as constrained optimization", eq. 1; Condensa section 3.
    """

    kind: str
    shape: tuple[int, int]
    inputs: Inputs | None = None

    @abstractmethod
    def forward(self) -> Tensor:
        """The decoded matrix [out, in], differentiable in every float parameter."""

    def rows(self, start: int, stop: int) -> Tensor:
        """The decoded rows start : stop, for matrices too large to decode at once."""
        return self.forward()[start:stop]

    def output_bias(self) -> Tensor | None:
        """What the layer is to add to its outputs [out] beside a bias of its own; None for nothing."""
        return None

    @abstractmethod
    def right_inverse(self, W: Tensor) -> tuple[()]:
        """Move to the point of the set nearest to W [out, in] that the side information allows; nothing is returned."""

    @abstractmethod
    def bits(self) -> int:
        """Exactly 8 x the bytes of the tensors that `pack` returns."""

    @abstractmethod
    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        """The canonical form: a JSON spec with its `kind`, and named tensors whose bytes are the stored bytes."""

    @classmethod
    @abstractmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor]) -> Self:
        """The inverse of `pack`, bit for bit. Raises: CheckpointError when spec and tensors disagree."""

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}"


class ColumnWeight(Weight):
    """A Weight whose columns can be chosen one unit after the other, which is all that the column solver needs.

    `columns` input columns are rounded together (the dimension of a vector codebook); `span` columns share side information that can be
    fitted when a sweep reaches them (a group's scale, a block's mask), or None when nothing is left to fit.
    """

    columns: int = 1
    span: int | None = None

    @abstractmethod
    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Fit the side information of columns j : j + k to w [out, k], column (or entry) errors weighted by `importance`."""

    @abstractmethod
    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        """The admissible values nearest to w [out, columns] for columns j : j + columns; ||(w - q) metric|| decides for columns > 1."""


class EntryWeight(ColumnWeight):
    """A ColumnWeight that stores a code per entry, so a sparse weight can store the codes of its surviving entries only.

    `keep` (bool [out, in], default all) says which entries are stored; the others decode to anything.
    """

    @abstractmethod
    def bits(self, keep: Tensor | None = None) -> int: ...

    @abstractmethod
    def pack(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]: ...

    @classmethod
    @abstractmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Self: ...


def check_parts(weight: Weight) -> None:
    """Raises SchemeError for `inputs` that are no Inputs, and for what a part of the weight asks of a layer: nobody would heed it."""
    if not isinstance(weight.inputs, Inputs | None):
        raise SchemeError(f"{weight.kind}: inputs should be an Inputs or None, got {weight.inputs!r}")
    for part in weight.modules():
        if not isinstance(part, Weight) or part is weight:
            continue
        if part.inputs is not None:
            raise SchemeError(
                f"a {part.kind} weight that rounds inputs inside a {weight.kind} one; a method that rounds inputs has to come last"
            )
        if part.output_bias() is not None:
            raise SchemeError(
                f"a {part.kind} weight with an output bias inside a {weight.kind} one; its method cannot be part of another"
            )


def pack(weight: Weight) -> tuple[Spec, dict[str, Tensor]]:
    """A whole weight in canonical form, `inputs` included; `unpack` is the inverse. Raises: SchemeError as `check_parts`."""
    check_parts(weight)
    spec, tensors = weight.pack()
    return (spec if weight.inputs is None else spec | weight.inputs.to_spec()), tensors


@overload
def unpack(spec: Spec, tensors: dict[str, Tensor]) -> Weight: ...


@overload
def unpack(spec: Spec, tensors: dict[str, Tensor], keep: Tensor) -> EntryWeight: ...


def unpack(spec: Spec, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Weight:
    """The packed weight of any kind; with `keep`, of a kind that stores a code per entry. Raises: CheckpointError for anything else."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    todo: list[Any] = [Weight]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if getattr(cls, "kind", None) == kind and kind is not None:
            if keep is not None and not issubclass(cls, EntryWeight):
                raise CheckpointError(f"the values of a sparse weight cannot be of kind {kind!r}")
            weight: Weight = cls.unpack(spec, tensors) if keep is None else cls.unpack(spec, tensors, keep)
            weight.inputs = inputs_of(spec)
            return weight
    raise CheckpointError(f"unknown kind of weight {kind!r}; this file needs a newer laconic, or is damaged")


def asks_its_layer(spec: Spec) -> bool:
    """Whether a packed weight asks something of its layer beside its matrix: to round inputs, to add to outputs."""
    return asks_inputs(spec) or "bias" in spec


def shape_of(spec: Spec) -> tuple[int, int]:
    """The [out, in] of a spec. Raises: CheckpointError unless it is two positive integers."""
    shape = spec.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in shape)):
        raise CheckpointError(f"{spec.get('kind')}: shape must be two positive integers, got {shape!r}")
    return shape[0], shape[1]


def parameter(x: Tensor) -> nn.Parameter:
    """A float state: trainable on request, frozen by default."""
    return nn.Parameter(x.detach().clone(), requires_grad=False)


def check_matrix(W: Tensor, shape: tuple[int, int], kind: str) -> None:
    """Raises SchemeError unless W has this weight's shape."""
    if tuple(W.shape) != tuple(shape):
        raise SchemeError(f"{kind}: expected a matrix of shape {tuple(shape)}, got {tuple(W.shape)}")


def expect(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> Tensor:
    """The stored tensor `name`, or CheckpointError when it is absent or not of exactly this type and shape."""
    if name not in tensors:
        raise CheckpointError(f"{kind}: expected a stored tensor {name!r}, found {sorted(tensors)}")
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise CheckpointError(f"{kind}: stored tensor {name!r} should be {dtype} {tuple(shape)}, but is {found}")
    return tensor


def nested(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below `name.`, with that prefix removed: what a part of this weight packed."""
    prefix = name + "."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def prefixed(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, named below `name.`."""
    return {f"{name}.{key}": value for key, value in tensors.items()}
