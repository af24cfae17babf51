"""ResNet-20 and ResNet-56 on CIFAR-10: accuracy of the stored file at 8 to 2 bits and at 50 to 95 % sparsity, one-shot.

Every row compresses the module in memory, saves it, loads the file into a fresh network and measures that network on test images.
All matrices are compressed, the first convolution and the classifier included; batch norms stay in float32 as trained: nothing is
fine-tuned and no statistics of batch norms are estimated again. The error bar is the binomial standard error; differences from the
original on the same images are surer than that, which `agreement` (same class as the original) shows.
"""

import copy
import io
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import parser, record, shared, show

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import laconic as lc

MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]),
    torch.tensor([0.229, 0.224, 0.225]),
)  # what the pretrained weights expect
KINDS = ("bits", "sparsity")
BATCH, CHECKED = 250, 100  # images at a time; images on which the module in memory and the reloaded file must agree


class Block(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut: stride 2 by subsampling, new channels zero. Source: He et al. 2015, section 4.2."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """6n + 2 layers: n blocks of 16, 32 and 64 channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(n, 16, 16, 1), _stage(n, 16, 32, 2), _stage(n, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def _stage(n: int, before: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(Block(before if i == 0 else channels, channels, stride if i == 0 else 1) for i in range(n)))


def resnet(layers: int) -> ResNet:
    """An untrained CIFAR ResNet of so many layers, in evaluation mode."""
    return ResNet((layers - 2) // 6).eval()


def pixels(file: Path, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first images as decoded, uint8 [n, 32, 32, 3], and their labels [n]."""
    stored = np.load(file)
    data, offsets, labels = stored["jpeg"].tobytes(), stored["offsets"], stored["labels"][:count]
    decoded = [
        np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in range(len(labels))
    ]
    return np.stack(decoded), labels


def images(file: Path, count: int | None) -> tuple[Tensor, Tensor]:
    """The first images [n, 3, 32, 32], normalised (channels last in memory, which convolutions like), and labels."""
    decoded, labels = pixels(file, count)
    x = torch.from_numpy(decoded).float().div_(255).sub_(MEAN).div_(STD).permute(0, 3, 1, 2)
    return x, torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def classes(model: nn.Module, x: Tensor) -> Tensor:
    """The class the model gives each image; its weights are decoded once for all of them."""
    with nn.utils.parametrize.cached():
        return torch.cat([model(part).argmax(1) for part in x.split(BATCH)])


def schemes(kind: str) -> Iterator[tuple[str, str]]:
    """(level, scheme) of every row."""
    for bits in (8, 4, 3, 2) if kind == "bits" else ():
        for scheme in (
            f"RTN(bits={bits}, group='channel', clip='mse')",
            f"GPTQ(bits={bits}, group='channel')",
            f"KMeans(bits={bits})",
            f"KMeans(bits={bits}, weights='hessian')",
            f"GPTQ(rate={bits + 0.25})",
        ):
            yield f"{bits} bits", scheme
    for share in (0.5, 0.7, 0.8, 0.9, 0.95) if kind == "sparsity" else ():
        for method in ("Magnitude({})", "Magnitude({}, scope='model')", "Wanda({})", "SparseGPT({})"):
            yield f"{share:.0%}", method.format(share)


def measure(model: ResNet, scheme: str, args: Namespace, data: dict[str, Tensor]) -> dict[str, Any]:
    """Compress a copy, save, load into a fresh network, and compare that with the truth and with the original."""
    started = time.time()
    calibration = list(data["calibration"].split(64))
    compressed, report = lc.compress(copy.deepcopy(model), f"[('*', {scheme})]", data=calibration, seed=args.seed)
    seconds = time.time() - started
    in_memory = classes(compressed, data["x"][:CHECKED])
    with tempfile.TemporaryDirectory() as folder:
        stored = lc.save(compressed, folder, scheme=scheme)
        reloaded = lc.load_into(copy.deepcopy(model).apply(_forget), folder)
        found = classes(reloaded, data["x"])
    if not torch.equal(found[:CHECKED], in_memory):
        raise SystemExit(f"{scheme}: the stored file does not answer as the module in memory did")
    entries = sum(site["shape"][0] * site["shape"][1] for site in report.sites)
    zeros = sum(int((parameter == 0).sum()) for parameter in _matrices(reloaded))
    return {
        "stored bytes": stored, "ratio": round(data["bytes"].item() / stored, 2), "matrix bits": round(report.matrix_bits, 3),
        "zeros": round(zeros / entries, 4), **judged(found, data), "seconds": round(seconds, 1),
    }  # fmt: skip


def judged(found: Tensor, data: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy with its standard error, and the share of images that get the class the original gives them."""
    accuracy = float((found == data["labels"]).float().mean())
    error = (accuracy * (1 - accuracy) / len(found)) ** 0.5
    return {
        "accuracy": round(accuracy, 4), "+-": round(error, 4), "agreement": round(float((found == data["reference"]).float().mean()), 4),
    }  # fmt: skip


def _forget(module: nn.Module) -> None:
    """Nothing of the original may be left in what the file is loaded into."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.zero_()


def _matrices(model: nn.Module) -> list[Tensor]:
    return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, nargs="+", default=[20, 56], choices=(20, 56))
    options.add_argument("--kind", choices=("both", *KINDS), default="both")
    options.add_argument("--images", type=int, default=2000, help="test images; the set holds 5,000")
    options.add_argument("--samples", type=int, default=128, help="calibration images, from the training set")
    args = options.parse_args()
    x, labels = images(shared(args, "data/cifar10-test.npz"), args.images)
    calibration, _ = images(shared(args, "data/cifar10-train.npz"), args.samples)
    for layers in args.layers:
        file = shared(args, f"models/cifar-resnet{layers}.safetensors")
        model = resnet(layers)
        model.load_state_dict(load_file(file))
        reference, size = classes(model, x), file.stat().st_size
        data = {
            "x": x,
            "labels": labels,
            "calibration": calibration,
            "reference": reference,
            "bytes": torch.tensor(size),
        }
        original = {
            "level": "original",
            "scheme": "float32",
            "stored bytes": size,
            "ratio": 1.0,
            "matrix bits": 32.0,
            **judged(reference, data),
        }
        for kind in KINDS if args.kind == "both" else (args.kind,):
            rows: list[dict[str, Any]] = [original]
            for level, scheme in schemes(kind):
                rows.append({"level": level, "scheme": scheme, **measure(model, scheme, args, data)})
                print(rows[-1], flush=True)
                record(f"cnn-resnet{layers}-{kind}", rows, args, network=f"ResNet-{layers}", test_images=len(x))
            show(f"ResNet-{layers}, {len(x)} test images", rows)


if __name__ == "__main__":
    main()
