"""A method: frozen hyper-parameters and a call from a site to a weight; `>>` and `+` compose methods."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from laconic.errors import LaconicError, SchemeError
from laconic.methods.allocation import Allocation, composed
from laconic.methods.arguments import check_types
from laconic.methods.free import free_within
from laconic.model.sites import NONE, Site, Stats
from laconic.weights import EntryWeight, Inputs, Sparse, Sum, Weight
from laconic.weights.relax import Relaxation, StraightThrough


def _skipped(check: Callable[..., None]) -> Callable[..., None]:
    """A check of hyper-parameters that waits until all of them have values, and names one whose type it cannot do
    with."""

    @functools.wraps(check)
    def guarded(self: "Method") -> None:
        if free_within(self):
            return
        try:
            check(self)
        except LaconicError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError):
            check_types("scheme", self)
            raise

    return guarded


def _refused(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A computation that needs a value for every hyper-parameter."""

    @functools.wraps(compute)
    def guarded(self: "Method", *arguments: Any, **named: Any) -> Any:
        for parameter, _ in free_within(self):
            raise SchemeError(f"{self!r}: {parameter} is still free: search for it with lc.search, or give a number")
        return compute(self, *arguments, **named)

    return guarded


_GUARDS = {
    "__post_init__": _skipped,
    "__call__": _refused,
    "together": _refused,
    "expected_bits": _refused,
    "allocation": _refused,
}


