"""Progress on a terminal: the plan as a table, a bar with an honest estimate, a line per site. Everything goes to
stderr.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from laconic.command.shown import shown
from laconic.host.told import PlannedSite, Preflight, SiteRecord
from laconic.host.units import duration, human_bytes


def terminal_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for a line per site where there is none (a file, a pipe)."""
    options: dict[str, Any] = {"file": _Messages()} if stderr else {}
    console = Console(highlight=False, emoji=False, **options)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=160, **options)


class _Messages:
    """The present `sys.stderr`. What it cannot take (a log on a full disk) is dropped: hours of work do not end for
    want of a progress bar.

    A reader that has gone away still ends the command, as everywhere.
    """

    def write(self, text: str) -> int:
        with _dropped():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with _dropped():
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def _dropped() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


def markup(text: object) -> str:
    """Text from outside as a part of what a console draws: nothing in it is understood as style, nothing of it is
    hidden.
    """
    return escape(shown(text))


class Terminal:
    """Draws a run; with `brief`, only a bar and warnings; with `quiet`, only warnings."""

    def __init__(self, quiet: bool = False, brief: bool = False) -> None:
        self.console = terminal_console(stderr=True)
        self.quiet = quiet or brief
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"))
        self.bar = Progress(*columns, *times, console=self.console, transient=True, disable=quiet)
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def plan(self, preflight: Preflight) -> None:
        if self.quiet:
            return
        from laconic.engine.coverage import coverage_line  # on use, since it loads PyTorch

        table = Table(title="plan", title_justify="left", header_style="bold")
        for name, justify in (
            ("sites", "left"),
            ("number", "right"),
            ("method", "left"),
            ("bits", "right"),
            ("bytes", "right"),
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for (pattern, method, bits), sites in _grouped(preflight.sites).items():
            number, size = f"{len(sites)}", human_bytes(sum(site.bytes for site in sites))
            kept = f"Keep(), as stored{': ' + sites[0].reason if sites[0].reason else ''}"
            table.add_row(markup(pattern), number, markup(kept if sites[0].kept else method), f"{bits:.3f}", size)
        self.console.print(table)
        for note in preflight.notes:
            self.say(note)
        before, after = preflight.original_bytes, preflight.bytes
        self.console.print(
            f"expected: {human_bytes(after)} from {human_bytes(before)}, peak memory "
            f"{human_bytes(preflight.peak_memory)}, "
            f"about {duration(preflight.seconds)}"
        )
        self.console.print(shown(coverage_line(preflight.coverage), 2000), markup=False)

    def start(self, task: str, total: float) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(markup(task), total=total, note="")

    def advance(self, units: float, note: str = "") -> None:
        if self.task is not None:
            self.bar.update(self.task, advance=units, note=markup(note))

    def site(self, record: SiteRecord) -> None:
        if not self.quiet:
            self.console.print(
                f"{markup(record.name):<48} {record.bits_per_weight:7.3f} bits   output error "
                f"{record.error:.3e}   {record.seconds:.2f} s"
            )
        for note in record.notes:
            self.console.print(f"[yellow]note[/] {markup(note)}")

    def say(self, message: str) -> None:
        self.console.print(f"[yellow]note[/] {markup(message)}")


def _grouped(sites: list[PlannedSite]) -> dict[tuple[str, str, float], list[PlannedSite]]:
    """Sites of like name, method and size together: layer numbers become *."""
    groups: dict[tuple[str, str, float], list[PlannedSite]] = {}
    for site in sites:
        name = ".".join("*" if part.isdigit() else part for part in site.name.split("."))
        name += "".join(f" = {alias}" for alias in site.aliases)
        groups.setdefault((name, site.method, round(site.bits_per_weight, 3)), []).append(site)
    return groups
