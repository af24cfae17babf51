"""`laconic compress`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.command.console import Terminal, markup
from laconic.command.group import guard
from laconic.command.options import DeviceOption, DTypeOption, JsonOption, StatisticsOption, TrustOption
from laconic.command.output import emit, err, note
from laconic.command.shown import shown
from laconic.errors import SchemeError
from laconic.host.units import human_bytes

DEFAULT_SCHEME = "GPTQ(rate=3.25)"

DataOption = Annotated[
    str,
    typer.Option(
        help=(
            "What calibrates: text, conversations, a folder of images or sound, hub:name[:config[:split]], or self: "
            "sampled from the model."
        )
    ),
]


def compress(
    source: Annotated[str, typer.Argument(help="A model directory with safetensors, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("compressed"),
    scheme: Annotated[
        str | None, typer.Option(help=f"The scheme as an expression; without one, {DEFAULT_SCHEME}.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A Python file whose variable `scheme` is the scheme.")] = None,
    data: DataOption = "self",
    test: Annotated[
        str | None,
        typer.Option(help="What the report's figures are measured on; without it, the last tenth of --data."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    test_tokens: Annotated[int, typer.Option(min=2, help="Tokens the report's figures are measured on.")] = 32768,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Within a block, later layers see earlier ones compressed.")
    ] = False,
    statistics: StatisticsOption = "compressed",
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Leave tensors with NaN or infinity as they are.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Sites that stay: a pattern, a part of a name, or router, embedding, head. Repeatable."),
    ] = None,
    group: Annotated[
        str, typer.Option(help="Where a group does not divide a matrix: fit (its largest divisor that does) or strict.")
    ] = "fit",
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Do not measure quality at the end.")] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a model into a directory, block by block, and report on what was stored."""

    def work() -> None:
        from laconic.pipeline import Options, compress_directory, plan_directory
        from laconic.scheme.text import load_plan, parse

        if scheme is not None and plan is not None:
            raise SchemeError("give --scheme or --plan, not both")
        chosen = parse(scheme if scheme is not None else DEFAULT_SCHEME) if plan is None else load_plan(plan)
        options = Options(
            data=data,
            test=test,
            samples=samples,
            length=length,
            test_tokens=test_tokens,
            seed=seed,
            device=device,
            dtype=dtype,
            true_sequential=true_sequential,
            statistics=statistics,  # type: ignore[arg-type]
            resume=resume,
            overwrite=overwrite,
            skip_nonfinite=skip_nonfinite,
            trust_remote_code=trust_remote_code,
            evaluate=not no_evaluate,
            keep=tuple(keep or ()),
            group=group,  # type: ignore[arg-type]
            command=shlex.join(["laconic", *sys.argv[1:]]),
        )
        with Terminal(quiet=as_json) as terminal:
            if dry_run:
                preflight = plan_directory(source, chosen, options, terminal)[2]
                terminal.plan(preflight)
                if as_json:
                    emit(preflight.to_json())
                return
            report = compress_directory(source, chosen, out, options, terminal)
        if as_json:
            emit(report.as_dict())
        else:
            summarize(report.as_dict())
            err.print(f"report: {shown(out / 'report.html')}", markup=False)

    guard(work, "; what is finished is kept: run the same command with --resume")


def summarize(report: dict[str, Any]) -> None:
    """The outcome of a run in a few lines on stderr."""
    stored, original, m = report["stored_bytes"], report["original_bytes"], report["metrics"]
    err.print(
        f"stored [bold]{human_bytes(stored)}[/] from {human_bytes(original)}: {report['bits_per_weight']:.3f} bits per "
        "weight, ",
        end="",
    )
    err.print(f"{report['matrix_bits']:.3f} in the compressed matrices")
    err.print(shown(report["coverage_line"], 2000), markup=False)
    if "perplexity" in m:
        low, high = m["perplexity_interval"]
        err.print(
            f"perplexity [bold]{m['perplexity']:.3f}[/] ({low:.2f} to {high:.2f}), original "
            f"{m['reference_perplexity']:.3f}, on {markup(m['data'])}"
        )
        err.print(f"KL from the original {m['kl']:.5f} nats per token; same first token {100 * m['top1']:.2f} %")
    for name in ("cosine", "relative_error"):
        if name in m:
            err.print(f"{name.replace('_', ' ')} of the output: {m[name]:.5f}")
    peak = report["peak_memory"]
    err.print(
        f"peak memory {human_bytes(peak['actual'])} (expected {human_bytes(peak['expected'])}), "
        f"{report['seconds']:.0f} seconds"
    )
    for text in report["notes"]:
        note(text)
