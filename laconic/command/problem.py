"""What the commands that train are given: a language model and text, or a task file, and a scheme."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.errors import SchemeError
from laconic.host.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from laconic.recover import Task

SourceArgument = Annotated[
    str | None, typer.Argument(help="A language model: a directory with safetensors, or a hub id. Not with --task.")
]
TaskOption = Annotated[
    Path | None,
    typer.Option(
        "--task", help="A Python file that defines model, train, validation (and test, loss, score, example)."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help=(
            "Text for a language model: trained on, the last fifth kept for validation and test; self: text it writes "
            "itself."
        )
    ),
]
TestOption = Annotated[
    str | None, typer.Option(help="Text for the final figures; without it, the last tenth of --data.")
]
SchemeOption = Annotated[str | None, typer.Option(help="The scheme, as an expression.")]
PlanOption = Annotated[Path | None, typer.Option(help="A Python file whose variable `scheme` is the scheme.")]
RecoveryOption = Annotated[
    str | None,
    typer.Option(
        "--recovery",
        help=(
            "LC(...), FineTune(...), Direct() or another recovery, as an expression; if not given, what suits the "
            "scheme."
        ),
    ),
]
TokensOption = Annotated[int, typer.Option(min=1, help="Training tokens drawn from --data.")]
LengthOption = Annotated[int | None, typer.Option(min=2, help="Tokens per window; 128, or what --method has.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Windows per minibatch; 16, or what --method has.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option(
        help=(
            "What to improve, such as throughput or 'min flops'; stored_bytes if not given. Several give a Pareto "
            "front."
        )
    ),
]

LENGTH, BATCH = 128, 16


@dataclass(frozen=True)
class Problem:
    """What a model is trained on, in the words of a command: a language model `source` with `data`, or a `task` file.

    `length` tokens per window, `batch` windows per minibatch.
    """

    source: str | None
    task: Path | None
    data: str | None
    test: str | None
    train_tokens: int
    length: int
    batch: int
    seed: int
    device: str
    trust_remote_code: bool

    def open(self, progress: Progress, out: Path, ready: Callable[["nn.Module"], None]) -> "tuple[nn.Module, Task]":
        """The model and its task; `ready(model)` is called before text is read, to refuse what can be refused then.

        Raises: SchemeError where the words do not go together, and what reading them raises.
        """
        from laconic.host.machine import pick_device
        from laconic.recover import load_task
        from laconic.recover.text import text_task

        if (self.source is None) == (self.task is None):
            raise SchemeError("give a language model and --data, or --task FILE.py, one of them")
        device = pick_device(self.device)
        if self.task is not None:
            if self.data is not None or self.test is not None:
                raise SchemeError(
                    f"{self.task}: a task file names its own data; --data and --test are for a language model"
                )
            model, task = load_task(self.task)
            return model.to(device), task
        if self.data is None:
            raise SchemeError(f"{self.source}: a language model needs --data, a text to learn from")
        return text_task(
            str(self.source),
            self.data,
            self.test,
            train_tokens=self.train_tokens,
            length=self.length,
            batch=self.batch,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            dtype="auto",  # what a search and a recovery compare their result with; they compute in float32
            device=device,
            progress=progress,
            out=out,
            ready=ready,
        )


def read_scheme(scheme: str | None, plan: Path | None) -> Any:
    """The scheme of --scheme or --plan. Raises: SchemeError unless exactly one of them is given."""
    from laconic.scheme.text import load_plan, parse

    if (scheme is None) == (plan is None):
        raise SchemeError("give --scheme or --plan, one of them")
    return load_plan(plan) if plan is not None else parse(str(scheme))
