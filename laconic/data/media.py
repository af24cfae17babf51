"""Examples from folders of images and of sound, prepared as the model's directory says."""

import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from laconic.data.modality import main_input
from laconic.errors import CheckpointError, DataError
from laconic.model.batches import Batch

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUND = (".wav",)
_PREPARATION = "preprocessor_config.json"
_SIDE = 224  # pixels, of a config that names none


def files_below(source: str, suffixes: tuple[str, ...], why: str) -> list[Path]:
    """The files of a kind in a folder and below it, by name, or the one file given. Raises: DataError saying why, where
    there is none.
    """
    path = Path(source).expanduser()
    try:
        found = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if path.is_dir()
            else [path]
        )
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error
    if not path.exists():
        raise DataError(f"{source}: no such file or directory; {why}: expected a folder of {', '.join(suffixes)}")
    if not found or found[0].suffix.lower() not in suffixes:
        raise DataError(f"{source}: {why}: expected a folder of {', '.join(suffixes)}")
    return found


def image_calls(
    model: nn.Module, folder: Path, files: Iterable[Path], notes: list[str], trusted: bool = False
) -> Iterator[Batch]:
    """Each image as the model is called with it: through the directory's image processor, else scaled to its config's
    size and to [-1, 1].

    Raises: DataError for a file that is no image, or without Pillow; CheckpointError for a processor that cannot be
    loaded.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("images are read with Pillow: pip install pillow") from error
    processor = _loaded(transformers.AutoImageProcessor, folder, trusted) if (folder / _PREPARATION).is_file() else None
    if processor is None:
        notes.append(
            f"images were scaled to {_size(model)} and their values to [-1, 1]: the directory has no {_PREPARATION}"
        )
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if getattr(model.config, "num_channels", 3) == 1 else "RGB")
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: cannot be read as an image: {error}") from error
        if processor is not None:
            yield {
                key: torch.as_tensor(value)
                for key, value in processor(images=image, return_tensors="pt").items()
                if _numbers(value)
            }
        else:
            height, width = _size(model)
            values = torch.from_numpy(
                np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32).copy()
            )
            pixels = values[None] if values.dim() == 2 else values.permute(2, 0, 1)
            yield {main_input(model): (pixels[None] / 127.5 - 1).contiguous()}


def sound_calls(
    model: nn.Module, folder: Path, files: Iterable[Path], notes: list[str], trusted: bool = False
) -> Iterator[Batch]:
    """Each recording as the model is called with it: through the directory's feature extractor; a waveform without one
    with mean 0, variance 1.

    The decoder of a model that also writes is given its start token alone. Raises: DataError, CheckpointError.
    """
    extractor = (
        _loaded(transformers.AutoFeatureExtractor, folder, trusted) if (folder / _PREPARATION).is_file() else None
    )
    if extractor is None and main_input(model) != "input_values":
        raise CheckpointError(
            f"{folder}: {main_input(model)} are made from sound by a feature extractor; the directory has no "
            f"{_PREPARATION}"
        )
    if extractor is None:
        notes.append(f"recordings were scaled to mean 0 and variance 1: the directory has no {_PREPARATION}")
    for file in files:
        samples, rate = read_wave(file)
        if extractor is None:
            yield {main_input(model): ((samples - samples.mean()) / (samples.var(unbiased=False) + 1e-7).sqrt())[None]}
            continue
        try:
            made = extractor(samples.numpy(), sampling_rate=rate, return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{file}: {rate} samples per second: {error}") from error
        yield {key: torch.as_tensor(value) for key, value in made.items() if _numbers(value)}


def read_wave(file: Path) -> tuple[Tensor, int]:
    """A WAV file's samples in [-1, 1], channels averaged, and how many there are per second. Raises: DataError."""
    try:
        with wave.open(str(file)) as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            raw = opened.readframes(opened.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{file}: cannot be read as a WAV file of whole numbers (PCM): {error}") from error
    data = np.frombuffer(raw[: len(raw) // (width * channels) * width * channels], dtype=np.uint8).reshape(-1, width)
    if not len(data):
        raise DataError(f"{file}: holds no sound")
    if width == 1:  # unsigned
        values = (data[:, 0].astype(np.float32) - 128) / 128
    else:
        padded = np.zeros((len(data), 4), dtype=np.uint8)
        padded[:, 4 - width :] = data
        values = padded.reshape(-1).view("<i4").astype(np.float32) / 2**31
    return torch.from_numpy(values.reshape(-1, channels).mean(1)), rate


def _size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images a model's config names."""
    size: Any = getattr(model.config, "image_size", None) or _SIDE
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _loaded(kind: Any, folder: Path, trusted: bool) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=trusted)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        way = (
            "; code that came with it runs with --trust-remote-code only"
            if not trusted and "trust_remote_code" in str(error)
            else ""
        )
        raise CheckpointError(
            f"{folder / _PREPARATION}: cannot be loaded: {str(error).strip().splitlines()[0]}{way}"
        ) from error


def _numbers(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")
