"""The tasks of the Condensa benchmark: networks, data split into train, validation and test, and references trained for them.

`python benchmarks/tasks.py NAME ...` trains the references; a benchmark that needs one trains it if it is not in `benchmarks/work/` yet.
The pretrained ResNets have seen all 50,000 training images, so these cannot validate: validation is 2,000 of the 5,000 images held out, and
test the other 3,000, which are not looked at before the end. References are tuned and compressed models recovered on 45,000 training images.
"""

import json
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, parser, shared

import cnn
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

import laconic as lc

WORK = ROOT / "benchmarks" / "work"
Batch = tuple[Tensor, Tensor]


@dataclass
class Images:
    """Minibatches (x [batch, 3, 32, 32], labels [batch]) of normalised images, in a new order and with crops and flips if `augment`,
    drawn from torch's global generator at the beginning of a pass, as a DataLoader does."""

    pixels: Tensor
    labels: Tensor
    batch: int = 128
    augment: bool = False

    def __len__(self) -> int:
        return math.ceil(len(self.pixels) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator()
        if self.augment:
            generator.manual_seed(int(torch.randint(2**62, ())))
        order = (
            torch.randperm(len(self.pixels), generator=generator) if self.augment else torch.arange(len(self.pixels))
        )
        for index in order.split(self.batch):
            x = (self.pixels[index].float().div_(255).sub_(cnn.MEAN).div_(cnn.STD)).permute(0, 3, 1, 2)
            yield (_augmented(x, generator) if self.augment else x), self.labels[index]


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels (zeros come in) and mirrored with probability 1/2."""
    n, padded = len(x), F.pad(x, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, n, 1), generator=generator)
    columns = dx + torch.arange(32)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    rows = dy + torch.arange(32)
    picked = padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


@dataclass
class Tokens:
    """Minibatches (ids [batch, length], the next ids [batch, length]) of one text cut into windows; shuffled if `shuffle`, like a DataLoader."""

    ids: Tensor
    length: int = 50
    batch: int = 30
    shuffle: bool = False

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length // self.batch

    def __iter__(self) -> Iterator[Batch]:
        count = (len(self.ids) - 1) // self.length
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order[: len(self) * self.batch].split(self.batch):
            at = index[:, None] * self.length + torch.arange(self.length)
            yield self.ids[at], self.ids[at + 1]


class VGG(nn.Sequential):
    """VGG-19 with batch norm for 32 x 32 images, its widths times `share`. Source: Simonyan and Zisserman 2014, configuration E."""

    def __init__(self, share: float = 1.0) -> None:
        layers: list[nn.Module] = []
        before = 3
        for stage, (width, count) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]):
            for _ in range(count):
                channels = int(width * share)
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2) if stage < 4 else nn.AdaptiveAvgPool2d(1))
        super().__init__(*layers, nn.Flatten(), nn.Linear(before, 10))


class LSTM(nn.Module):
    """Embedding, two LSTM layers with dropout between, and a linear decoder. Source: Condensa, section 4."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(vocabulary, width), nn.Dropout(0.5)
        self.lstm = nn.LSTM(width, width, 2, dropout=0.5, batch_first=True)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.drop(self.lstm(self.drop(self.embedding(ids)))[0]))


def cifar(args: Namespace, batch: int = 128) -> tuple[Images, Images, Images]:
    """Train (45,000), validation (2,000) and test (3,000) images; the last two are of the images no network was trained on."""
    made = []
    for name in ("train", "test"):
        cache = WORK / f"cifar10-{name}.safetensors"
        if not cache.exists():
            pixels, labels = cnn.pixels(shared(args, f"data/cifar10-{name}.npz"), None)
            WORK.mkdir(exist_ok=True)
            save_file({"pixels": torch.from_numpy(pixels), "labels": torch.from_numpy(labels.astype(np.int64))}, cache)
        made.append(load_file(cache))
    train, test = made
    cut, held_out = 45_000, 2_000
    return (
        Images(train["pixels"][:cut], train["labels"][:cut], batch, augment=True),
        Images(test["pixels"][:held_out], test["labels"][:held_out], 250),
        Images(test["pixels"][held_out:], test["labels"][held_out:], 250),
    )


def text(args: Namespace, characters: int = 4_000_000) -> tuple[Tokens, Tokens, Tokens]:
    """Train (the beginning of the books), validation (what follows) and test (a novel of its own) in the tokens of the 7M model."""
    tokenizer = AutoTokenizer.from_pretrained(shared(args, "models/books-llama-7m"))

    def ids(content: str) -> Tensor:
        return torch.tensor([i for line in content.splitlines(keepends=True) for i in tokenizer(line)["input_ids"]])

    books = shared(args, "data/books-train.txt").read_text()
    train, validation = books[:characters], books[characters : characters + 400_000]
    novel = shared(args, "data/dracula.txt").read_text()
    return (
        Tokens(ids(train), shuffle=True),
        Tokens(ids(validation)[:60_001], batch=60),
        Tokens(ids(novel)[:90_001], batch=60),
    )


