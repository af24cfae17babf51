"""Any method in a rotated basis."""

from dataclasses import dataclass, replace

from torch import Tensor

from laconic.errors import SchemeError
from laconic.methods.allocation import Allocation
from laconic.methods.base import Method
from laconic.model.sites import Site, Stats
from laconic.weights import Rotated, Weight
from laconic.weights.rotated import hadamard, random_signs, rotate_columns


@dataclass(frozen=True, repr=False)
class Hadamard(Method):
    """Runs `method` on S_o H W H S_i, whose entries look Gaussian whatever W's outliers, and turns the result back when
    it is decoded.

    H is the orthonormal Hadamard matrix (times a Hartley transform for the odd part of a size), S random signs; the
    Hessian turns along: H S_i C S_i H. `inputs` and `outputs` choose the sides. Bits: those of the method + one per row
    and column. Decoding costs O(log n) more.
    Source: Tseng et al. 2024 (QuIP#) section 3; Ashkboos et al. 2024 (QuaRot). Cost: O(entries log n).
    """

    method: Method
    inputs: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        if self.method.wants & (
            Stats.SQUARES | Stats.MEAN | Stats.MAX | Stats.CENTRE | Stats.USES | Stats.FISHER | Stats.CHANNELS
        ):
            raise SchemeError(
                f"Hadamard: {self.method!r} weighs single entries, rows or columns, and their weights are not known in "
                "a rotated basis"
            )
        if self.method.rounds is not None:
            raise SchemeError(f"Hadamard: {self.method!r} rounds inputs, which are not turned; it has to come last")

    @property
    def wants(self) -> Stats:
        return self.method.wants

    def expected_bits(self, shape: tuple[int, int]) -> float:
        return self.method.expected_bits(shape) + self.outputs * shape[0] + self.inputs * shape[1]

    def allocation(self) -> Allocation | None:
        inner = self.method.allocation()
        return _Turned(self, inner) if inner is not None else None

    def __call__(self, site: Site) -> Weight:
        turned, row_signs, column_signs = self._turned(site)
        return Rotated(self.method(turned), row_signs=row_signs, column_signs=column_signs)

    def _turned(self, site: Site) -> tuple[Site, Tensor | None, Tensor | None]:
        """The site in the rotated basis, and the signs that make it; what is known per row becomes its mean."""
        generator = site.generator()
        out, columns = site.W.shape
        row_signs = random_signs(out, generator) if self.outputs and site.groups == 1 else None
        column_signs = random_signs(columns, generator) if self.inputs else None
        W = rotate_columns(site.W.float(), column_signs)
        if row_signs is not None:
            W = rotate_columns(W.t(), row_signs).t().contiguous()
        output = (
            site.output_fisher.mean().expand(out)
            if site.output_fisher is not None and row_signs is not None
            else site.output_fisher
        )
        turned = site.having(W=W, squares=None, fisher=None, mask=None, output_fisher=output)
        if site.hessian is not None and column_signs is not None:
            signs = column_signs.to(site.hessian)
            left = hadamard(site.hessian * signs)
            turned = turned.having(hessian=hadamard(left.transpose(1, 2) * signs))
        return turned, row_signs, column_signs


@dataclass
class _Turned(Allocation):
    """The inner method's allocation, which sees every site in its rotated basis."""

    whole: Hadamard
    inner: Allocation

    def __post_init__(self) -> None:
        self.wants = self.inner.wants

    def observe(self, site: Site) -> None:
        self.inner.observe(self.whole._turned(site)[0])

    def resolve(self) -> dict[str, Method]:
        return {name: replace(self.whole, method=method) for name, method in self.inner.resolve().items()}
