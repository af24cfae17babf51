"""The command line. With --json, JSON alone goes to stdout; progress, logs and messages always go to stderr.

Exit codes: 0 done; 1 an error of another kind; 2 scheme or arguments; 3 model; 4 data; 5 output directory or disk; 6 verification;
7 a network that cannot be cut; 8 a search that cannot be carried out; 9 training that diverged;
10 a complete model, of which what follows the weights failed; 129, 130, 143 ended by a signal; 141 nobody reads the output.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from laconic.command import training
from laconic.command.commands import Commands, Device, Json, Trust, emit, err, guard, note, out_console, print_rows
from laconic.command.console import Terminal, markup
from laconic.command.shown import shown
from laconic.errors import SchemeError
from laconic.host.units import human_bytes
from laconic.version import __version__

DEFAULT_SCHEME = "GPTQ(rate=3.25)"

app = typer.Typer(
    cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
Data = Annotated[
    str,
    typer.Option(
        help="What calibrates: text, conversations, a folder of images or sound, hub:name[:config[:split]], or self: sampled from the model."
    ),
]


def _version(asked: bool) -> None:
    if asked:
        out_console.print(f"laconic {__version__}")
        raise typer.Exit


@app.callback()
def laconic(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compress neural networks: schemes of quantization, clustering, pruning and low rank, stored exactly, reported honestly."""


