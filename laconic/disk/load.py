"""Models on disk: what makes up each parameter of a configured model, and a skeleton of that model without its weights."""

import copy
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from laconic.disk.companions import NOT_FETCHED
from laconic.disk.dequantize import METHODS, Dequantized, block_of, pairs_in, way
from laconic.disk.integrity import check_config
from laconic.disk.state import guard
from laconic.disk.store import MANIFEST, Compressed
from laconic.disk.tensors import TensorFiles, is_finite
from laconic.disk.ties import apart, separate, untie_config
from laconic.errors import CheckpointError
from laconic.host.ambient import undisturbed
from laconic.host.foreign import Foreign, read_object
from laconic.model.residence import Residence
from laconic.model.sites import Slot, find_slots, stored_uses, tied_names
from laconic.weights import install
from laconic.weights.demands import Demands

FLOATS = {"F64", "F32", "F16", "BF16"}
_HALVES = (torch.bfloat16, torch.float16, torch.float32)
_CONFIG = 1 << 24  # bytes of a config.json; labels of 20,000 classes take one of them in sixteen


def fetch(source: str) -> Path:
    """A local model directory: `source` itself, or the hub repository of that name, downloaded (safetensors and `companions`)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: expected a model directory or a hub id like 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*"], ignore_patterns=list(NOT_FETCHED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: neither a local directory nor a hub repository that can be reached: {error}"
        ) from error


class _MetaParameters(TorchFunctionMode):
    """Uninitialised tensors are made on the meta device, everything else (rotary tables, masks) for real: a skeleton without weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Checkpoint:
    """A Hugging Face model directory that has not been compressed: config, tensors, and which of them make up each parameter."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path, self.trust_remote_code = path, trust_remote_code
        self.config = read_config(path, trust_remote_code)
        method = _quantized_by(self.config)
        self.files = TensorFiles(path)
        quantized = pairs_in(self.files.tensors)
        if method is not None and (method not in METHODS or not quantized):
            raise CheckpointError(f"{path}: the checkpoint is already quantized by {method!r}; {way(path)}")
        if quantized:
            dtype = getattr(self.config.get_text_config(), "dtype", None)
            self.files = Dequantized(
                path, dtype if dtype in _HALVES else torch.bfloat16, block_of(_quantization(self.config))
            )
        if method is not None:
            _as_plain(self.config)

    @cached_property
    def _configured(self) -> nn.Module:
        """The model with the ties that its config says."""
        self._settled = settle_architecture(self.config, self.files.tensors)
        return build_skeleton(self.config, self.trust_remote_code)

    @cached_property
    def untied(self) -> list[str]:
        """The parameters that the config ties to others, and that are stored with values of their own: as in transformers, those hold."""
        return apart(self._configured, set(self._routes), self._same)

    def _same(self, one: str, other: str) -> bool:
        values = self.read([one, other])
        return values[one].shape == values[other].shape and torch.equal(
            values[one], values[other].to(values[one].dtype)
        )

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without its weights: parameters on the meta device, small computed buffers for real, ties in place.

        Where `untied` has names, the config is brought to say so too.
        """
        model, untied = self._configured, self.untied
        if untied:
            separate(model, untied)
            untie_config(self.config, tied_names(model), lambda config: build_skeleton(config, self.trust_remote_code))
        return model

    @cached_property
    def notes(self) -> list[str]:
        """What a user must hear of the checkpoint."""
        self.skeleton  # noqa: B018 # which finds out
        lines = [
            f"{name}: the config ties it to another tensor, but it is stored with values of its own; they are kept"
            for name in self.untied
        ]
        if self._settled is not None:
            lines.append(f"config.json names no architecture; by its tensors it is a {self._settled}")
        if isinstance(self.files, Dequantized):
            kinds = sorted({pair.kind for pair in self.files.pairs.values()})
            name = str(self.files.dtype).removeprefix("torch.")
            lines.append(
                f"{len(self.files.pairs)} tensors are stored as {' and '.join(kinds)}; they were taken by their scales, as {name}"
            )
        return lines

    @cached_property
    def _routes(self) -> dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]:
        """For every parameter name: its converter (merging experts, say) if it has one, and the (pattern, stored name) it is made of."""
        return routes(self._configured, self.files.tensors)

    @cached_property
    def unused(self) -> list[str]:
        """Stored tensors that no parameter of the model is made of (multi-token-prediction layers, say); they are carried over."""
        used = {stored for _, sources in self._routes.values() for _, stored in sources}
        return [name for name in self.files.tensors if name not in used]

    def check(self) -> None:
        """Raises CheckpointError unless every parameter of the configured model is stored, as floats, in the configured shape."""
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        for names in tied_names(self.skeleton):
            if not any(name in self._routes for name in names):
                raise CheckpointError(
                    f"{self.path}: the config asks for {names[0]}, which is not stored{self._hint(names[0])}"
                )
            name = next(name for name in names if name in self._routes)
            converter, sources = self._routes[name]
            for _, stored in sources:
                found = self.files.tensors[stored]
                if found.dtype not in FLOATS:
                    raise CheckpointError(
                        f"{found.file}: {stored} is stored as {found.dtype}; expected float32, float16 or bfloat16, "
                        f"or fp8 with its scales beside it; {way(self.path)}"
                    )
            shape, expected = self.files.tensors[sources[0][1]].shape, tuple(parameters[name].shape)
            if converter is None and shape != expected:
                raise CheckpointError(
                    f"{self.path}: {name} is stored with shape {shape}, the config asks for {expected}"
                )

    def _hint(self, missing: str) -> str:
        head = getattr(self._configured, "get_output_embeddings", lambda: None)()
        is_head = head is not None and self._configured.get_submodule(missing.rpartition(".")[0]) is head
        tied = getattr(self.config.get_text_config(), "tie_word_embeddings", False)
        return (
            "; if the head is the embedding, its config.json has to say tie_word_embeddings"
            if is_head and not tied
            else ""
        )

    def read(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with self.files.open() as reader:
            for name in names:
                if name in found or name not in self._routes:
                    continue
                converter, sources = self._routes[name]
                if converter is None:
                    found[name] = reader.get(sources[-1][1])
                    continue
                fresh = WeightConverter(converter.source_patterns, converter.target_patterns, converter.operations)
                for pattern, stored in sources:
                    fresh.add_tensor(name, stored, pattern, reader.get(stored))
                converted = fresh.convert(name, model=self._configured, config=self.config)
                found |= {
                    key: value[0] if isinstance(value, list) else value
                    for key, value in converted.items()
                    if key in names
                }
        return found

    def demands(self, name: str) -> Demands | None:
        return None

    def nbytes(self, name: str) -> int:
        return (
            sum(self.files.tensors[stored].bytes for _, stored in self._routes[name][1]) if name in self._routes else 0
        )

    def on_disk(self, name: str) -> int:
        """Bytes that a parameter takes in the checkpoint's files: fewer than `nbytes` where it is stored in fp8 or MXFP4."""
        return sum(self.files.on_disk(stored) for _, stored in self._routes[name][1]) if name in self._routes else 0

    def dtype_of(self, name: str) -> str:
        """The stored float type of a parameter, as safetensors names it."""
        return self.files.tensors[self._routes[name][1][0][1]].dtype

    def non_finite(self) -> list[str]:
        """The parameters that hold a NaN or an infinity. Cost: one read of the whole checkpoint, a tensor at a time."""
        bad = []
        for name in self._routes:
            tensor = self.read([name]).get(name)
            if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
                bad.append(name)
        return bad


Routes = dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]


