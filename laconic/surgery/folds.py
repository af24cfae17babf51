"""Where column scales can go: norms and rows that feed the columns of other layers one by one, each place proven by the
experiment.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.errors import SurgeryError
from laconic.model.batches import Batch
from laconic.model.sites import Slot
from laconic.surgery.cuts import TOLERANCE, Feeder, factors
from laconic.surgery.feeds import Refused, feeds
from laconic.surgery.verify import FAILURES, answers, apart, few, first_line, laboratory, sift, stir
from laconic.weights.demands import set_demands


@dataclass(frozen=True, eq=False)
class Fold:
    """A place where column scales can go: if channel c of the source is multiplied by t_c, and every column j of the
    readers divided by t_index[j], the model computes the same. For a convolution, column j is its input channel j with
    all places of the kernel.
    """

    source: Feeder
    readers: tuple[Slot, ...]
    index: Tensor

    @property
    def kind(self) -> Literal["norm", "rows"]:
        return "norm" if self.source.slot is None else "rows"


def find_folds(model: nn.Module, example: Batch) -> list[Fold]:
    """The norms, and the rows of layers, that feed columns of other layers one by one, in the order of the forward
    pass.

    A norm is any module of one or two vectors that scale what it gives, by w or by 1 + w. Rows are followed through
    whatever carries them unchanged but for a factor: reshaping, ReLU, the product with a gate, attention's mixing of
    tokens, heads that several queries share. All other uses of a source are seen, and each fold is proven on a private
    copy with slightly moved weights: with random factors the output on the first samples of `example` stays within
    1e-5. Packed experts that no token of it reaches are taken to be wired as the others. The model and the global
    random state stay as they are.
    Raises: SurgeryError when the model does not run on the example. Cost: one to two copies, one pass with gradients
    and two or more without.
    """
    return search(model, example)[0]


def search(model: nn.Module, example: Batch) -> tuple[list[Fold], list[Refused]]:
    """`find_folds`, and the places where scales cannot go although they feed columns one by one, with the reason."""
    generator = torch.Generator().manual_seed(0)
    network, batch = bench(model), few(example)
    stir(network, generator)
    network.requires_grad_(False)
    try:
        found, refused = feeds(network, batch, generator)
    except FAILURES as error:
        raise SurgeryError(
            f"{type(model).__name__}: its forward pass breaks on the example: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    folds = [Fold(feed.source, feed.readers, feed.index) for feed in found]
    expected = answers(network, batch)

    def test(items: Sequence[int]) -> str | None:
        subject = copy.deepcopy(network)
        for i in items:
            _scale(subject, folds[i], factors(len(folds[i].index), generator))
        distance = apart(expected, answers(subject, batch))
        return None if distance <= TOLERANCE else f"scaling it changes the output by {distance:.1e} of its size"

    good, wrong = sift(range(len(folds)), test)
    return [folds[i] for i in good], [
        *refused,
        *(Refused(folds[i].source, folds[i].readers, reason) for i, reason in wrong.items()),
    ]


def bench(model: nn.Module) -> nn.Module:
    """A copy to compute with, in which inputs are not rounded: a rounding that flips would hide what is compared."""
    network = laboratory(model)
    for module in list(network.modules()):
        set_demands(module, None)
    return network


@torch.no_grad()
def _scale(network: nn.Module, fold: Fold, random: Tensor) -> None:
    """Multiply the channels of a fold's source by random factors, in a dense network, and divide the readers' columns
    by them.
    """
    t = torch.ones(fold.source.channels)
    t[fold.index] = random
    source, module = fold.source, network.get_submodule(fold.source.path)
    for name in source.names:
        parameter = module.get_parameter(name)
        parameter.copy_(multiplied(source, name, parameter, t))
    for slot in fold.readers:
        path, name = slot.users[0]
        parameter = network.get_submodule(path).get_parameter(name)
        columns = t[fold.index].repeat_interleave(slot.columns // len(fold.index))
        parameter.copy_(slot.view.restore(slot.view.matrix(parameter) / columns))


def multiplied(source: Feeder, name: str, parameter: Tensor, t: Tensor) -> Tensor:
    """A source's parameter [channels, ...] with its channels multiplied by t [channels]."""
    if source.slot is not None and name == source.names[0]:
        return source.slot.view.restore(source.slot.view.matrix(parameter) * row_factors(source, t).unsqueeze(1))
    offset = source.offset if name == source.names[0] else 0.0
    return (parameter + offset) * t - offset


def row_factors(source: Feeder, t: Tensor) -> Tensor:
    """The factor [rows] of every row for t [channels], in every group (expert) of the source's site."""
    return t.repeat(source.slot.rows // source.channels) if source.slot is not None else t
