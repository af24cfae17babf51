"""`laconic fold`."""

from pathlib import Path
from typing import Annotated

import typer

from laconic.command.group import guard
from laconic.command.options import JsonOption, TrustOption
from laconic.command.output import emit, note, out_console


def fold(
    source: Annotated[Path, typer.Argument(help="A compressed language model: a directory that laconic wrote.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the token ids that the folds are proven on.")] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far the output may move, as a part of its largest value.")
    ] = 1e-5,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move column scales (AWQ, SmoothQuant) into the norms and layers before them, so that nothing is left to compute
    for them.
    """

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
            f"scales folded into {done} places, kept by {left} weights; output moved by {result['difference']:.1e} of "
            "its size"
        )
        out_console.print(f"stored {result['stored_bytes']:,} bytes from {result['source_bytes']:,}")

    guard(work)
