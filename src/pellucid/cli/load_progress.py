"""How far a load has come, on standard error: a bar on a terminal, else a line a run."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from pellucid.client.load.generator import Extent
    from pellucid.client.load.record import RequestRecord

REFRESH_SECONDS = 0.5  # drawing takes processor time from what is measured


class LoadProgress:
    """Told of each run and each request. Use as a context manager."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._begun = 0
        self._title = ""
        self._requests = 0
        self._tokens = 0
        self._start = self._shown = time.monotonic()
        self._extent: Extent | None = None
        self._progress: Progress | None = _start_bar() if sys.stderr.isatty() else None
        self._task = None if self._progress is None else self._progress.add_task("warming up", total=None, speed="")

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, title: str, extent: Extent) -> None:
        """A run of this title begins."""
        self._begun += 1
        self._title = f"{title} ({self._begun} of {self._runs})"
        self._extent = extent
        self._requests = self._tokens = 0
        self._start = time.monotonic()
        self._show()

    def advance(self, record: RequestRecord) -> None:
        """A request has ended."""
        self._requests += 1
        self._tokens += record.output_tokens
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._show()

    def end(self, summary: dict[str, Any]) -> None:
        """The run has ended."""
        if self._progress is None:
            speed = f"{summary['output_tokens_per_s']:.0f} tok/s, {summary['requests_per_s']:.2f} req/s"
            failed = f", {summary['failed']} failed" if summary["failed"] else ""
            print(f"{self._title}: {speed}{failed}", file=sys.stderr)

    def _show(self) -> None:
        if self._progress is None or self._task is None or self._extent is None:
            return
        self._shown = time.monotonic()
        seconds = self._shown - self._start
        done = self._requests if self._extent.seconds is None else seconds
        total = self._extent.requests if self._extent.seconds is None else self._extent.seconds
        speed = f"{self._tokens / seconds:.0f} tok/s" if seconds > 0 and self._tokens else ""
        self._progress.update(self._task, description=self._title, completed=done, total=total, speed=speed)
        self._progress.refresh()


def _start_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        console=Console(file=sys.stderr),
        auto_refresh=False,
        transient=True,
    )
    progress.start()
    return progress