def routes(model: nn.Module, tensors: Iterable[str]) -> Routes:
    """For every parameter of a model its converter, if it has one, and the (pattern, stored name) it is made of, as transformers names them."""
    wanted = dict(model.state_dict(keep_vars=True))
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    found: Routes = {}
    for stored in sorted(tensors, key=_natural):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = stored, None
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [name]
        if converter is not None:
            first = converter.target_patterns[0]
            targets = [name.replace(first, target) for target in converter.target_patterns]
        for target in targets:
            if target in wanted:
                found.setdefault(target, (converter, []))[1].append((pattern or stored, stored))
    return found


def settle_architecture(config: Any, tensors: Collection[str]) -> str | None:
    """Let a config that names no class name the one whose parameters the stored tensors are; returns the name, None if nothing was to do.

    Of the classes that transformers has for the config's type: the one that lacks fewest parameters, leaves fewest tensors over, and needs
    fewest renamed; among equals a language model, then others with a head. Raises: CheckpointError where there is none.
    """
    if getattr(config, "architectures", None) or getattr(config, "auto_map", None):
        return None
    best: tuple[tuple[int, int, int, int], str] | None = None
    for order, name in enumerate(_classes_of(config.model_type, masked=not getattr(config, "is_decoder", False))):
        config.architectures = [name]
        try:
            model = build_skeleton(config)
        except CheckpointError:
            continue
        made = routes(model, tensors)
        used = {stored for _, sources in made.values() for _, stored in sources}
        missing = sum(not any(one in made for one in names) for names in tied_names(model))
        renamed = len(used - set(model.state_dict()))
        score = (missing, len(tensors) - len(used), renamed, order)
        best = min(best, (score, name)) if best is not None else (score, name)
    config.architectures = [best[1]] if best is not None else None
    if best is None:
        raise CheckpointError(
            f"the config names no architecture, and transformers has no model of type {config.model_type!r}; name one in it"
        )
    return best[1]


