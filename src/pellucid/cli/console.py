"""What the commands print with: tables, progress, units. rich is imported only where a table or a bar is drawn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# A model's text and a file's metadata are foreign: an escape sequence in them could repaint the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROL_IN_TEXT = {code: shown for code, shown in _CONTROL.items() if chr(code) not in "\n\t"}


def one_line(text: str) -> str:
    """`text` with every control character written out, for a table cell."""
    return text.translate(_CONTROL)


def write_text(text: str, stream: TextIO | None = None, *, dim: bool = False) -> None:
    """Write a model's text at once; on a terminal its control characters (but line ends and tabs) are written out.

    Args:
        dim: in a fainter colour, on a terminal.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        text = text.translate(_CONTROL_IN_TEXT)
        text = f"\x1b[2m{text}\x1b[22m" if dim else text
    stream.write(text)
    stream.flush()


def format_bytes(count: float) -> str:
    """Decimal units, as disks and downloads are counted: 96.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_count(count: float) -> str:
    """135M, 1.24B."""
    for unit in ("", "k", "M", "B"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print aligned columns on standard output; the columns named in `right` align right.

    A terminal that is too narrow wraps the cells; a file or pipe gets whole lines. Nothing is cut off.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(str(cell))) for cell in row))
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 1_000_000)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


class ProgressReport:
    """A progress callback, `report(stage, done, total)` in bytes: a bar on a terminal, else a line a stage.

    Use as a context manager; the bar leaves the screen when it ends.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None

    def __enter__(self) -> ProgressReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Take the bar off the screen; a later call of the report starts a new one."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = self._stage = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        begins, self._stage = stage != self._stage, stage
        if not sys.stderr.isatty():
            if begins:
                print(f"{stage}{f' ({format_bytes(total)})' if total else ''} ...", file=sys.stderr)
            return
        if self._progress is None:
            self._progress = _start_bar()
        if self._task is None or begins:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)


def _start_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    progress.start()
    return progress
