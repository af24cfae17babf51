"""`laconic evaluate`."""

from typing import Annotated, Any

import typer

from laconic.command.group import guard
from laconic.command.options import DeviceOption, DTypeOption, JsonOption, TrustOption
from laconic.command.output import emit, print_rows
from laconic.errors import SchemeError


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
    device: DeviceOption = "auto",
    dtype: DTypeOption = "float32",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity with error bars, distance from the original, lm-eval tasks."""

    def work() -> None:
        from laconic.measure.quality import evaluate_source

        if data is None and tasks is None:
            raise SchemeError("nothing to measure: give --data, --tasks or both")
        result = evaluate_source(
            source,
            reference=reference,
            data=data,
            length=length,
            tokens=tokens,
            tasks=tasks.split(",") if tasks else [],
            limit=limit,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
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
            rows.append((prefix + name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(f"{x:.5g}" for x in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
