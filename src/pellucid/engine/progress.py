"""How far many prompts are, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from pellucid.core.outputs import RequestOutput

if TYPE_CHECKING:
    from rich.live import Live

    from pellucid.engine.offline import OfflineRun

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 10.0
BAR_WIDTH = 40


class GenerateProgress:
    """How many are done, tokens a second, who runs and waits, and how much of the prompts was cached.

    On a terminal a bar with a line of figures under it; else a line every LOG_SECONDS and one at the end.

    Args:
        total: how many there are; None where nobody knows.
        enabled: False shows nothing.
        noun: what they are.
        done: how many were done before.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int | None,
        enabled: bool,
        *,
        noun: str = "prompts",
        done: int = 0,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self._total = total
        self._enabled = enabled
        self._noun = noun
        self._done = self._done_before = done
        self._clock = clock
        self._start = self._shown = clock()
        self._seconds = LOG_SECONDS
        self._queues = ""
        self._live: Live | None = None

    def __enter__(self) -> GenerateProgress:
        self._start = self._shown = self._clock()
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._seconds = TERMINAL_SECONDS
            self._live = Live(console=Console(file=sys.stderr, highlight=False), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def stop(self) -> None:
        """Show the last state and leave it there. No effect on one that was stopped."""
        if self._enabled:
            self._queues = ""
            self._show(self.prompt_tokens, self.output_tokens)
            self._enabled = False
            if self._live is not None:
                self._live.stop()

    def count(self, reply: RequestOutput) -> None:
        """Take in the tokens of a request that ended."""
        self.prompt_tokens += reply.metrics.prompt_tokens
        self.cached_tokens += reply.metrics.cached_tokens
        self.output_tokens += reply.metrics.output_tokens

    def advance(self) -> None:
        """One more is done."""
        self._done += 1

    def refresh(self, run: OfflineRun) -> None:
        """Show where `run` is, if the last time is long enough ago."""
        if not self._enabled or self._clock() - self._shown < self._seconds:
            return
        self._shown = self._clock()
        self._queues = f"{run.num_running} running, {run.num_waiting} waiting"
        prompt_tokens, output_tokens = run.tokens_in_flight()
        self._show(self.prompt_tokens + prompt_tokens, self.output_tokens + output_tokens)

    def _show(self, prompt_tokens: int, output_tokens: int) -> None:
        figures = self._figures(prompt_tokens, output_tokens)
        counts = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        time = self._time()
        if self._live is None:
            print(f"{self._noun} {counts}, {time}, {figures}", file=sys.stderr, flush=True)
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = max(4, min(BAR_WIDTH, self._live.console.width - len(f"{self._noun}  {counts} {time}")))
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(self._total, self._done, width=width)
        line.add_row(self._noun, *([] if self._total is None else [bar]), counts, time)
        self._live.update(Group(line, Text(figures)), refresh=True)

    def _figures(self, prompt_tokens: int, output_tokens: int) -> str:
        seconds = max(self.elapsed, 1e-9)
        figures = [f"{output_tokens / seconds:,.0f} tok/s out", f"{prompt_tokens / seconds:,.0f} tok/s in"]
        if self._queues:
            figures.append(self._queues)
        if self.prompt_tokens:
            figures.append(f"{self.cached_tokens / self.prompt_tokens:.0%} cached")
        return ", ".join(figures)

    def _time(self) -> str:
        done_now = self._done - self._done_before
        if self._total is None or self._done >= self._total or not done_now:
            return f"{timedelta(seconds=round(self.elapsed))} passed"
        left = self.elapsed / done_now * (self._total - self._done)
        return f"{timedelta(seconds=round(left))} left"