@app.command()
def compress(
    source: Annotated[str, typer.Argument(help="A model directory with safetensors, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("compressed"),
    scheme: Annotated[
        str | None, typer.Option(help=f"The scheme as an expression; without one, {DEFAULT_SCHEME}.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A Python file whose variable `scheme` is the scheme.")] = None,
    data: Data = "self",
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
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Computing precision: float32 or bfloat16.")] = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compress a model into a directory, block by block, and report on what was stored."""

    def work() -> None:
        from laconic.pipeline import Options, compress_directory, plan_directory
        from laconic.scheme.text import load_plan, parse

        if scheme is not None and plan is not None:
            raise SchemeError("give --scheme or --plan, not both")
        chosen = load_plan(plan) if plan is not None else parse(DEFAULT_SCHEME if scheme is None else scheme)
        options = Options(
            data=data, test=test, samples=samples, length=length, test_tokens=test_tokens, seed=seed, device=device, dtype=dtype,
            true_sequential=true_sequential, resume=resume, overwrite=overwrite, skip_nonfinite=skip_nonfinite,
            trust_remote_code=trust_remote_code, evaluate=not no_evaluate, keep=tuple(keep or ()),
            group=group,  # type: ignore[arg-type]
            command=shlex.join(["laconic", *sys.argv[1:]]),
        )  # fmt: skip
        with Terminal(quiet=as_json) as terminal:
            if dry_run:
                preflight = plan_directory(source, chosen, options, terminal)[2]
                terminal.plan(preflight)
                if as_json:
                    emit(preflight)
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
        f"stored [bold]{human_bytes(stored)}[/] from {human_bytes(original)}: {report['bits_per_weight']:.3f} bits per weight, ",
        end="",
    )
    err.print(f"{report['matrix_bits']:.3f} in the compressed matrices")
    err.print(shown(report["coverage_line"], 2000), markup=False)
    if "perplexity" in m:
        low, high = m["perplexity_interval"]
        err.print(
            f"perplexity [bold]{m['perplexity']:.3f}[/] ({low:.2f} to {high:.2f}), original {m['reference_perplexity']:.3f}, on {markup(m['data'])}"
        )
        err.print(f"KL from the original {m['kl']:.5f} nats per token; same first token {100 * m['top1']:.2f} %")
    for name in ("cosine", "relative_error"):
        if name in m:
            err.print(f"{name.replace('_', ' ')} of the output: {m[name]:.5f}")
    peak = report["peak_memory"]
    err.print(
        f"peak memory {human_bytes(peak['actual'])} (expected {human_bytes(peak['expected'])}), {report['seconds']:.0f} seconds"
    )
    for text in report["notes"]:
        note(text)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A compressed directory, a model directory or a hub id.")],
    reference: Annotated[str | None, typer.Option(help="The original, for KL and agreement.")] = None,
    data: Annotated[
        str | None, typer.Option(help="What to measure on: text for perplexity, or what else the model reads.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    tokens: Annotated[int | None, typer.Option(min=2, help="Use only this many tokens of the text.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, separated by commas (needs the 'eval' extra).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task.")] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Computing precision: float32 or bfloat16.")] = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity with error bars, distance from the original, lm-eval tasks."""

    def work() -> None:
        from laconic.measure.quality import evaluate_source

        if data is None and tasks is None:
            raise SchemeError("nothing to measure: give --data, --tasks or both")
        result = evaluate_source(
            source, reference=reference, data=data, length=length, tokens=tokens, tasks=tasks.split(",") if tasks else [], limit=limit,
            device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if as_json:
            emit(result)
            return
        print_rows(_flat(result), "measure", "value")

    guard(work)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            text = (
                " to ".join(f"{x:.5g}" for x in value)
                if isinstance(value, list | tuple)
                else f"{value:.6g}"
                if isinstance(value, float)
                else str(value)
            )
            rows.append((prefix + name, text))
    return rows


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A compressed directory.")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every tensor and compare it with its checksum, about a second per GB."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List every weight of a compressed model with its kind, bits, bytes and error; the rows add up to the files."""

    def work() -> None:
        from laconic.show.inspect import inspect_directory

        found = inspect_directory(path, verify=verify)
        if as_json:
            emit(found)
            return
        table = Table(title=markup(f"{path}: {found['scheme']}"), title_justify="left", header_style="bold")
        for name in ("weight", "kind"):
            table.add_column(name, overflow="fold")
        for name in ("shape", "bits", "bytes", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in found["weights"]:
            error = "" if row["error"] is None else f"{row['error']:.2e}"
            table.add_row(
                markup(row["name"]),
                markup(row["kind"]),
                " x ".join(map(str, row["shape"])),
                f"{row['bits_per_weight']:.3f}",
                f"{row['bytes']:,}",
                error,
            )
        for row in found["plain"]:
            table.add_row(
                markup(row["name"]),
                markup(row["kind"]),
                " x ".join(map(str, row["shape"])),
                "",
                f"{row['bytes']:,}",
                "",
            )
        table.add_row("headers, index and manifest", "container", "", "", f"{found['container_bytes']:,}", "")
        table.add_row("[bold]model[/]", "", "", "", f"[bold]{found['bytes']:,}[/]", "")
        for name, size in found["other_files"].items():
            table.add_row(f"[dim]{markup(name)}[/]", "[dim]not counted[/]", "", "", f"[dim]{size:,}[/]", "")
        out_console.print(table)
        if found["plan"]:
            plan = Table(title="plan", title_justify="left", header_style="bold")
            plan.add_column("sites", overflow="fold")
            plan.add_column("method", overflow="fold")
            for name, text in found["plan"].items():
                plan.add_row(markup(name), markup(text))
            out_console.print(plan)
        if verify:
            none = "not verified: written by an earlier version, without checksums"
            out_console.print(
                f"verified: {found['verified']:,} bytes are those that were written" if found["verified"] else none
            )

    guard(work)


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(help="A compressed language model: a directory that laconic wrote.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the token ids that the folds are proven on.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far the output may move, as a part of its largest value.")
    ] = 1e-5,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Move column scales (AWQ, SmoothQuant) into the norms and layers before them, so that nothing is left to compute for them."""

    def work() -> None:
        from laconic.surgery.fold_directory import fold_directory

        result = fold_directory(
            source, out, overwrite=overwrite, seed=seed, tolerance=tolerance, trust_remote_code=trust_remote_code
        )
        if as_json:
            emit(result)
            return
        for line in result["kept"]:
            note(line)
        done, left = len(result["folded"]), len(result["kept"])
        out_console.print(
            f"scales folded into {done} places, kept by {left} weights; output moved by {result['difference']:.1e} of its size"
        )
        out_console.print(f"stored {result['stored_bytes']:,} bytes from {result['source_bytes']:,}")

    guard(work)


@app.command(name="methods")
def list_methods(as_json: Json = False) -> None:
    """List the methods a scheme can use, with one line each."""
    from laconic.command.listing import list_methods as listed

    found = listed()
    if as_json:
        emit(found)
        return
    table = Table(header_style="bold")
    table.add_column("method")
    table.add_column("what it does, and its arguments")
    for name, entry in found.items():
        table.add_row(name, f"{markup(entry['does'])}\n[dim]{markup(', '.join(entry['arguments']))}[/]")
    out_console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the compressed models and reports go.")] = Path("laconic-demo"),
    samples: Annotated[int, typer.Option(min=8, help="Calibration windows.")] = 64,
    as_json: Json = False,
) -> None:
    """Compress the small language model that comes with the package at 4, 3 and 2 bits with three schemes, and compare."""

    def work() -> None:
        from laconic.demo.run import run_demo

        with Terminal(quiet=as_json, brief=True) as terminal:
            result = run_demo(out, samples, terminal)
        if as_json:
            emit(result)
            return
        out_console.print(comparison(result))
        err.print(f"page: {shown(out / 'index.html')}", markup=False)

    guard(work, "; nothing to clean up: a new demo starts over")


def comparison(result: dict[str, Any]) -> Table:
    """The rows of a demo as a table; the best of each size in bold."""
    table = Table(
        header_style="bold",
        caption="KL from the original in nats per token; ranges: 95 % bootstrap; bold: the least KL at a size",
    )
    table.add_column("scheme", no_wrap=True)
    for name in ("files", "bits/weight", "in matrices", "perplexity", "KL", "same first token", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    r = result["reference"]
    table.add_row(
        markup(r["name"]),
        human_bytes(r["bytes"]),
        f"{r['bits_per_weight']:.3f}",
        "",
        f"{r['perplexity']:.3f}",
        "0",
        "100.0 %",
        "",
    )
    for row in result["rows"]:
        if row["first"]:
            table.add_section()
        low, high = row["kl_interval"]
        table.add_row(
            markup(row["scheme"]), human_bytes(row["stored_bytes"]), f"{row['bits_per_weight']:.3f}", f"{row['matrix_bits']:.3f}",
            f"{row['perplexity']:.3f}", f"{row['kl']:.4f} ({low:.4f} to {high:.4f})", f"{100 * row['top1']:.1f} %", f"{row['seconds']:.0f}",
            style="bold" if row["best"] else None,
        )  # fmt: skip
    return table


app.command()(training.search)
app.command()(training.recover)