def imagenet(args: Namespace) -> tuple[nn.Module, lc.Task]:
    """torchvision's pretrained VGG-16 with batch norm, on ILSVRC2012: trained on its training images, validated on 10,000 of the 50,000
    validation images (every fifth) and tested on the others; the score is top-5 accuracy, as in the paper.

    Exits with what is missing: torchvision (`pip install torchvision`, the release that belongs to this torch), its weights (a download of
    528 MB on first use), and `--imagenet FOLDER` with train/CLASS/*.JPEG (1.28 million images) and val/CLASS/*.JPEG.
    """
    try:
        from torchvision import datasets, models, transforms
    except ImportError:
        raise SystemExit(
            "the rows of vgg16 need torchvision, the release that belongs to this torch: pip install torchvision"
        ) from None
    folder = args.imagenet
    if folder is None or not all((folder / part).is_dir() for part in ("train", "val")):
        raise SystemExit(
            f"the rows of vgg16 need --imagenet FOLDER with train/CLASS/*.JPEG and val/CLASS/*.JPEG of ILSVRC2012, got {folder}"
        )
    normal = [transforms.ToTensor(), transforms.Normalize(cnn.MEAN.tolist(), cnn.STD.tolist())]
    varied = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *normal])
    plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *normal])
    held_out = datasets.ImageFolder(folder / "val", plain)
    fifth = list(range(0, len(held_out), 5))
    rest = sorted(set(range(len(held_out))) - set(fifth))

    def loader(data: Any, shuffle: bool = False) -> Any:
        return torch.utils.data.DataLoader(
            data, 256, shuffle=shuffle, num_workers=8, pin_memory=args.device.startswith("cuda")
        )

    def top5(output: Tensor, batch: Batch) -> Tensor:
        return (output.topk(5).indices == batch[1].unsqueeze(1)).any(1).float()

    validation = loader(torch.utils.data.Subset(held_out, fifth))
    made = lc.Task(
        loader(datasets.ImageFolder(folder / "train", varied), shuffle=True), validation, loader(torch.utils.data.Subset(held_out, rest)),
        score=top5, example=next(iter(validation))[0][:64],
    )  # fmt: skip
    return models.vgg16_bn(weights=models.VGG16_BN_Weights.IMAGENET1K_V1).eval(), made


NETWORKS = ("resnet20", "resnet56", "vgg", "lstm")
WIDTH = {"cpu": {"vgg": 0.25, "lstm": 256}, "cuda": {"vgg": 1.0, "lstm": 650}}
RECIPES = {  # passes over the training data, largest learning rate, weight decay
    "resnet20": (6, 0.02, 1e-4), "resnet56": (4, 0.02, 1e-4), "vgg": (20, 0.1, 5e-4), "lstm": (3, 0.003, 0.0),
}  # fmt: skip


def task(name: str, args: Namespace) -> tuple[nn.Module, lc.Task]:
    """The reference in evaluation mode, trained if it is not there, and its task: accuracy of images, minus the log-perplexity of text."""
    device = getattr(args, "device", "cpu")
    width = WIDTH["cuda" if device.startswith("cuda") else "cpu"]
    train, validation, test = text(args) if name == "lstm" else cifar(args)
    model: nn.Module = (
        LSTM(4096, int(width["lstm"]))
        if name == "lstm"
        else VGG(width["vgg"])
        if name == "vgg"
        else cnn.resnet(int(name[6:]))
    )
    made = lc.Task(train, validation, test, example=next(iter(validation))[0][:128])
    file = WORK / f"{name}-{sum(p.numel() for p in model.parameters())}-{args.seed}.safetensors"
    if not file.exists():
        if name.startswith("resnet"):
            model.load_state_dict(load_file(shared(args, f"models/cifar-{name}.safetensors")))
        WORK.mkdir(exist_ok=True)
        fit(name, model, made, file)
    model.load_state_dict(load_file(file))
    return model.eval(), made


def fit(name: str, model: nn.Module, made: lc.Task, file: Path) -> None:
    """Train the reference: SGD with Nesterov momentum for images, Adam for text; one cycle; products in bfloat16 where the machine has them."""
    started, images, (epochs, lr, decay) = time.time(), name != "lstm", RECIPES[name]
    torch.manual_seed(0)
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=decay)
        if images
        else torch.optim.Adam(parameters, lr)
    )
    steps = epochs * len(made.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    curve = []
    for epoch in range(epochs):
        model.train()
        for batch in made.train:
            with torch.autocast("cpu", torch.bfloat16, enabled=images):
                value = made.loss_of(model(batch[0]), batch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
        curve.append(made.judge(model, made.validation).score)
        print(
            f"{name}: pass {epoch + 1} of {epochs}, validation {curve[-1]:.4f}, {time.time() - started:.0f} s",
            flush=True,
        )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    file.with_suffix(".json").write_text(
        json.dumps({"validation": curve, "seconds": time.time() - started, "recipe": [epochs, lr, decay]}) + "\n"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", default=list(NETWORKS), help="which references")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names:
        model, made = task(name, args)
        validation, test = (made.judge(model, data).score for data in (made.validation, made.test))
        print(f"{name}: validation {validation:.4f}, test {test:.4f}", flush=True)


if __name__ == "__main__":
    main()
