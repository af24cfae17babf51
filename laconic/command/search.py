"""`laconic search`."""

import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.command.console import Terminal
from laconic.command.group import guard
from laconic.command.options import DeviceOption, JsonOption, TrustOption
from laconic.command.output import emit, err, note, print_rows
from laconic.command.problem import (
    BATCH,
    LENGTH,
    BatchOption,
    DataOption,
    LengthOption,
    ObjectiveOption,
    PlanOption,
    Problem,
    RecoveryOption,
    SchemeOption,
    SeedOption,
    SourceArgument,
    TaskOption,
    TestOption,
    TokensOption,
    read_scheme,
)
from laconic.command.shown import shown

if TYPE_CHECKING:
    from torch import nn


def search(
    source: SourceArgument = None,
    task: TaskOption = None,
    data: DataOption = None,
    test: TestOption = None,
    scheme: SchemeOption = None,
    plan: PlanOption = None,
    objective: ObjectiveOption = None,
    keep: Annotated[
        float, typer.Option(min=0, help="How far the validation score may fall below the original's.")
    ] = 0.02,
    recovery: RecoveryOption = None,
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
    train_tokens: TokensOption = 1_000_000,
    length: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search a scheme's Free values: the best objective whose recovered score stays within --keep of the original's."""

    def work() -> None:
        from laconic.disk.lock import locked
        from laconic.measure.goals import within
        from laconic.measure.objectives import parse_objective
        from laconic.recover import parse_recovery, usual_recovery
        from laconic.search.call import search_task
        from laconic.search.checks import check_first
        from laconic.search.options import SearchOptions
        from laconic.search.result import publish, with_sizes
        from laconic.show.search_page import search_summary, write_search_page

        chosen = read_scheme(scheme, plan)
        asked = parse_recovery(recovery) if recovery is not None else None
        goals = tuple(parse_objective(text) for text in objective or ["stored_bytes"])
        problem = Problem(
            source=source,
            task=task,
            data=data,
            test=test,
            train_tokens=train_tokens,
            length=length or LENGTH,
            batch=batch or BATCH,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        options = SearchOptions(
            trials=trials,
            minutes=minutes,
            storage=storage,
            name=name,
            warm_share=None if cold else 0.5,
            early_stop=not no_early_stop,
            thin=not no_thin,
            sampler=sampler,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            command=shlex.join(["laconic", *sys.argv[1:]]),
        )

        def ready(model: "nn.Module") -> None:
            check_first(
                model,
                chosen,
                goals=goals,
                keep=within(keep),
                how=asked or usual_recovery(chosen, model),
                out=out,
                options=options,
            )

        with ExitStack() as stack:
            stack.enter_context(locked(out, shared=True))
            terminal = stack.enter_context(Terminal(quiet=as_json, brief=True))
            model, trained = problem.open(terminal, out, ready)
            found = search_task(
                model,
                chosen,
                trained,
                goals,
                keep=within(keep),
                how=asked or usual_recovery(chosen, model),
                out=out,
                options=options,
                progress=terminal,
            )
            result, notes = found.result, []
            if source is not None:
                notes = _complete(
                    out, found.model, original=model, source=source, example=trained.sample(), trusted=trust_remote_code
                )
                result = with_sizes(result, found.path)
                publish(out, result, write_search_page)
        for text in notes:
            note(text)
        if as_json:
            emit(result)
            return
        print_rows(search_summary(result))
        err.print(f"model: {shown(found.path)}, report: {shown(found.report)}", markup=False)

    guard(work, "; finished trials are kept: run the same command with --resume")


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
            f"stock transformers cannot load the thinned model: {error}; laconic.load_into(original, "
            f"{str(out / 'model')!r}) does"
        ]
    return [
        *copy_companions(folder, source, trusted),
        f"the thinned model as an ordinary transformers checkpoint: {folder}",
    ]
