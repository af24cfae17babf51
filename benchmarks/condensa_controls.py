"""What surrounds Condensa's table: the original trained on as long as a compressed network is, and L-C with the published code's restarts.

    python benchmarks/condensa_controls.py --threads 1      # about 20 minutes on one core

`control`: the recovery of the table's ResNet-20 rows with nothing compressed, the same minibatches of the same data with the same share of
distillation, so that what training alone gives or takes can be seen. `restarts`: L-C at a sparsity of 0.9 with one learning rate that falls
over the run (as here), one that falls in every L-step anew, an optimizer without momentum at the beginning of each, and both.
The table's reference is the pretrained network trained on for 6 passes (`tasks.py`), an hour of one core; `--pretrained` begins from the
pretrained network itself. A row that was finished before is read from `benchmarks/work/`.
"""

import json
from argparse import Namespace
from typing import Any

from common import parser, record, shared, show

import cnn
import tasks
import torch
from condensa import ROWS, recovery
from safetensors.torch import load_file
from torch import nn

import laconic as lc
from laconic.recover import recover_task

WORK = tasks.WORK / "condensa_controls"
NETWORK = "resnet20"
PRUNED = "Magnitude(0.9, scope='model') >> Cast('float16')"
RESTARTS = {
    "one schedule": (False, False),
    "rate anew": (True, False),
    "optimizer anew": (False, True),
    "both": (True, True),
}


def problem(args: Namespace) -> tuple[nn.Module, lc.Task]:
    """The reference and its data."""
    if not args.pretrained:
        return tasks.task(NETWORK, args)
    train, validation, test = tasks.cifar(args)
    model = cnn.resnet(int(NETWORK[6:]))
    model.load_state_dict(load_file(shared(args, f"models/cifar-{NETWORK}.safetensors")))
    return model.eval(), lc.Task(train, validation, test, example=next(iter(validation))[0][:128])


def control(seed: int, args: Namespace) -> dict[str, Any]:
    """The original, trained on as the table's rows of its network are recovered."""
    model, task = problem(args)
    how = recovery(next(row for row in ROWS if row.network == NETWORK), paper=False)
    before = task.judge(model, task.test).score
    _, found = recover_task(model, "[('*', Cast('float32'))]", how, task, seed=seed)
    assert found.test_score is not None
    return {
        "network": NETWORK, "what": "trained on, nothing compressed", "seed": seed, "minibatches": found.minibatches, "validation": found.score,
        "reference": before, "test": found.test_score, "gain": found.test_score - before,
    }  # fmt: skip


def restarts(what: str, seed: int, args: Namespace) -> dict[str, Any]:
    """L-C with short L-steps, the learning rate and the optimizer going on or beginning anew."""
    model, task = problem(args)
    rate, optimizer = RESTARTS[what]
    how = lc.LC(
        steps=args.steps, minibatches=args.minibatches, a=1.6, learn=lc.Steps(lr=0.03, lr_end=0.003), norm_batches=8, restart_rate=rate,
        restart_optimizer=optimizer,
    )  # fmt: skip
    _, found = recover_task(model, PRUNED, how, task, seed=seed)
    return {
        "network": NETWORK, "what": what, "seed": seed, "minibatches": found.minibatches, "direct": found.direct, "validation": found.score,
        "validation loss": found.loss, "test": found.test_score,
    }  # fmt: skip


def kept(name: str, make: Any) -> dict[str, Any]:
    """A row of an earlier run, or the one made now."""
    file = WORK / f"{name}.json"
    if not file.is_file():
        WORK.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make()))
    return dict(json.loads(file.read_text()))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--steps", type=int, default=4, help="L-steps of the rows with restarts")
    options.add_argument("--minibatches", type=int, default=20, help="of an L-step there")
    options.add_argument(
        "--pretrained", action="store_true", help="from the pretrained network, not the table's reference"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    lines, rows = [], []
    for seed in range(args.seeds):
        start = "pretrained-" if args.pretrained else ""
        lines.append(kept(f"{start}control-{seed}", lambda seed=seed: control(seed, args)))
        print(lines[-1], flush=True)
        for what in RESTARTS:
            name = f"{start}{what.replace(' ', '-')}-{seed}-{args.steps}-{args.minibatches}"
            rows.append(kept(name, lambda what=what, seed=seed: restarts(what, seed, args)))
            print(rows[-1], flush=True)
    record("condensa_controls", lines, args, restarts=rows)
    show("The original trained on", lines)
    show("L-C with restarts", rows)


if __name__ == "__main__":
    main()
