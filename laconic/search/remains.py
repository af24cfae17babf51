"""What is left to encode once channels are cut out of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from laconic.disk.state import guard
from laconic.engine.module import compress_module
from laconic.errors import SchemeError
from laconic.methods.base import Method, Pruning, Then
from laconic.methods.patterned import sparse
from laconic.model.batches import Batch
from laconic.model.sites import Site, Slot, Stats, find_slots
from laconic.scheme.keep import Keep
from laconic.scheme.text import Choice
from laconic.weights import Weight, install, installed


@dataclass(frozen=True, repr=False)
class Survivors(Pruning):
    """Keeps the entries that are not zero: what was pruned before stays so, and nothing else is. Source: ours."""

    def survivors(self, shape: tuple[int, int]) -> float:
        return 1.0

    def mask_bits(self, shape: tuple[int, int]) -> float:
        return float(shape[0] * shape[1])

    def __repr__(self) -> str:
        return "Survivors()"

    def __call__(self, site: Site) -> Weight:
        weight = sparse(site, "unstructured", 0.0)
        weight.set_mask(site.W != 0)
        weight.right_inverse(site.W)
        return weight


def after_cut(method: Method) -> Method | None:
    """What of a method is left to do once the channels it cuts are gone; None if nothing is.

    Pruning of single entries is not done again, since of a smaller matrix the same share would be others: the zeros
    there are stay.
    """
    if isinstance(method, Then):
        first = after_cut(method.first)
        return after_cut(method.second) if first is None else Then(first, method.second)
    if method.wants & Stats.CHANNELS:
        return None
    return Survivors() if isinstance(method, Pruning) else method


def encode_remains(
    thinned: nn.Module, compressed: nn.Module, chosen: Mapping[Slot, Method], statistics: Sequence[Batch], seed: int
) -> nn.Module:  # fmt: skip
    """Encode a thinned dense network, in place, as the scheme says after the cut.

    A matrix that lost nothing takes the weight it was trained as; the others are encoded anew, from the values they
    were trained to.
    Raises: SchemeError when a method cannot treat the size that is left.
    """
    slots, trained = {slot.name: slot for slot in find_slots(thinned)}, installed(compressed)
    rest = {slot.name: left for slot, method in chosen.items() if (left := after_cut(method)) is not None}
    whole = [slot for slot in chosen if slot.name in rest and slots[slot.name].shape == slot.shape]
    for slot in whole:
        del rest[slot.name]

    def method_of(slot: Slot) -> Choice:
        return rest.get(slot.name, Keep())

    if rest:
        try:
            compress_module(thinned, method_of, statistics, seed=seed)
        except SchemeError as error:
            raise SchemeError(
                f"{error}. That is a matrix from which channels were cut: choose what fits any width, or thin=False"
            ) from error
    for slot in whole:
        for path, name in slot.users:
            install(thinned.get_submodule(path), name, trained[slot.parameter], slot.view)
    guard(thinned)
    return thinned
