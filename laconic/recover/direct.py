"""Direct compression: what a scheme makes of the trained weights, with nothing trained after it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from laconic.recover.base import Recovery
from laconic.recover.checks import check_counts

if TYPE_CHECKING:
    from laconic.recover.course import Course


@dataclass(frozen=True, repr=False)
class Direct(Recovery):
    """Direct compression: Theta = C(w), nothing is trained. With `norm_batches`, batch norms' statistics are estimated
    anew.

    Source: Condensa section 3.3 ("direct compression", DC).
    """

    norm_batches: int = 0

    def __post_init__(self) -> None:
        check_counts(self, 0, norm_batches=self.norm_batches)

    @property
    def total(self) -> int:
        return 0

    @property
    def leaves_w(self) -> bool:
        return True

    def run(self, course: "Course") -> None:
        course.begin()
