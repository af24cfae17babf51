"""What the commands share: options, exit codes, and where output goes."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.markup import escape

from laconic.console import terminal_console
from laconic.errors import LaconicError

err = terminal_console(stderr=True)
out_console = terminal_console()

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


def guard(work: Callable[[], None], interrupted: str = "") -> None:
    """Turns errors a user can cause into one line and an exit code; `interrupted` says what is left after Ctrl-C."""
    try:
        work()
    except LaconicError as error:
        err.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        err.print(f"interrupted{interrupted}")
        raise typer.Exit(130) from error


def emit(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
