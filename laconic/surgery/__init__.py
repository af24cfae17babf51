"""Surgery: cutting silent channels out of a network, so that it computes the same with less."""

from laconic.surgery.channels import couple
from laconic.surgery.coupling import Coupling, Group
from laconic.surgery.pretrained import save_pretrained
from laconic.surgery.reshape import rebuild, shapes
from laconic.surgery.rows import couple_or_mask, masks
from laconic.surgery.thinning import Cut, report, silence, thin

__all__ = [
    "Coupling",
    "Cut",
    "Group",
    "couple",
    "couple_or_mask",
    "masks",
    "rebuild",
    "report",
    "save_pretrained",
    "shapes",
    "silence",
    "thin",
]
