"""Training by anybody's loop: `prepare` puts relaxations in the places of a module's matrices, `convert` makes the
stored weights of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from laconic.disk.state import guard
from laconic.engine.walk import parameters_of
from laconic.errors import SchemeError
from laconic.model.batches import Batch
from laconic.model.judging import OutputLoss
from laconic.recover.checks import check_choice
from laconic.recover.projection import project_onto, reads_data
from laconic.recover.relaxed import Trains, relaxed
from laconic.scheme.text import Scheme, parse
from laconic.weights import View, Weight, install
from laconic.weights.demands import check_demands, set_demands
from laconic.weights.install import own_class
from laconic.weights.relax import Relaxation
from laconic.weights.shards import is_sharded, on_whole, whole


class Prepared(nn.Module):
    """The parametrization through which a parameter is trained: what its Relaxation makes of it, in the parameter's own
    shape.

    The relaxation is a submodule, `carried`, of a tie's first user only, so that every name in a state dict is a tensor
    of its own: loaders for several processes walk each module once.
    """

    def __init__(self, relaxation: Relaxation, view: View, first: bool) -> None:
        super().__init__()
        self._held, self.view = (relaxation,), view
        if first:
            self.carried = relaxation

    @property
    def relaxation(self) -> Relaxation:
        return self._held[0]

    def forward(self, original: Tensor) -> Tensor:
        if is_sharded(original) and not self.relaxation.takes_shard(self.view.matrix(original)):
            return on_whole(self._seen, original)
        return self._seen(original)

    def _seen(self, original: Tensor) -> Tensor:
        return self.view.restore(self.relaxation(self.view.matrix(original)))


def prepare(
    model: nn.Module,
    scheme: Scheme | str,
    data: Sequence[Batch] = (),
    *,
    example: Batch | None = None,
    loss: OutputLoss | None = None,
    seed: int = 0,
    trains: Trains = "w",
) -> nn.Module:
    """Make a module one that trains under a scheme, in place: with any loop, optimizer or trainer, then `convert`.

    Every matrix the scheme compresses becomes a parametrized tensor: its parameter (`parametrizations.weight.original`)
    stays the uncompressed w, the layer sees what the method's relaxation makes of it: soft clusters for `DKM`, the
    nearest compressed value with straight-through gradients for other methods, masks and scales being those of direct
    compression. In evaluation mode the layer sees what would be stored. A tie stays one parameter with one relaxation.
    `data`: batches for methods that read statistics; `example`: an input, for structures, whose rows are then masked
    together. Biases and norms beside them are left alone. `trains="side"`: scales, float zero points, tables, low-rank
    factors and dense parts are trained instead, codes and masks as they are. They are parameters of the module, in
    float32; w no longer requires a gradient. `parallelize_module` comes before this; what shards or replicates
    (FSDP2, DDP, `accelerate`) and a compiler come after it, see docs/edkm.md.
    Returns the module. Raises: as `recover`, and SchemeError for a module that was prepared before or is sharded by
    FSDP; nothing is changed then.
    """
    scheme = parse(scheme) if isinstance(scheme, str) else scheme
    check_choice(prepare, "trains", trains, get_args(Trains))
    _check_fresh(model, scheme)
    projection = project_onto(model, scheme, example=example, data=data, loss=loss, seed=seed)
    values = {slot: whole(parameter.detach()) for slot, parameter in parameters_of(model, projection.slots).items()}
    weights = projection.compress(values)
    for slot, weight in weights.items():
        for layer in slot.layers(model):
            check_demands(layer, weight, slot.name)
    relax = relaxed(trains)
    made = {
        slot: relax(projection.chosen[slot], weight, slot.view.matrix(values[slot])) for slot, weight in weights.items()
    }
    for slot, relaxation in made.items():
        for i, (path, name) in enumerate(slot.users):
            module = model.get_submodule(path)
            parametrize.register_parametrization(
                module, name, Prepared(relaxation, slot.view, first=i == 0).train(model.training), unsafe=True
            )
            set_demands(module, relaxation.weight)
            original = module.get_submodule(f"parametrizations.{name}").get_parameter("original")
            if all(moved is not original for moved in relaxation.trained(original).values()):
                original.requires_grad_(False)
            if i > 0:
                _declare_tied(module, name)
    return model


def relaxations(model: nn.Module) -> list[Relaxation]:
    """The relaxations of a prepared module, each tie's once."""
    return list({id(prepared.relaxation): prepared.relaxation for _, _, prepared in _prepared(model)}.values())


