"""Compressed models as modules and as providers of decoded parameters; the model of a directory or hub id, whichever
kind it is.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from laconic.disk.companions import NOT_FETCHED
from laconic.disk.integrity import check_config
from laconic.disk.originals import Checkpoint
from laconic.disk.places import install_stored, slots_of
from laconic.disk.skeletons import build_skeleton, read_config, settle_architecture
from laconic.disk.state import guard
from laconic.disk.store import MANIFEST, Compressed
from laconic.disk.ties import apart, separate
from laconic.errors import CheckpointError
from laconic.host.ambient import undisturbed
from laconic.host.foreign import Foreign
from laconic.model.residence import Residence
from laconic.model.sites import Slot, tied_names
from laconic.weights.demands import Demands


def fetch(source: str) -> Path:
    """A local model directory: `source` itself, or the hub repository of that name, downloaded (safetensors and
    `companions`).
    """
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
        """The model without its weights. A tie is stored once, so what is stored under two of its names is none,
        whatever the config says.
        """
        settle_architecture(self.config, self.stored.names)
        model = build_skeleton(self.config, self.trust_remote_code)
        separate(model, apart(model, self.stored.names, lambda one, other: False))
        return model

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The compressed sites of the skeleton by the stored name. Raises: CheckpointError as `places.slots_of`."""
        return slots_of(self.skeleton, self.stored)

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
    """A model directory or hub id, compressed or not, checked to be complete, a compressed one against its checksums
    too.
    """
    path = fetch(str(source))
    kind = CompressedCheckpoint if (path / MANIFEST).is_file() else Checkpoint
    opened = kind(path, trust_remote_code=trust_remote_code)
    opened.check()
    if isinstance(opened, CompressedCheckpoint):
        opened.stored.verify()
    return opened


@undisturbed()
def load(
    path: str | Path,
    *,
    dense: bool = True,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> nn.Module:
    """The model of a compressed directory, ready to run: decoded once into dense parameters, or with `dense=False` with
    its Weights installed (they decode on every read and can be trained). Layers whose weights ask for it round their
    inputs or add a bias, in either form.

    `dtype` is that of the dense parameters, by default the config's. What is stored is compared with its checksums
    first, about a second per GB, unless `verify` is False. Raises: CheckpointError when the directory is damaged or
    incomplete.
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
        install_stored(model, checkpoint.stored, checkpoint.slots)
    guard(model)
    if (Path(path) / "generation_config.json").is_file():
        with Foreign(CheckpointError, Path(path) / "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer. Raises: CheckpointError when there is none."""
    with Foreign(CheckpointError, f"{path}: no tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        empty = len(tokenizer) <= len(set(tokenizer.all_special_ids))
    if empty:  # transformers makes one up for some model types, with special tokens only, where the files are missing
        raise CheckpointError(f"{path}: no tokenizer that can be loaded: it has special tokens only")
    return tokenizer
