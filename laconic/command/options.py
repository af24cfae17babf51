"""Options that several commands have."""

from typing import Annotated

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there; an error too.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
DTypeOption = Annotated[str, typer.Option(help="Computing precision: float32 or bfloat16.")]
StatisticsOption = Annotated[
    str,
    typer.Option(
        help="What the inputs that methods look at have passed through: compressed (all that is compressed before) or "
        "original."
    ),
]
