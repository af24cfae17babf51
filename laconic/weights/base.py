"""What every weight is: a stored Theta, its decoder D, the projection C onto its set, and its exact size in bits."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn

from laconic.errors import CheckpointError, SchemeError
from laconic.weights.forms import Grid, Table
from laconic.weights.inputs import Inputs, asks_inputs, inputs_of
from laconic.weights.spec import Spec, expect, nested, prefixed, shape_of

BIAS = "bias"
"""The name of a part [1, out] that is no part of the matrix: it is what the layer is to add to its outputs."""
COLUMN_SCALE = "column_scale"
"""The name of a part [1, in] that the columns of the rest are multiplied by: where a weight rounds its layer's inputs,
they are multiplied by it first, so that they meet the rest as it is stored."""


def _classes() -> "list[type[Weight]]":
    """Weight and every class below it, those of one base in the order of their definitions."""
    found: list[Any] = [Weight]
    for cls in found:
        found += cls.__subclasses__()
    return found


class Weight(nn.Module, ABC):
    """A point of a set of matrices W [out, in] that take few bits.

    `forward()` decodes (D), `right_inverse(W)` projects W onto the set and keeps the side information (scales, tables,
    masks): the C of "minimise L(w) subject to w = D(Theta)". The two names are those of `torch.nn.utils.parametrize`,
    with which a Weight is installed. Float state is held as parameters with `requires_grad=False`, so a recovery method
    only has to switch on what it trains. `inputs`, which a method sets on the weight it returns, asks that the layer's
    inputs are rounded too, whenever it runs (`weights.demands`); like `output_bias` it belongs to the whole weight,
    never to a part of one.

    A weight is made of `parts()`, weights too, and of tensors of its `own()`. Size, canonical form, checks of a stored
    spec, and words are walks over parts, written once. A class whose parts are attributes names them in `part_names`;
    one that takes its parts by these names and stores nothing beside them needs no more than `forward` and
    `right_inverse`.

    Source: Carreira-Perpinan 2017, "Model compression as constrained optimization", eq. 1; Condensa section 3.
    """

    kind: str
    shape: tuple[int, int]
    inputs: Inputs | None = None
    part_names: ClassVar[tuple[str, ...]] = ()
    """The attributes that are parts, under which their tensors are stored; None where one is absent."""
    side_names: ClassVar[tuple[str, ...]] = ()
    """Those of the parts that are side information (scales, zeros, tables), which `words` passes over."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The decoded matrix [out, in], differentiable in every float parameter."""

    def rows(self, start: int, stop: int) -> Tensor:
        """The decoded rows start : stop [stop - start, in], for matrices too large to decode at once."""
        return self.forward()[start:stop]

    @abstractmethod
    def right_inverse(self, W: Tensor) -> tuple[()]:
        """Move to the point of the set nearest to W [out, in] that the side information allows; nothing is returned."""

    def parts(self) -> dict[str, "Weight"]:
        """The weights this one is made of, by the names under which their tensors are stored."""
        found = {name: getattr(self, name) for name in self.part_names}
        return {name: part for name, part in found.items() if part is not None}

    def output_bias(self) -> Tensor | None:
        """What the layer is to add to its outputs [out] beside a bias of its own; None for nothing."""
        bias = self.parts().get(BIAS)
        return None if bias is None else bias.forward().flatten()

    def grid_form(self) -> Grid | None:
        """What `forms.as_grid` compares with this weight, if there is anything; equality is not promised."""
        return None

    def table_form(self) -> Table | None:
        """What `forms.as_table` compares with this weight, if there is anything; equality is not promised."""
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        """Raises SchemeError for a kind that another class has: stored weights could be read by either."""
        super().__init_subclass__(**options)
        for other in _classes() if "kind" in vars(cls) else ():
            kind, again = cls.kind, (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if vars(other).get("kind") == kind and not again:
                del cls.kind  # a traceback keeps the class alive, and it must not be found
                raise SchemeError(f"{cls.__qualname__}: the kind {kind!r} is that of {other.__qualname__}")

    # --------------------------------------------------------------------------------------------------- what is stored
    def own(self) -> tuple[Spec, dict[str, Tensor]]:
        """What is stored beside the parts: fields of the spec, and tensors in canonical form (on the CPU) by name."""
        return {}, {}

    def own_bits(self) -> int:
        """8 x the bytes of the tensors of `own`."""
        return 8 * sum(tensor.nbytes for tensor in self.own()[1].values())

    def part_bits(self, name: str, part: "Weight") -> int:
        """The bits that a part takes in this weight."""
        return part.bits()

    def pack_part(self, name: str, part: "Weight") -> tuple[Spec, dict[str, Tensor]]:
        """A part as it is stored in this weight."""
        return part.pack()

    def bits(self) -> int:
        """Exactly 8 x the bytes of the tensors that `pack` returns."""
        return self.own_bits() + sum(self.part_bits(name, part) for name, part in self.parts().items())

    def nonzero_bits(self) -> int:
        """Stored bits of the values that are not zero: plain values and what survives a mask are counted, codes and
        their scales in full."""
        return self.own_bits() + sum(part.nonzero_bits() for part in self.parts().values())

    def pack(self) -> tuple[Spec, dict[str, Tensor]]:
        """The canonical form: a JSON spec with its `kind`, and named tensors whose bytes are the stored bytes."""
        return _packed(self, *self.own())

    # ----------------------------------------------------------------------------------------------------- what is read
    @classmethod
    def parts_in(cls, spec: Spec) -> dict[str, Any]:
        """The specs of the parts, by the names of `parts`. A spec may be damaged: what stands in it may be anything."""
        return {name: spec[name] for name in cls.part_names if name in spec}

    @classmethod
    def with_parts(cls, specs: dict[str, Spec]) -> Spec:
        """The inverse of `parts_in`: the fields of a spec in which the specs of its parts stand."""
        return specs

    @classmethod
    def tensors_in(cls, spec: Spec) -> tuple[str, ...]:
        """The names of the tensors of `own` that a spec asks for. Raises: CheckpointError for a spec that nothing may
        be read by."""
        return ()

    @classmethod
    def read(cls, packed: "Packed") -> Self:
        """The weight with the given spec, tensors and parts; by default the class called with its parts.

        Raises: CheckpointError, SchemeError, KeyError, TypeError, ValueError or IndexError where they do not fit
        together.
        """
        return cls(**packed.all_parts())

    @classmethod
    def unpack(cls, spec: Spec, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Self:
        """The inverse of `pack`, bit for bit. Raises: CheckpointError when spec and tensors disagree."""
        packed = Packed(spec, tensors, shape=shape_of(spec), parts=cls.parts_in(spec), keep=keep)
        try:
            weight = cls.read(packed)
        except (KeyError, TypeError, ValueError, IndexError, SchemeError) as error:
            raise CheckpointError(f"{cls.kind}: the spec is damaged: {error}") from error
        if weight.shape != packed.shape:
            raise CheckpointError(f"{cls.kind}: a weight of shape {weight.shape}, the spec says {packed.shape}")
        return weight

    # ---------------------------------------------------------------------------------------------------- what is shown
    def words(self) -> str:
        """The weight's structure in words, such as "sum(uniform, sparse(dense))"."""
        return in_words(type(self), {name: part.words() for name, part in self.parts().items()}, self.inputs)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}"


class ColumnWeight(Weight):
    """A Weight whose columns can be chosen one unit after the other, which is all that the column solver needs.

    `columns` input columns are rounded together (the dimension of a vector codebook); `span` columns share side
    information that can be fitted when a sweep reaches them (a group's scale, a block's mask), or None when nothing is
    left to fit.
    """

    columns: int = 1
    span: int | None = None

    @abstractmethod
    def fit(self, w: Tensor, j: int = 0, importance: Tensor | None = None) -> None:
        """Fit the side information of columns j : j + k to w [out, k], errors weighted by `importance` ([1, k] or [out,
        k])."""

    @abstractmethod
    def nearest(self, w: Tensor, j: int, metric: Tensor | None = None) -> Tensor:
        """The admissible values nearest to w [out, columns] for columns j : j + columns.

        ||(w - q) metric|| decides for columns > 1, metric [columns, columns].
        """


class EntryWeight(ColumnWeight):
    """A ColumnWeight that stores a code per entry, so a sparse weight can store the codes of its surviving entries
    only.

    `keep` (bool [out, in], default all) says which entries are stored; the others decode to anything.
    """

    @abstractmethod
    def own(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]: ...

    @abstractmethod
    def own_bits(self, keep: Tensor | None = None) -> int: ...

    def bits(self, keep: Tensor | None = None) -> int:
        return self.own_bits(keep) + sum(part.bits() for part in self.parts().values())

    def nonzero_bits(self, keep: Tensor | None = None) -> int:
        """All codes count, and all of the side information."""
        return self.bits(keep)

    def pack(self, keep: Tensor | None = None) -> tuple[Spec, dict[str, Tensor]]:
        return _packed(self, *self.own(keep))


@dataclass(frozen=True)
class Packed:
    """A packed weight while its class reads it; none of it is to be trusted.

    `spec`; `tensors` of the weight and all its parts, by their names within it; `shape` [out, in]; `parts`, their
    specs; `keep` (bool [out, in]), the entries that are stored of a part of a sparse weight, None for all.
    """

    spec: Spec
    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    parts: dict[str, Any]
    keep: Tensor | None = None

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A stored tensor. Raises: CheckpointError when it is absent or not of exactly this type and shape."""
        return expect(self.tensors, name, dtype, shape, self.spec["kind"])

    def part(self, name: str) -> Weight:
        """A part that has to be there. Raises: CheckpointError."""
        return unpack(self._spec_of(name), nested(self.tensors, name))

    def optional(self, name: str) -> Weight | None:
        """A part that may be absent."""
        return self.part(name) if name in self.parts else None

    def all_parts(self) -> dict[str, Weight]:
        """Every part that is there, in order."""
        return {name: self.part(name) for name in self.parts}

    def survivors(self, name: str, mask: Tensor) -> EntryWeight:
        """A part that has to be there and of which only the entries of `mask` (bool [out, in]) are stored. Raises:
        CheckpointError."""
        return unpack(self._spec_of(name), nested(self.tensors, name), mask)

    def _spec_of(self, name: str) -> Any:
        if name not in self.parts:
            raise CheckpointError(f"{self.spec['kind']}: expected a part {name!r}, found {sorted(self.parts)}")
        return self.parts[name]


def _packed(weight: Weight, fields: Spec, tensors: dict[str, Tensor]) -> tuple[Spec, dict[str, Tensor]]:
    """A weight in canonical form: what is its own, then its parts in their order."""
    specs: dict[str, Spec] = {}
    tensors = dict(tensors)
    for name, part in weight.parts().items():
        specs[name], packed = weight.pack_part(name, part)
        tensors |= prefixed(name, packed)
    return {"kind": weight.kind, "shape": list(weight.shape), **fields, **weight.with_parts(specs)}, tensors


def in_words(cls: type[Weight], parts: Mapping[str, str], inputs: Inputs | None) -> str:
    """A weight of class `cls` in words, given those of its parts and how its inputs are rounded."""
    inner = [words for name, words in parts.items() if name != BIAS and name not in cls.side_names]
    words = f"{cls.kind}({', '.join(inner)})" if inner else cls.kind
    if BIAS in parts:
        words += ", bias"
    return words if inputs is None else f"{words}, {inputs}"


def every_part(weight: Weight) -> Iterator[Weight]:
    """The parts of a weight, their parts, and so on."""
    for part in weight.parts().values():
        yield part
        yield from every_part(part)


def check_parts(weight: Weight) -> None:
    """Raises SchemeError for `inputs` that are no Inputs, and for what a part of the weight asks of a layer: nobody
    would heed it."""
    if not isinstance(weight.inputs, Inputs | None):
        raise SchemeError(f"{weight.kind}: inputs should be an Inputs or None, got {weight.inputs!r}")
    for part in every_part(weight):
        if part.inputs is not None:
            raise SchemeError(
                f"a {part.kind} weight that rounds inputs inside a {weight.kind} one; a method that rounds inputs "
                "has to come last"
            )
        if part.output_bias() is not None:
            raise SchemeError(
                f"a {part.kind} weight with an output bias inside a {weight.kind} one; its method cannot be part "
                "of another"
            )


def pack(weight: Weight) -> tuple[Spec, dict[str, Tensor]]:
    """A whole weight in canonical form, `inputs` included; `unpack` is the inverse. Raises: SchemeError as
    `check_parts`."""
    check_parts(weight)
    spec, tensors = weight.pack()
    return (spec if weight.inputs is None else spec | weight.inputs.to_spec()), tensors


@overload
def unpack(spec: Spec, tensors: dict[str, Tensor]) -> Weight: ...


@overload
def unpack(spec: Spec, tensors: dict[str, Tensor], keep: Tensor) -> EntryWeight: ...


def unpack(spec: Spec, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Weight:
    """The packed weight of any kind; with `keep`, of a kind that stores a code per entry. Raises: CheckpointError for
    anything else."""
    cls = class_of(spec)
    if keep is not None and not issubclass(cls, EntryWeight):
        raise CheckpointError(f"the values of a sparse weight cannot be of kind {cls.kind!r}")
    weight = cls.unpack(spec, tensors, keep)
    weight.inputs = inputs_of(spec)
    return weight


def class_of(spec: Any) -> type[Weight]:
    """The class that a spec names by its `kind`, wherever it is defined; one that was defined again, as it is now.

    Raises: CheckpointError for a kind that is not known.
    """
    kind = spec.get("kind") if isinstance(spec, dict) else None
    named = [cls for cls in _classes() if kind is not None and vars(cls).get("kind") == kind]
    if not named:
        told = str(kind)[:40]
        raise CheckpointError(f"unknown kind of weight {told!r}; this file needs a newer laconic, or is damaged")
    return named[-1]


def asks_its_layer(spec: Spec) -> bool:
    """Whether a packed weight asks something of its layer beside its matrix: to round inputs, to add to outputs."""
    return asks_inputs(spec) or BIAS in spec


def parameter(x: Tensor) -> nn.Parameter:
    """A float state of any shape: trainable on request, frozen by default."""
    return nn.Parameter(x.detach().clone(), requires_grad=False)


def check_matrix(W: Tensor, shape: tuple[int, int], kind: str) -> None:
    """Raises SchemeError unless W [out, in] has this weight's shape."""
    if tuple(W.shape) != tuple(shape):
        raise SchemeError(f"{kind}: expected a matrix of shape {tuple(shape)}, got {tuple(W.shape)}")