class Method(ABC):
    """Chooses the point of a set of weights for one site: `method(site) -> Weight`.

    A method is a frozen dataclass of its hyper-parameters; it may not change the site's tensors, and takes randomness
    from `site.generator()` only. `needs` names the statistics it reads; empty means that it works without data. Any
    hyper-parameter may be a `Free`, to be found by a search; until it has a value nothing is checked and nothing can be
    computed.
    """

    needs: ClassVar[Stats] = NONE

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        for name, guard in _GUARDS.items():
            if name in vars(cls):
                setattr(cls, name, guard(vars(cls)[name]))

    @abstractmethod
    def __call__(self, site: Site) -> Weight:
        """The weight that stands for `site.W`."""

    @abstractmethod
    def expected_bits(self, shape: tuple[int, int]) -> float:
        """Bits the weight of an [out, in] matrix will take: exact where the format decides, an estimate where the
        values do.

        Raises: SchemeError when the method cannot treat a matrix of this shape. Nothing is computed, so a plan can be
        checked beforehand.
        """

    def inner_shapes(self, parameter: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """The shapes of the matrices that the method in a hyper-parameter is given when this one treats an [out, in]
        matrix."""
        return [shape]

    @property
    def wants(self) -> Stats:
        """The statistics this configuration reads; `needs` unless a hyper-parameter says otherwise."""
        return self.needs

    @property
    def joint(self) -> bool:
        """Whether sites that read one input are to be treated together, which keeps all of them in memory at a time."""
        return False

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        """The weights of sites that read one input, in their order; each is found alone unless the method is
        `joint`."""
        return [self(site) for site in sites]

    @property
    def biased(self) -> bool:
        """Whether its weights ask the layer to add to its outputs, which a part of another weight cannot do."""
        return False

    @property
    def rounds(self) -> Inputs | None:
        """How its weights ask the layer to round its inputs (without a static range, which is not known yet); None if
        they do not."""
        return None

    @property
    def scales_columns(self) -> bool:
        """Whether its weights have a column scale, by which inputs are multiplied before they are rounded."""
        return False

    @property
    def soft(self) -> bool:
        """Whether training is what the method is for, through a soft form of its weight (`relax`)."""
        return False

    def relax(self, weight: Weight, W: Tensor) -> Relaxation:
        """What stands in the place of W [out, in] while it is trained towards a weight this method made of it: straight
        through, unless it is `soft`."""
        return StraightThrough(weight)

    def allocation(self) -> Allocation | None:
        """How this method spreads one number (a global sparsity, a byte budget) over many sites, or None if each site
        stands alone."""
        return None

    def __rshift__(self, other: "Method") -> "Method":
        """Then: `other` encodes what this method leaves (the surviving entries of a sparse weight)."""
        return Then(self, other)

    def __add__(self, other: "Method") -> "Method":
        """Plus: `other` encodes what this method leaves over, W - W_hat; the weight is the sum."""
        return Plus(self, other)

    def __repr__(self) -> str:
        """The expression that makes this method: its first hyper-parameter, and the others that are not the
        defaults."""
        known = fields(self)  # type: ignore[arg-type]
        given = [
            f
            for f in known
            if f.default is MISSING
            or getattr(self, f.name) != f.default
            or (f is known[0] and f.default not in (None, ""))
        ]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


class Pruning(Method):
    """A method that sets entries to zero and stores the others, which `>>` can encode anew."""

    kept: ClassVar[int] = 16
    """Bits of a surviving entry that nothing encodes anew."""

    @abstractmethod
    def survivors(self, shape: tuple[int, int]) -> float:
        """The share of a matrix's entries that is kept (about, where a threshold over the network decides)."""

    @abstractmethod
    def mask_bits(self, shape: tuple[int, int]) -> float:
        """Bits that say which entries these are. Raises: SchemeError as `expected_bits` does."""

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return self.kept * self.survivors(shape) * shape[0] * shape[1] + self.mask_bits(shape)


def check_parts(whole: Method, *parts: Method) -> None:
    """Raises SchemeError where a part of a composition is no method, as `Keep()` is none."""
    for part in parts:
        if not isinstance(part, Method):
            raise SchemeError(f"{whole!r}: {part!r} is no method and cannot be part of a composition")


def check_unbiased(whole: Method, *parts: Method) -> None:
    """Raises SchemeError where a part of a composition asks its layer to add to its outputs."""
    for part in parts:
        if part.biased:
            raise SchemeError(
                f"{whole!r}: {part!r} adds a bias to the layer's outputs and cannot be a part; LowRank and EoRA "
                "add none"
            )


def check_last(method: Method) -> None:
    """Raises SchemeError where a method within another rounds inputs, and what comes after it would forget that."""
    values = [getattr(method, f.name) for f in fields(method)]  # type: ignore[arg-type]
    parts = [value for value in values if isinstance(value, Method)]
    for part in parts:
        if part.rounds is not None and (part is not parts[-1] or method.rounds is None):
            raise SchemeError(f"{method!r}: {part!r} rounds inputs, which would be forgotten: it has to come last")
        check_last(part)


@dataclass(frozen=True, repr=False)
class Then(Method):
    """first >> second: `second` encodes the entries that `first` keeps; of a `first` that prunes nothing, it re-encodes
    the result.

    The second method sees the values the first one chose and, as `site.mask`, which entries survive; error feedback
    respects the mask. Source: Condensa section 3.1 (composition of operators).
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        check_parts(self, self.first, self.second)
        check_unbiased(self, self.first)
        if self._pruning() is not None and getattr(self.second, "rate", None) is not None:
            raise SchemeError(
                f"{self!r}: a rate counts every entry, but only the survivors of {self.first!r} are stored; give "
                f"{type(self.second).__name__} bits"
            )
        if self._pruning() is not None and self.second.joint:
            raise SchemeError(
                f"{self!r}: {self.second!r} scales whole columns, which a sparse weight of single surviving "
                "entries has no place for"
            )

    def _pruning(self) -> Pruning | None:
        """The method at the head of the chain, if it prunes."""
        head = self.first
        while isinstance(head, Then):
            head = head.first
        return head if isinstance(head, Pruning) else None

    @property
    def wants(self) -> Stats:
        return self.first.wants | self.second.wants

    @property
    def joint(self) -> bool:
        return self.first.joint or self.second.joint

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        if not self.joint:
            return super().together(sites)
        firsts = self.first.together([site.having(values_dtype="float32") for site in sites])
        return self.second.together(
            [site.having(W=self._values(site, first)) for site, first in zip(sites, firsts, strict=True)]
        )

    def __call__(self, site: Site) -> Weight:
        first = self.first(site.having(values_dtype="float32"))
        W = self._values(site, first)
        if not isinstance(first, Sparse):
            return self.second(site.having(W=W))
        values = self.second(site.having(W=W, mask=first.mask))
        if not isinstance(values, EntryWeight):
            raise SchemeError(
                f"{site.name}: {self.second} makes a {type(values).__name__}, which cannot store single surviving "
                "entries"
            )
        sparse = Sparse(values, pattern=first.pattern, sparsity=first.sparsity)
        sparse.set_mask(first.mask)
        sparse.inputs, values.inputs = values.inputs, None  # of the whole weight, not of its survivors
        return sparse

    def _values(self, site: Site, first: Weight) -> Tensor:
        if first.inputs is not None:
            raise SchemeError(
                f"{site.name}: {self.first!r} rounds inputs, which {self.second!r} would forget: it has to come last"
            )
        return first.forward().detach().to(site.W)

    @property
    def soft(self) -> bool:
        return self.second.soft

    @property
    def biased(self) -> bool:
        return self.second.biased

    @property
    def rounds(self) -> Inputs | None:
        return self.second.rounds

    @property
    def scales_columns(self) -> bool:
        return self.second.scales_columns

    def relax(self, weight: Weight, W: Tensor) -> Relaxation:
        return self.second.relax(weight, W)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        self.first.expected_bits(shape)  # which checks that the first method can treat the shape
        head, bits = self._pruning(), self.second.expected_bits(shape)
        return bits if head is None else head.mask_bits(shape) + head.survivors(shape) * bits

    def allocation(self) -> Allocation | None:
        return composed(type(self), self.first, self.second)

    def __repr__(self) -> str:
        second = f"({self.second!r})" if isinstance(self.second, Then) else repr(self.second)
        return f"{self.first!r} >> {second}"


@dataclass(frozen=True, repr=False)
class Plus(Method):
    """first + second: the weight is their sum, `second` encoding the residual W - W_hat of `first` under the same
    statistics.

    Source: EoRA (Liu et al. 2024) section 3 for a low-rank second term; any two methods compose.
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        check_parts(self, self.first, self.second)
        check_unbiased(self, self.first, self.second)

    @property
    def wants(self) -> Stats:
        return self.first.wants | self.second.wants

    @property
    def joint(self) -> bool:
        return self.first.joint or self.second.joint

    def together(self, sites: Sequence[Site]) -> list[Weight]:
        firsts = self.first.together(sites)
        residuals = [
            site.having(W=site.W - first.forward().detach().to(site.W))
            for site, first in zip(sites, firsts, strict=True)
        ]
        return [Sum(*terms) for terms in zip(firsts, self.second.together(residuals), strict=True)]

    def __call__(self, site: Site) -> Weight:
        return self.together([site])[0]

    def relax(self, weight: Weight, W: Tensor) -> Relaxation:
        if self.first.soft or self.second.soft:
            raise SchemeError(f"{self!r}: a clustering cannot be trained as a term of a sum; use KMeans there")
        return super().relax(weight, W)

    def allocation(self) -> Allocation | None:
        return composed(type(self), self.first, self.second)

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return self.first.expected_bits(shape) + self.second.expected_bits(shape)

    def __repr__(self) -> str:
        first = f"({self.first!r})" if isinstance(self.first, Then) else repr(self.first)
        second = f"({self.second!r})" if isinstance(self.second, Then | Plus) else repr(self.second)
        return f"{first} + {second}"
