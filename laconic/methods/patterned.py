"""What pruning methods of single matrices share: a share of zeros and a pattern."""

from dataclasses import dataclass

from laconic.errors import SchemeError
from laconic.methods.base import Method, Pruning
from laconic.model.sites import Site
from laconic.weights import Dense, Sparse
from laconic.weights.masks import Pattern, density_of, expected_mask_bits, n_of_m


@dataclass(frozen=True, repr=False)
class Patterned(Pruning):
    """Keeps the share 1 - `sparsity` of the entries in a pattern; survivors in bfloat16."""

    sparsity: float = 0.5
    pattern: Pattern = "unstructured"

    def __post_init__(self) -> None:
        check_sparsity(self, self.sparsity)

    @property
    def density(self) -> float:
        """The share of entries that survive."""
        return density_of(self.pattern, self.sparsity)

    def survivors(self, shape: tuple[int, int]) -> float:
        return self.density

    def mask_bits(self, shape: tuple[int, int]) -> float:
        return expected_mask_bits(shape, self.pattern, self.sparsity)


def check_sparsity(method: Method, sparsity: float) -> None:
    """Raises SchemeError unless the sparsity is a share of zeros."""
    if not (isinstance(sparsity, int | float) and 0 <= sparsity < 1):
        raise SchemeError(
            f"{type(method).__name__}: sparsity is the share of zeros, at least 0 and below 1, got {sparsity!r}"
        )


def sparse(site: Site, pattern: Pattern, sparsity: float, dtype: str | None = None) -> Sparse:
    """A sparse weight with plain values for a site, all of them kept; an n:m pattern says its own sparsity."""
    values = Dense((site.W.shape[0], site.W.shape[1]), dtype=dtype or site.values_dtype)
    return Sparse(values, pattern=pattern, sparsity=0.5 if n_of_m(pattern) else sparsity).to(site.W.device)
