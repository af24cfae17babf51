"""`laconic recover`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from laconic.command.console import Terminal
from laconic.command.group import guard
from laconic.command.options import DeviceOption, JsonOption, StatisticsOption, TrustOption
from laconic.command.output import emit, err, print_rows
from laconic.command.problem import (
    BATCH,
    LENGTH,
    BatchOption,
    DataOption,
    LengthOption,
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
from laconic.errors import SchemeError

if TYPE_CHECKING:
    from torch import nn

    from laconic.engine.checks import Prefix


def recover(
    source: SourceArgument = None,
    task: TaskOption = None,
    data: DataOption = None,
    test: TestOption = None,
    scheme: SchemeOption = None,
    plan: PlanOption = None,
    recovery: RecoveryOption = None,
    method: Annotated[
        str | None, typer.Option(help="A published recipe instead of --scheme and --recovery: dkm or llm-qat.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=1, max=8, help="Bits per weight of --method; 3 for dkm, 4 for llm-qat.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="A compressed directory made of the model: instead of compressing, its blocks are trained one after "
            "the other, with one in memory at a time, by --recovery AdaRound(...) or Blockwise(...)."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("recovered"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")] = False,
    train_tokens: TokensOption = 1_000_000,
    length: LengthOption = None,
    batch: BatchOption = None,
    statistics: StatisticsOption = "original",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model under a scheme and train it so that it loses less: L-C, or fine-tuning with masks, scales and
    tables kept.
    """

    def work() -> None:
        from laconic.disk.lock import locked
        from laconic.engine.checks import check_prefix
        from laconic.recover import usual_recovery
        from laconic.recover.deliver import check_folder, recover_directory
        from laconic.recover.projection import compressed_slots

        if start is not None:
            others = {
                "--task": task,
                "--test": test,
                "--scheme": scheme,
                "--plan": plan,
                "--method": method,
                "--bits": bits,
                "--statistics": None if statistics == "original" else statistics,
            }
            _refuse_beside_start(others)
            with Terminal(quiet=as_json, brief=True) as terminal:
                told = _part_by_part(
                    source, start, recovery, data, out, length or LENGTH, batch or BATCH, seed=seed, device=device,
                    resume=resume, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=terminal,
                )  # fmt: skip
            if as_json:
                emit(told)
                return
            print_rows(
                [
                    (part["part"], part["note"] or f"error {part['before']:.4g} to {part['after']:.4g}")
                    for part in told["parts"]
                ]
            )
            err.print(f"model: {shown(out)}", markup=False)
            return
        check_prefix(statistics)
        choice = _choice(scheme, plan, recovery, method, bits)
        chosen = choice.scheme
        problem = Problem(
            source=source,
            task=task,
            data=data or (choice.data if task is None else None),
            test=test,
            train_tokens=train_tokens,
            length=length or choice.length,
            batch=batch or choice.batch,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
        )

        def ready(model: "nn.Module") -> None:
            check_folder(out, resume, overwrite)
            slots = compressed_slots(model, chosen)
            (choice.how or usual_recovery(chosen, model)).check(model, slots)

        with locked(out), Terminal(quiet=as_json, brief=True) as terminal:
            check_folder(out, resume, overwrite)
            model, trained = problem.open(terminal, out, ready)
            result = recover_directory(
                model,
                chosen,
                choice.how or usual_recovery(chosen, model),
                trained,
                out,
                source=source,
                resume=resume,
                overwrite=overwrite,
                seed=seed,
                command=shlex.join(["laconic", *sys.argv[1:]]),
                progress=terminal,
                trust_remote_code=trust_remote_code,
                statistics=cast("Prefix", statistics),
            )
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


def _refuse_beside_start(given: dict[str, Any]) -> None:
    """Raises SchemeError for options that say how a model is compressed or judged, beside one that is compressed."""
    for name, value in given.items():
        if value is not None:
            raise SchemeError(
                f"--start is compressed already, and its blocks are trained without labels: leave out {name}"
            )


def _part_by_part(
    source: str | None,
    start: Path,
    recovery: str | None,
    data: str | None,
    out: Path,
    length: int,
    batch: int,
    *,
    seed: int,
    trust_remote_code: bool,
    progress: Terminal,
    **options: Any,
) -> dict[str, Any]:
    """What the blocks of a compressed directory were trained to, on a text."""
    from laconic.data.text import calibration_windows, read_text
    from laconic.disk.load import fetch, load_tokenizer
    from laconic.recover import parse_recovery
    from laconic.recover.blockwise import Reconstruction
    from laconic.recover.directory import reconstruct_directory

    if source is None or recovery is None or data is None:
        raise SchemeError("--start needs the model it was made of, --recovery and --data, a text")
    how = parse_recovery(recovery)
    if not isinstance(how, Reconstruction):
        raise SchemeError(f"--start: expected AdaRound(...) or Blockwise(...) as --recovery, got {recovery}")
    tokenizer = load_tokenizer(fetch(source), trust_remote_code)
    windows = calibration_windows(read_text(data), tokenizer, how.samples * batch, length, seed, data)
    return reconstruct_directory(
        source,
        start,
        how,
        windows.batches(batch),
        out,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress,
        **options,
    )


@dataclass(frozen=True)
class _Choice:
    """A scheme and how it is trained: as given, or a recipe's. `how` is None where nothing is said; `length`, `batch`,
    `data` are the usual ones.
    """

    scheme: Any
    how: Any
    length: int = LENGTH
    batch: int = BATCH
    data: str | None = None


def _choice(
    scheme: str | None, plan: Path | None, recovery: str | None, method: str | None, bits: int | None
) -> _Choice:
    """Raises: SchemeError for options that do not go together."""
    from laconic.recover import parse_recovery
    from laconic.recover.recipes import recipe
    from laconic.scheme.text import parse

    asked = parse_recovery(recovery) if recovery is not None else None
    if method is None:
        if bits is not None:
            raise SchemeError("--bits belongs to --method; a scheme names its bits itself")
        return _Choice(read_scheme(scheme, plan), asked)
    if scheme is not None or plan is not None:
        raise SchemeError(f"--method {method} brings its own scheme: give it or --scheme (or --plan)")
    found = recipe(method, bits)
    return _Choice(parse(found.scheme), asked or found.how, found.length, found.batch, found.data)


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