def advance(model: nn.Module, progress: float) -> None:
    """Tell a prepared module, between steps, how much of its training is done, 0 to 1: temperatures that fall
    (`tau_end`) hear it from nobody else.

    Raises: SchemeError for a module that nothing was prepared in.
    """
    _found(model, "advance")
    for relaxation in relaxations(model):
        relaxation.advance(progress)


def convert(model: nn.Module) -> nn.Module:
    """Make a prepared module a compressed one, in place: every relaxation becomes the Weight it stands for, installed,
    in evaluation mode.

    What it computes is what the prepared module computed in evaluation mode; `lc.save` stores it. Returns the module.
    Raises: SchemeError for a module that nothing was prepared in, or whose parameters lie in several processes; nothing
    is changed then.
    """
    found = _found(model, "convert")
    originals = [_original(module, name) for module, name, _ in found]
    weights: dict[int, Weight] = {}
    for (_, _, prepared), original in zip(found, originals, strict=True):
        if id(prepared.relaxation) not in weights:
            weights[id(prepared.relaxation)] = prepared.relaxation.stored(prepared.view.matrix(original.detach()))
    for module, name, prepared in found:
        own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        install(module, name, weights[id(prepared.relaxation)], prepared.view)
    guard(model)
    return model.eval()


def _prepared(model: nn.Module) -> Iterator[tuple[nn.Module, str, Prepared]]:
    for module in model.modules():
        chains = getattr(module, "parametrizations", None)
        if isinstance(chains, nn.ModuleDict):
            for name, chain in chains.items():
                if isinstance(chain, nn.ModuleList) and isinstance(chain[0], Prepared):
                    yield module, name, chain[0]


def _found(model: nn.Module, caller: str) -> list[tuple[nn.Module, str, Prepared]]:
    found = list(_prepared(model))
    if not found:
        raise SchemeError(
            f"{caller}: expected a module that lc.prepare was called on, found no prepared parameter in it"
        )
    return found


def _check_fresh(model: nn.Module, scheme: Scheme) -> None:
    """Raises SchemeError for a module that is prepared already, or lies in several processes in a way that cannot be
    prepared any more.
    """
    if next(_prepared(model), None) is not None:
        raise SchemeError("prepare: the module is prepared already; convert it first, or start from a fresh one")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FSDPModule | FullyShardedDataParallel):
            raise SchemeError(
                f"prepare: {name or 'the module'} is sharded by FSDP already, which keeps track of its parameters; "
                "prepare it first"
            )
    if reads_data(model, scheme) and any(is_sharded(parameter) for parameter in model.parameters()):
        raise SchemeError(
            "prepare: statistics of a tensor-parallel module are not gathered; use a scheme that needs no data"
        )


def _declare_tied(module: nn.Module, name: str) -> None:
    """Say that the parameter has another name too: transformers asks for this before it leaves a name out of a file."""
    chain: Any = module.get_submodule(f"parametrizations.{name}")
    chain._tied_weights_keys = {"original": None}


def _original(module: nn.Module, name: str) -> Tensor:
    original = module.get_submodule(f"parametrizations.{name}").get_parameter("original")
    if is_sharded(original):
        raise SchemeError(
            f"convert: {type(module).__name__}.{name} is a {type(original).__name__} that several processes share; "
            "gather the full state dict and "
            "load it into a prepared copy of the model"
        )
    return original
