"""AdaRound: whether each weight is rounded up or down is learned, part by part, from what the original answers."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from laconic.errors import SchemeError
from laconic.methods.base import Method
from laconic.recover.blockwise import Reconstruction, adam
from laconic.recover.checks import check_choice
from laconic.recover.steps import Steps
from laconic.weights import Uniform, Weight
from laconic.weights.relax import Carrying, Relaxation

Beginning = Literal["weight", "codes"]
_ZETA, _GAMMA = 1.1, -0.1  # how far the sigmoid is stretched beyond 0 and 1 (section 3.2)
_SURE = 0.01  # how far from 1/2 h begins at least on the side of the code that was found
_LEFT = 1e-3  # the least distance of h from 0 and 1 in the beginning: at the ends it has no gradient


@dataclass(frozen=True, repr=False)
class AdaRound(Reconstruction):
    """Learned rounding onto grids that stay as they are: W~ = s (clip(floor(W / s + z) + h(V), n, p) - z), with V
    trained.

        h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),                      zeta = 1.1, gamma = -0.1
        loss = mean squared error of the part / that of the start + lam mean(1 - |2 h(V) - 1|^beta)

    The penalty drives h to 0 or 1 while `beta` falls from its first to its second value; it begins after `warmup` of
    the steps. `start="weight"` begins where h is the fraction, so that the soft weights are W; "codes" with the codes
    that compression found (error feedback leaves others than the nearest), each against its neighbour on W's side.
    Sites that are stored on no uniform grid are left alone.
    Deviations: the paper's loss sums over outputs with lambda = 0.01; here both terms are means, relative to the start,
    so that one lam fits all parts. Blocks, as in BRECQ, and not single layers are matched by default (`per="layer"` is
    the paper's). Values beyond a grid's end choose between its last two points.
    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", eqs. 21 to 25; Li et al.
    2021 (BRECQ).
    """

    steps: int = 400
    learn: Steps = field(default_factory=lambda: adam(3e-2))
    lam: float = 0.3
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    start: Beginning = "weight"
    checks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "start", self.start, get_args(Beginning))
        if not (0 <= self.lam < math.inf and 0 <= self.warmup < 1):
            raise SchemeError(
                f"AdaRound: expected lam >= 0 and warmup from 0 to below 1, got {self.lam!r} and {self.warmup!r}"
            )
        if not (len(self.beta) == 2 and self.beta[0] >= self.beta[1] > 0):
            raise SchemeError(f"AdaRound: beta falls from a first to a second value above 0, got {self.beta!r}")

    def relaxation(self, method: Method | None, weight: Weight, W: Tensor) -> Relaxation | None:
        if not isinstance(weight, Uniform):
            return None
        return RoundingLogits(weight, W, self.start, self.warmup, self.beta)

    def penalty(self, relaxations: Sequence[Relaxation]) -> Tensor | None:
        logits = [found for found in relaxations if isinstance(found, RoundingLogits)]
        if not self.lam or not logits or logits[0].beta == math.inf:
            return None
        undecided = torch.stack([found.undecided() for found in logits]).sum()
        return self.lam * undecided / sum(found.logits.numel() for found in logits)


class RoundingLogits(Carrying):
    """A uniform weight whose codes are `below` or one more; V says which. Training mode: soft, below + h(V).
    Evaluation: the nearer of the two.

    w is not looked at: the grid's position of W [out, in] is taken when this is made. `advance` anneals `beta`,
    infinite during the warm-up.
    Source: Nagel et al. 2020, eqs. 22 to 24.
    """

    def __init__(
        self,
        weight: Uniform,
        W: Tensor,
        start: Beginning = "weight",
        warmup: float = 0.2,
        beta: tuple[float, float] = (20.0, 2.0),
    ) -> None:
        super().__init__(copy.deepcopy(weight))
        scale, zero = weight.expanded_sides()
        position = W.float() / scale + zero
        codes = weight.codes.to(position)
        below = position.floor() if start == "weight" else codes - (position < codes).to(codes)
        below = below.clamp(weight.low, weight.high - 1)
        share = (position - below).clamp(0, 1)
        if start == "codes":
            nearer, up = (share + (codes > below).to(share)) / 2, codes > below
            share = torch.where(up, nearer.clamp(min=0.5 + _SURE), nearer.clamp(max=0.5 - _SURE))
        self.register_buffer("below", below)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        share = share.clamp(_LEFT, 1 - _LEFT)
        self.logits = nn.Parameter(((share - _GAMMA) / (_ZETA - _GAMMA)).logit())
        self.warmup, self.range = warmup, beta
        self.beta = math.inf

    below: Tensor
    scale: Tensor
    zero: Tensor

    def trained(self, w: nn.Parameter) -> dict[str, nn.Parameter]:
        return {"logits": self.logits}

    def up(self) -> Tensor:
        """h(V) [out, in]: the share of a step that is rounded up, 0 to 1."""
        return (self.logits.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def undecided(self) -> Tensor:
        """The sum over entries of 1 - |2 h(V) - 1|^beta: 0 where all are decided."""
        return (1 - (2 * self.up() - 1).abs().pow(self.beta)).sum()

    def advance(self, progress: float) -> None:
        first, last = self.range
        left = (1 - progress) / (1 - self.warmup)
        self.beta = math.inf if left > 1 else last + (first - last) * left

    def _codes(self) -> Tensor:
        return self.below + (self.logits >= 0).to(self.below)

    def forward(self, w: Tensor) -> Tensor:
        if not self.training:
            return self.stored(w).forward().to(w.dtype)
        return ((self.below + self.up() - self.zero) * self.scale).to(w.dtype)

    def stored(self, w: Tensor) -> Weight:
        weight = copy.deepcopy(self.weight)
        assert isinstance(weight, Uniform)
        weight.codes = self._codes().to(weight.codes)
        return weight
