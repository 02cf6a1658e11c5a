"""A progress bar for many prompts."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from pellucid.core.outputs import RequestOutput

if TYPE_CHECKING:
    from pellucid.engine.llm_engine import LLMEngine


class GenerateProgress:
    """Prompts done, tokens a second, who runs and waits, and how much of the prompts was cached; on standard error."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._start = perf_counter()
        self._output_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    def __enter__(self) -> GenerateProgress:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("prompts"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("prompts", total=self._total, state="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._enabled:
            self._progress.stop()

    def update(self, reply: RequestOutput, engine: LLMEngine) -> None:
        """Count one more finished prompt."""
        if not self._enabled:
            return
        metrics, scheduler = reply.metrics, engine.scheduler
        self._output_tokens += metrics.output_tokens
        self._prompt_tokens += metrics.prompt_tokens
        self._cached_tokens += metrics.cached_tokens
        speed = self._output_tokens / (perf_counter() - self._start)
        cached = self._cached_tokens / self._prompt_tokens
        queues = f"{len(scheduler.running)} running, {len(scheduler.waiting)} waiting"
        self._progress.update(self._task, advance=1, state=f"{speed:.0f} tok/s, {queues}, {cached:.0%} cached")
