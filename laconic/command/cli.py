"""The command line: all commands, each in a file of its own. With --json, JSON alone goes to stdout; progress, logs and
messages always go to stderr.

Exit codes: 0 done; 1 an error of another kind; 2 scheme or arguments; 3 model; 4 data; 5 output directory or disk;
6 verification; 7 a network that cannot be cut; 8 a search that cannot be carried out; 9 training that diverged;
10 a complete model, of which what follows the weights failed; 129, 130, 143 ended by a signal; 141 nobody reads the
output.
"""

from typing import Annotated

import typer

from laconic.command.compress import compress
from laconic.command.demo import demo
from laconic.command.evaluate import evaluate
from laconic.command.fold import fold
from laconic.command.group import Commands
from laconic.command.inspect import inspect
from laconic.command.methods import methods
from laconic.command.output import out_console
from laconic.command.recover import recover
from laconic.command.search import search
from laconic.version import __version__

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    """Compress neural networks: schemes of quantization, clustering, pruning and low rank, stored exactly, reported
    honestly.
    """


for _command in (compress, evaluate, inspect, fold, methods, demo, search, recover):
    app.command()(_command)
