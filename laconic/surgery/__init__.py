"""Surgery: cutting silent channels out of a network, or moving scales from layer to layer, so that it computes the same
with less.
"""

from laconic.surgery.channels import couple
from laconic.surgery.coupling import Coupling, Group
from laconic.surgery.fold import fold
from laconic.surgery.folds import Fold, find_folds
from laconic.surgery.pretrained import save_pretrained
from laconic.surgery.reshape import rebuild, shapes
from laconic.surgery.rows import couple_or_mask, masks
from laconic.surgery.thinning import Thinned, report, silence, thin

__all__ = [
    "Coupling",
    "Fold",
    "Group",
    "Thinned",
    "couple",
    "couple_or_mask",
    "find_folds",
    "fold",
    "masks",
    "rebuild",
    "report",
    "save_pretrained",
    "shapes",
    "silence",
    "thin",
]
