"""ResNet-20 on CIFAR-10 with 8-bit weights and inputs rounded to 8, 6 and 4 bits: accuracy of every way to find the range of an input.

All matrices and all inputs are rounded, those of the first convolution and of the classifier included; nothing is trained. A row compresses
the module in memory, saves it, loads the file into a fresh network and measures that network on test images, as `cnn.py` does. "zero point":
inputs behind ReLU, which are never negative, then have all levels for what they hold.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from common import parser, record, shared, show

from cnn import classes, images, judged, resnet
from safetensors.torch import load_file
from torch import Tensor, nn

import laconic as lc

WEIGHTS = "RTN(bits=8, group='channel', clip='mse')"
RANGES = {
    "dynamic": "every input's own",
    "minmax": "calibrated, least and largest",
    "mse": "calibrated, least squared error",
}


def schemes() -> Iterator[dict[str, Any]]:
    """The scheme of every row, and what it is in words."""
    yield {"input bits": 32, "range": "as they are", "grid": "", "scheme": WEIGHTS}
    for bits in (8, 6, 4):
        for symmetric in (True, False):
            for range_, words in RANGES.items():
                how = f"bits={bits}, granularity='tensor', symmetric={symmetric}, range='{range_}'"
                grid = "symmetric" if symmetric else "zero point"
                yield {"input bits": bits, "range": words, "grid": grid, "scheme": f"RoundInputs({WEIGHTS}, {how})"}


def answers(model: nn.Module, scheme: str, calibration: list[Tensor], x: Tensor, seed: int) -> Tensor:
    """The classes that the stored file gives."""
    compressed, _ = lc.compress(copy.deepcopy(model), f"[('*', {scheme})]", data=calibration, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        lc.save(compressed, folder, scheme=scheme)
        return classes(lc.load_into(resnet(20), folder).eval(), x)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=2000, help="test images; the set holds 5,000")
    options.add_argument("--samples", type=int, default=128, help="calibration images, from the training set")
    args = options.parse_args()
    x, labels = images(shared(args, "data/cifar10-test.npz"), args.images)
    calibration = list(images(shared(args, "data/cifar10-train.npz"), args.samples)[0].split(64))
    model = resnet(20)
    model.load_state_dict(load_file(shared(args, "models/cifar-resnet20.safetensors")))
    data = {"labels": labels, "reference": classes(model, x)}
    rows: list[dict[str, Any]] = [
        {
            "input bits": 32,
            "range": "as they are, weights too",
            "grid": "",
            "scheme": "float32",
            **judged(data["reference"], data),
        }
    ]
    for row in schemes():
        started = time.time()
        found = judged(answers(model, row["scheme"], calibration, x, args.seed), data)
        rows.append({**row, **found, "seconds": round(time.time() - started, 1)})
        print(rows[-1], flush=True)
        record("inputs", rows, args, network="ResNet-20", test_images=len(x))
    show(f"ResNet-20, {len(x)} test images", rows)


if __name__ == "__main__":
    main()
