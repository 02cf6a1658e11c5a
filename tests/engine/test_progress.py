"""What the progress of many prompts looks like: on a terminal, on narrow ones, and in a log."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid.core.outputs import RequestMetrics, RequestOutput
from pellucid.engine.progress import LOG_SECONDS, GenerateProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


RUN: Any = SimpleNamespace(num_running=64, num_waiting=12, tokens_in_flight=lambda: (500, 100))
REPLY = RequestOutput("r", None, [], [], RequestMetrics(prompt_tokens=1000, cached_tokens=250, output_tokens=300))


class Screen(io.StringIO):
    """Standard error; `terminal` makes it one."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


def shown(total: int | None, *, terminal: bool = False, **options: Any) -> tuple[str, str]:
    """What stands on standard error ten seconds after the start, with one of `total` done, and what the end adds."""
    clock = Clock()
    with redirect_stderr(Screen(terminal)) as err:
        with GenerateProgress(total, True, clock=clock, **options) as progress:
            progress.refresh(RUN)
            progress.count(REPLY)
            progress.advance()
            clock.now += LOG_SECONDS
            progress.refresh(RUN)
            progress.refresh(RUN)
            text = err.getvalue()
        return text, err.getvalue().removeprefix(text)


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    text, end = shown(2000)
    assert text == "prompts 1/2,000, 5:33:10 left, 40 tok/s out, 150 tok/s in, 64 running, 12 waiting, 25% cached\n"
    assert end == "prompts 1/2,000, 5:33:10 left, 30 tok/s out, 100 tok/s in, 25% cached\n"


def test_an_unknown_total() -> None:
    assert shown(None)[0].startswith("prompts 1, 0:00:10 passed, 40 tok/s out")


def test_what_was_done_before_does_not_count_for_the_time_left() -> None:
    assert shown(2000, noun="requests", done=998)[0].startswith("requests 999/2,000, 2:46:50 left, ")


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_a_terminal_of_any_width_shows_all_of_it(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text, _ = shown(20, terminal=True)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text[text.rindex("prompts") :])
    assert "━" in last or "╸" in last
    assert max(map(len, last.splitlines())) <= columns
    words = " ".join(last.split())
    for figure in (
        "1/20",
        "0:03:10 left",
        "40 tok/s out,",
        "150 tok/s in,",
        "64 running,",
        "12 waiting,",
        "25% cached",
    ):
        assert figure in words


def test_nothing_is_shown_where_nothing_was_asked_for() -> None:
    with redirect_stderr(Screen()) as err, GenerateProgress(5, False) as progress:
        progress.advance()
        progress.refresh(RUN)
    assert err.getvalue() == ""


def test_it_is_stopped_once() -> None:
    with redirect_stderr(Screen()) as err:
        with GenerateProgress(5, True) as progress:
            progress.stop()
        progress.stop()
    assert len(err.getvalue().splitlines()) == 1
