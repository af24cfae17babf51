"""An original checkpoint in which the weights that a run has finished stand in the original ones' places."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from laconic.disk.originals import Checkpoint
from laconic.disk.output import Run
from laconic.model.sites import Slot
from laconic.weights import Weight, unpack
from laconic.weights.base import asks_its_layer
from laconic.weights.demands import Demands
from laconic.weights.spec import Spec


class Overlay:
    """A provider of parameters: those of `slots` that the run has finished decoded, all others as they are in the
    checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, run: Run, slots: Sequence[Slot]) -> None:
        self.checkpoint, self.run = checkpoint, run
        self.views = {name: slot.view for slot in slots for name in slot.parameters}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        finished = self.run.weight_files()
        found = self.checkpoint.read([name for name in names if name not in finished])
        for name in names:
            if name in finished:
                found[name] = self.views[name].restore(read_weight(*finished[name], name).forward())
        return found

    def demands(self, name: str) -> Demands | None:
        finished = self.run.weight_files().get(name)
        if finished is None or not asks_its_layer(finished[1]):
            return None
        return Demands.of(read_weight(*finished, name))

    @property
    def skeleton(self) -> nn.Module:
        return self.checkpoint.skeleton

    def nbytes(self, name: str) -> int:
        return self.checkpoint.nbytes(name)


def read_weight(file: Path, spec: Spec, name: str) -> Weight:
    """One weight of a part's file."""
    with safe_open(file, framework="pt") as reader:
        names = [key for key in reader.keys() if key.startswith(name + ".")]  # noqa: SIM118
        tensors = {key[len(name) + 1 :]: reader.get_tensor(key).clone() for key in names}
    return unpack(spec, tensors)
