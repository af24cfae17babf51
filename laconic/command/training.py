"""The commands that train: `laconic search` and `laconic recover`."""

import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.command.commands import Device, Json, Trust, emit, err, guard, note, print_rows
from laconic.command.console import Terminal
from laconic.command.shown import shown
from laconic.errors import SchemeError
from laconic.host.progress import Progress

if TYPE_CHECKING:
    from torch import nn

Source = Annotated[
    str | None, typer.Argument(help="A language model: a directory with safetensors, or a hub id. Not with --task.")
]
TaskFile = Annotated[
    Path | None,
    typer.Option(
        "--task", help="A Python file that defines model, train, validation (and test, loss, score, example)."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text for a language model: trained on, the last fifth kept for validation and test; self: text it writes itself."
    ),
]
Test = Annotated[str | None, typer.Option(help="Text for the final figures; without it, the last tenth of --data.")]
Scheme = Annotated[str | None, typer.Option(help="The scheme, as an expression.")]
Plan = Annotated[Path | None, typer.Option(help="A Python file whose variable `scheme` is the scheme.")]
How = Annotated[
    str | None,
    typer.Option(
        "--recovery",
        help="LC(...), FineTune(...), Direct() or another recovery, as an expression; if not given, what suits the scheme.",
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Training tokens drawn from --data.")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens per window; 128, or what --method has.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Windows per minibatch; 16, or what --method has.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Goals = Annotated[
    list[str] | None,
    typer.Option(
        help="What to improve, such as throughput or 'min flops'; stored_bytes if not given. Several give a Pareto front."
    ),
]

_LENGTH, _BATCH = 128, 16


def search(
    source: Source = None,
    task: TaskFile = None,
    data: Text = None,
    test: Test = None,
    scheme: Scheme = None,
    plan: Plan = None,
    objective: Goals = None,
    keep: Annotated[
        float, typer.Option(min=0, help="How far the validation score may fall below the original's.")
    ] = 0.02,
    recovery: How = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials, shared by all workers.")] = 10,
    minutes: Annotated[float | None, typer.Option(min=0, help="Wall-clock time of this worker.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of models, study and report.")] = Path("search"),
    storage: Annotated[
        str | None, typer.Option(help="SQLite file or database URL of the study; by default study.db in --out.")
    ] = None,
    name: Annotated[str, typer.Option(help="The study's name in its storage.")] = "search",
    sampler: Annotated[str, typer.Option(help="auto, two-sided, drucb (as published), gp or tpe.")] = "auto",
    cold: Annotated[bool, typer.Option("--cold", help="Every trial starts from the original.")] = False,
    no_early_stop: Annotated[bool, typer.Option("--no-early-stop", help="Carry every trial to its end.")] = False,
    no_thin: Annotated[bool, typer.Option("--no-thin", help="Leave cut channels in place, as zeros.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study, or join it as another worker.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier search in --out.")] = False,
    train_tokens: Tokens = 1_000_000,
    length: Length = None,
    batch: Batch = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Search a scheme's Free values: the best objective whose recovered score stays within --keep of the original's."""

    def work() -> None:
        from laconic.disk.lock import locked
        from laconic.measure.goals import within
        from laconic.measure.objectives import parse_objective
        from laconic.recover import parse_recovery, usual_recovery
        from laconic.search.checks import check_first
        from laconic.search.report import search_summary, with_sizes, write_search_report
        from laconic.search.run import SearchOptions, search_task

        chosen = _scheme(scheme, plan)
        asked = parse_recovery(recovery) if recovery is not None else None
        goals = tuple(parse_objective(text) for text in objective or ["stored_bytes"])
        windows = length or _LENGTH, batch or _BATCH
        options = SearchOptions(
            trials=trials, minutes=minutes, storage=storage, name=name, warm_share=None if cold else 0.5, early_stop=not no_early_stop,
            thin=not no_thin, sampler=sampler, resume=resume, overwrite=overwrite, seed=seed,
            command=shlex.join(["laconic", *sys.argv[1:]]),
        )  # fmt: skip

        def ready(model: "nn.Module") -> None:
            check_first(model, chosen, goals, within(keep), asked or usual_recovery(chosen, model), out, options)

        with ExitStack() as stack:
            stack.enter_context(locked(out, shared=True))
            terminal = stack.enter_context(Terminal(quiet=as_json, brief=True))
            model, problem = _problem(
                source, task, data, test, train_tokens, *windows, seed, device, trust_remote_code, terminal, out, ready
            )
            found = search_task(
                model,
                chosen,
                problem,
                goals,
                within(keep),
                asked or usual_recovery(chosen, model),
                out,
                options,
                terminal,
            )
            result, notes = found.result, []
            if source is not None:
                notes = _complete(out, found.model, model, source, problem.sample(), trust_remote_code)
                result = with_sizes(result, found.path)
                write_search_report(out, result)
        for text in notes:
            note(text)
        if as_json:
            emit(result)
            return
        print_rows(search_summary(result))
        err.print(f"model: {shown(found.path)}, report: {shown(found.report)}", markup=False)

    guard(work, "; finished trials are kept: run the same command with --resume")


def recover(
    source: Source = None,
    task: TaskFile = None,
    data: Text = None,
    test: Test = None,
    scheme: Scheme = None,
    plan: Plan = None,
    recovery: How = None,
    method: Annotated[
        str | None, typer.Option(help="A published recipe instead of --scheme and --recovery: dkm or llm-qat.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="Bits per weight of --method; 3 for dkm, 4 for llm-qat.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("recovered"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")] = False,
    train_tokens: Tokens = 1_000_000,
    length: Length = None,
    batch: Batch = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compress a model under a scheme and train it so that it loses less: L-C, or fine-tuning with masks, scales and tables kept."""

    def work() -> None:
        from laconic.disk.lock import locked
        from laconic.engine.resolve import resolve
        from laconic.model.sites import find_slots
        from laconic.recover import usual_recovery
        from laconic.recover.deliver import check_folder, recover_directory

        chosen, asked, windows, text = _way(scheme, plan, recovery, method, bits, length, batch, data, task)

        def ready(model: "nn.Module") -> None:
            check_folder(out, resume, overwrite)
            resolve(chosen, find_slots(model))

        with locked(out), Terminal(quiet=as_json, brief=True) as terminal:
            check_folder(out, resume, overwrite)
            model, problem = _problem(
                source, task, text, test, train_tokens, *windows, seed, device, trust_remote_code, terminal, out, ready
            )
            result = recover_directory(
                model, chosen, asked or usual_recovery(chosen, model), problem, out, source=source, resume=resume, overwrite=overwrite, seed=seed,
                command=shlex.join(["laconic", *sys.argv[1:]]), progress=terminal, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        if as_json:
            emit(result)
            return
        print_rows(
            [
                (key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
                for key, value in _short(result).items()
            ]
        )
        err.print(f"model: {shown(out)}, figures: {shown(out / 'recovery.json')}", markup=False)

    guard(work, "; what is finished is kept: run the same command with --resume")


def _scheme(scheme: str | None, plan: Path | None) -> Any:
    from laconic.scheme.text import load_plan, parse

    if (scheme is None) == (plan is None):
        raise SchemeError("give --scheme or --plan, one of them")
    return load_plan(plan) if plan is not None else parse(str(scheme))


def _way(
    scheme: str | None, plan: Path | None, recovery: str | None, method: str | None, bits: int | None, length: int | None, batch: int | None,
    data: str | None, task: Path | None,
) -> tuple[Any, Any, tuple[int, int], str | None]:  # fmt: skip
    """The scheme, how it is trained if that is said, tokens per window and windows per minibatch, and the text: as given, or a recipe's."""
    from laconic.recover import parse_recovery
    from laconic.recover.recipes import recipe
    from laconic.scheme.text import parse

    asked = parse_recovery(recovery) if recovery is not None else None
    if method is None:
        if bits is not None:
            raise SchemeError("--bits belongs to --method; a scheme names its bits itself")
        return _scheme(scheme, plan), asked, (length or _LENGTH, batch or _BATCH), data
    if scheme is not None or plan is not None:
        raise SchemeError(f"--method {method} brings its own scheme: give it or --scheme (or --plan)")
    found = recipe(method, bits)
    return (
        parse(found.scheme),
        asked or found.how,
        (length or found.length, batch or found.batch),
        data or (found.data if task is None else None),
    )


def _problem(
    source: str | None, task: Path | None, data: str | None, test: str | None, train_tokens: int, length: int, batch: int, seed: int, device: str,
    trust_remote_code: bool, progress: Progress, out: Path, ready: Callable[["nn.Module"], None],
) -> "tuple[nn.Module, Any]":  # fmt: skip
    from laconic.host.machine import pick_device
    from laconic.recover import load_task
    from laconic.recover.text import text_task

    if (source is None) == (task is None):
        raise SchemeError("give a language model and --data, or --task FILE.py, one of them")
    if task is not None and (data is not None or test is not None):
        raise SchemeError(f"{task}: a task file names its own data; --data and --test are for a language model")
    if task is not None:
        model, problem = load_task(task)
        return model.to(pick_device(device)), problem
    if data is None:
        raise SchemeError(f"{source}: a language model needs --data, a text to learn from")
    model, problem = text_task(
        str(source), data, test, train_tokens=train_tokens, length=length, batch=batch, seed=seed, trust_remote_code=trust_remote_code,
        dtype="auto",  # what a search and a recovery compare their result with; they compute in float32
        device=pick_device(device), progress=progress, out=out, ready=ready,
    )  # fmt: skip
    return model, problem


def _complete(
    out: Path, delivered: "nn.Module", original: "nn.Module", source: str, example: Any, trusted: bool
) -> list[str]:
    """Make the folder of a language model one that loads by itself; says how to load one that cannot."""
    from laconic.errors import SurgeryError
    from laconic.recover.text import complete_directory, copy_companions
    from laconic.surgery import save_pretrained, shapes

    if not shapes(delivered, original):
        return complete_directory(out / "model", original, source, trusted)
    folder = out / "transformers"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        save_pretrained(delivered, folder, example)
    except SurgeryError as error:
        return [
            f"stock transformers cannot load the thinned model: {error}; laconic.load_into(original, {str(out / 'model')!r}) does"
        ]
    return [
        *copy_companions(folder, source, trusted),
        f"the thinned model as an ordinary transformers checkpoint: {folder}",
    ]


def _short(result: dict[str, Any]) -> dict[str, Any]:
    names = (
        "reference_score",
        "direct_score",
        "score",
        "reference_test_score",
        "test_score",
        "stored_bytes",
        "original_bytes",
        "minibatches",
        "seconds",
    )
    return {name: result[name] for name in names if result.get(name) is not None}