def _classes_of(model_type: str, masked: bool) -> list[str]:
    """The model classes that transformers has for a type, those with the likeliest heads first; of two alike the masked one if `masked`."""
    from transformers.models.auto import modeling_auto

    tables = {
        name: table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    }
    kinds = ("MASKED_LM", "CAUSAL_LM") if masked else ("CAUSAL_LM", "MASKED_LM")
    first = (*kinds, "SEQ_TO_SEQ", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
    names = [name for kind in first for name in tables if kind in name] + sorted(tables)
    found: dict[str, None] = {}
    for name in names:
        classes = tables[name].get(model_type, ())
        found |= dict.fromkeys([classes] if isinstance(classes, str) else classes)
    return [name for name in found if hasattr(transformers, name)]


def _quantization(config: Any) -> Any:
    """What a config says of how its checkpoint is quantized: a dictionary, an object, or None."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def _quantized_by(config: Any) -> str | None:
    quantization = _quantization(config)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    return None if method is None else str(getattr(method, "value", method))


def _as_plain(config: Any) -> None:
    """Take from a config what it says of quantization."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises: CheckpointError when there is none, or when it wants code that came with the checkpoint."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: expected a model directory with config.json")
    raw = read_object(file, CheckpointError, _CONFIG)
    if raw.get("auto_map") and not trust_remote_code:
        code = (
            sorted(map(str, raw["auto_map"].values())) if isinstance(raw["auto_map"], dict) else [str(raw["auto_map"])]
        )
        raise CheckpointError(
            f"{file}: the model wants to run code that came with it ({code[0]}); pass --trust-remote-code to allow that"
        )
    if (told := raw.get("transformers_weights")) not in (None, "model.safetensors"):
        raise CheckpointError(
            f"{file}: says that the weights are in {told!r} (transformers_weights); model.safetensors or its index are read: rename the file to that "
            "and take the field out"
        )
    with Foreign(CheckpointError, file):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights  # it is about these files, not about what is made of them
    return config


def build_skeleton(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model class the config names, built without allocating its weights. Raises: CheckpointError for an unknown class."""
    config = copy.deepcopy(config)  # building notes things in it, its float type among them
    names = getattr(config, "architectures", None) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"config.json: architectures should be a list of names, got {names!r}")
    model_class = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    with Foreign(CheckpointError, f"cannot build {names or config.model_type} from its config"), _MetaParameters():
        if model_class is not None:
            model = model_class._from_config(config, dtype=torch.float32)
        else:
            auto = transformers.AutoModelForCausalLM if any("CausalLM" in n for n in names) else transformers.AutoModel
            model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = (
            "eager"  # one matrix product per expert, so that every expert's inputs can be seen
        )
    return model.eval().requires_grad_(False)


class CompressedCheckpoint:
    """A compressed model directory as a provider of decoded parameters."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False, verify: bool = True) -> None:
        self.path, self.trust_remote_code = path, trust_remote_code
        self.stored = Compressed(path, verify=verify)
        if verify:
            check_config(path, self.stored.manifest)
        self.config = read_config(path, trust_remote_code)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without its weights. A tie is stored once, so what is stored under two of its names is none, whatever the config says."""
        settle_architecture(self.config, self.stored.names)
        model = build_skeleton(self.config, self.trust_remote_code)
        separate(model, apart(model, self.stored.names, lambda one, other: False))
        return model

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The compressed sites of the skeleton by parameter name. Raises: CheckpointError unless shapes and names are the manifest's."""
        uses = stored_uses(self.skeleton, self.stored.manifest.get("views", {}), self.stored.weights)
        by_parameter = {name: slot for slot in find_slots(self.skeleton, uses) for name in slot.parameters}
        for name, spec in self.stored.weights.items():
            if name not in by_parameter:
                raise CheckpointError(
                    f"{self.path}: the manifest stores {name}, which the configured model does not have"
                )
            if tuple(spec["shape"]) != by_parameter[name].shape:
                raise CheckpointError(
                    f"{self.path}: {name} is stored as {tuple(spec['shape'])}, the config asks for {by_parameter[name].shape}"
                )
            self.stored.check_layers(name, by_parameter[name].layers(self.skeleton))
        return {name: by_parameter[name] for name in self.stored.weights}

    def check(self) -> None:
        """Raises CheckpointError unless every parameter of the configured model is stored, compressed or plain."""
        stored = self.stored.names
        for names in tied_names(self.skeleton):
            if not stored.intersection(names):
                raise CheckpointError(f"{self.path}: the config asks for {names[0]}, which is not stored")
        self.slots  # noqa: B018 # which checks what the manifest stores

    def read(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with self.stored.files.open() as reader:
            for name in names:
                if name in self.slots:
                    found[name] = self.slots[name].view.restore(self.stored.weight(name).forward())
                elif name in self.stored.files.tensors:
                    found[name] = reader.get(name)
        return found

    def demands(self, name: str) -> Demands | None:
        return self.stored.demands(name)

    def nbytes(self, name: str) -> int:
        return self.stored.nbytes(name)


def open_source(source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint | CompressedCheckpoint:
    """A model directory or hub id, compressed or not, checked to be complete, a compressed one against its checksums too."""
    path = fetch(str(source))
    kind = CompressedCheckpoint if (path / MANIFEST).is_file() else Checkpoint
    opened = kind(path, trust_remote_code=trust_remote_code)
    opened.check()
    if isinstance(opened, CompressedCheckpoint):
        opened.stored.verify()
    return opened


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer. Raises: CheckpointError when there is none."""
    with Foreign(CheckpointError, f"{path}: no tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        empty = len(tokenizer) <= len(set(tokenizer.all_special_ids))
    if empty:  # transformers makes one up for some model types, with special tokens only, where the files are missing
        raise CheckpointError(f"{path}: no tokenizer that can be loaded: it has special tokens only")
    return tokenizer


@undisturbed()
def load(
    path: str | Path, *, dense: bool = True, dtype: torch.dtype | None = None, trust_remote_code: bool = False, verify: bool = True
) -> nn.Module:  # fmt: skip
    """The model of a compressed directory, ready to run: decoded once into dense parameters, or with `dense=False` with its Weights
    installed (they decode on every read and can be trained). Layers whose weights ask for it round their inputs or add a bias, in either form.

    `dtype` is that of the dense parameters, by default the config's. What is stored is compared with its checksums first, about a second per
    GB, unless `verify` is False. Raises: CheckpointError when the directory is damaged or incomplete.
    """
    checkpoint = CompressedCheckpoint(Path(path), trust_remote_code=trust_remote_code, verify=verify)
    checkpoint.check()
    if verify:
        checkpoint.stored.verify()
    model = checkpoint.skeleton
    dtype = dtype or getattr(checkpoint.config, "dtype", None) or torch.float32
    residence = Residence(model, checkpoint, None, dtype, torch.device("cpu"))
    residence.keep_all(skip=() if dense else checkpoint.slots)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # `save_pretrained` writes what is there: an ordinary dense model
    if not dense:
        for name, slot in checkpoint.slots.items():
            if name == slot.parameter:
                weight = checkpoint.stored.weight(name)
                for user, parameter in slot.users:
                    install(model.get_submodule(user), parameter, weight, slot.view)
    guard(model)
    if (Path(path) / "generation_config.json").is_file():
        with Foreign(CheckpointError, Path(path) / "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def original_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the original's safetensors files, headers included."""
    return sum(file.stat().st_size for file in {stored.file for stored in checkpoint.files.tensors.values()})
