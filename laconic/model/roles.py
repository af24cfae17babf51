"""What a matrix is for: tables of words, output heads, routers, and the body of the network."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

Role = Literal["embedding", "head", "router", "body"]
"""What a site is for: "embedding" (a table that is looked up in), "head" (makes a transformers model's logits),
"router" (scores experts), "body".
"""

# modules above the experts in which their router is looked for: DBRX has its experts' tensors two below the layer both
# are in
_LEVELS = 3


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The layers whose outputs are a transformers model's answer: `get_output_embeddings`, and classifiers.

    A classifier is a linear layer or convolution outside the base model with a row per label (one more for "no object",
    as detectors have it) or per word. A plain module's last layer is none: nothing marks it.
    """
    find = getattr(model, "get_output_embeddings", None)
    found = find() if callable(find) else None
    heads = {found} if isinstance(found, nn.Module) else set()
    base, config = getattr(model, "base_model", None), getattr(model, "config", None)
    if not isinstance(base, nn.Module) or base is model or config is None:
        return heads
    inside, sizes = set(base.modules()), _answers(config)
    for module in model.modules():
        rows = (
            getattr(module, "out_features", None)
            if isinstance(module, nn.Linear)
            else getattr(module, "out_channels", None)
        )
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module not in inside and rows in sizes:
            heads.add(module)
    return heads


def _answers(config: Any) -> set[int]:
    """The numbers of rows that an output head may have: labels, labels and "no object", words."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = {getattr(part, "vocab_size", None) for part in (config, text)}
    labels = getattr(config, "num_labels", None)
    return {size for size in (labels, labels + 1 if isinstance(labels, int) else None, *words) if isinstance(size, int)}


def router_parameters(model: nn.Module) -> set[tuple[str, str]]:
    """The (module path, parameter name) of every matrix that scores experts: it has a row per expert, and lies beside
    them.

    Experts are a module with three-dimensional parameters that agree in their first size, or with a number of experts
    as an attribute, or a ModuleList under a name with "expert"; the router is the matrix nearest to them: a layer
    inside that is none of them, or up to three modules above.
    """
    modules = dict(model.named_modules())
    routers: set[tuple[str, str]] = set()
    for path, counts, packed in _experts(modules):
        above = path.split(".") if path else []
        for level in range(0 if packed else 1, min(_LEVELS, len(above)) + 1):
            parent = ".".join(above[: len(above) - level])
            found = {user for user, rows in _matrices_below(modules, parent, path, raw=level > 0) if rows in counts}
            if found:
                routers |= found
                break
    return routers


def _experts(modules: dict[str, nn.Module]) -> Iterator[tuple[str, set[int], bool]]:
    """The path of everything that holds experts, how many they may be, and whether they are its own packed
    parameters.
    """
    for path, module in modules.items():
        named = "expert" in path.rpartition(".")[2].lower()
        packed = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
        counts = set(packed) if len(set(packed)) == 1 and (len(packed) > 1 or named) else set()
        if named or packed:
            counts |= {
                value
                for key, value in vars(module).items()
                if key.endswith("num_experts") and type(value) is int and value > 1
            }
        if named and isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1:
            counts.add(len(module))
        if counts:
            yield path, counts, bool(packed)


def _matrices_below(
    modules: dict[str, nn.Module], parent: str, experts: str, *, raw: bool
) -> Iterator[tuple[tuple[str, str], int]]:
    """Linear weights (and `raw` two-dimensional parameters) below `parent`, and their rows; above the experts, none of
    theirs.
    """
    for path, module in modules.items():
        if not lies_below(path, parent) or (parent != experts and lies_below(path, experts)):
            continue
        if isinstance(module, nn.Linear):
            yield (path, "weight"), module.out_features
        elif raw and not type(module).__module__.startswith("torch."):
            for name, tensor in module.named_parameters(recurse=False):
                if tensor.dim() == 2 and not name.endswith("bias"):
                    yield (path, name), tensor.shape[0]


def lies_below(path: str, parent: str) -> bool:
    """Whether a module's path is `parent` or below it; everything lies below ""."""
    return not parent or path == parent or path.startswith(parent + ".")
