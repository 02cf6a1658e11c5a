"""The server's log on standard error: one record a line, as text or as JSON.

What is logged never quotes a request. The message of an exception may, so of an exception nothing but its type and its
place is written, whoever logged it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from queue import Full, Queue
from traceback import extract_tb
from types import TracebackType
from typing import Any, TextIO

from pellucid.server.settings import LogFormat, LogLevel

logger = logging.getLogger("pellucid.server")

MAX_UNWRITTEN_LINES = 10_000
CLOSE_SECONDS = 2.0
ACCEPT_LOG_SECONDS = 10.0

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

_PLAIN = re.compile(r"[!#-<>-~]+")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def fields(**values: object) -> dict[str, dict[str, object]]:
    """What a record says besides its message: `logger.info("ready", extra=fields(seconds=0.4))`."""
    return {"fields": values}


class Formatter(logging.Formatter):
    """A record as a line, without its end."""

    def format(self, record: logging.LogRecord) -> str:
        message, values = record.getMessage(), dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, traceback = record.exc_info
            values |= {"exception": kind.__name__, "where": place(traceback)}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return self.line(time, record.levelname.lower(), message.strip(), values)

    def line(self, time: str, level: str, message: str, values: Mapping[str, Any]) -> str:
        """`2026-11-21T19:50:00.123Z info request method=GET seconds=0.020`. A value that could be mistaken is quoted as
        in JSON. A message may have several lines."""
        message = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", message)
        return " ".join([time, level, message, *(f"{name}={_text(value)}" for name, value in values.items())])


class JsonFormatter(Formatter):
    """A record as a JSON object in a line."""

    def line(self, time: str, level: str, message: str, values: Mapping[str, Any]) -> str:
        """`{"time": "2026-11-21T19:50:00.123Z", "level": "info", "message": "request", "method": "GET"}`."""
        return json.dumps({"time": time, "level": level, "message": message, **values}, default=str)


def place(traceback: TracebackType | None) -> str:
    """Where an exception came from, outermost first: files, lines and functions, and nothing of what they held."""
    return " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in extract_tb(traceback))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class LogWriter(logging.Handler):
    """Writes in a thread of its own, so that nobody waits for a terminal or a pipe that is not read. Where 10,000 lines
    have not been written yet, further ones are left out and counted."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: Queue[str | None] = Queue(MAX_UNWRITTEN_LINES)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write_all, name="pellucid-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._num_lost += 1

    def close(self) -> None:
        """Write what is left, if that takes no longer than two seconds."""
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSE_SECONDS / 2)
            except Full:
                return
            self._thread.join(CLOSE_SECONDS / 2)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
            self.acquire()
            num_lost, self._num_lost = self._num_lost, 0
            self.release()
            if num_lost:
                record = logger.makeRecord(logger.name, logging.WARNING, "", 0, "log lines left out", (), None)
                record.fields = {"lines": num_lost}
                self._write(self.format(record))

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it, or it is closed; serving goes on
            pass


@contextmanager
def logging_to(stream: TextIO, level: LogLevel, log_format: LogFormat) -> Iterator[None]:
    """Log to `stream`: this server, the web server under it, asyncio, warnings, and what threads die of."""
    writer = LogWriter(stream)
    writer.setFormatter(JsonFormatter() if log_format == "json" else Formatter())
    others = {"info": "WARNING"}.get(level, level.upper())  # what they tell of themselves is told better here
    loggers = {"pellucid": level.upper(), "uvicorn": others, "asyncio": others, "py.warnings": others}
    before = {name: _set_up(logging.getLogger(name), [writer], lowest, False) for name, lowest in loggers.items()}
    thread_hook, threading.excepthook = threading.excepthook, _thread_died
    unraisable_hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        threading.excepthook, sys.unraisablehook = thread_hook, unraisable_hook
        for name, (handlers, former_level, propagate) in before.items():
            _set_up(logging.getLogger(name), handlers, former_level, propagate)
        writer.close()


def _set_up(
    target: logging.Logger, handlers: list[logging.Handler], level: int | str, propagate: bool
) -> tuple[list[logging.Handler], int, bool]:
    before = (target.handlers, target.level, target.propagate)
    target.handlers, target.propagate = handlers, propagate
    target.setLevel(level)
    return before


class LoopErrorLog:
    """An exception handler for an event loop. asyncio's own writes out callbacks with their arguments, and tasks with
    what they raised. Where it can accept no connection, it says so a thousand times: once every few seconds is logged.
    """

    def __init__(self) -> None:
        self._may_tell_of_accept = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what went wrong in `loop`."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
            if loop.time() < self._may_tell_of_accept:
                return
            self._may_tell_of_accept = loop.time() + ACCEPT_LOG_SECONDS
        info = None if error is None else (type(error), error, error.__traceback__)
        before, callback, _arguments = str(context["message"]).partition(" callback ")
        logging.getLogger("asyncio").error("in the event loop: %s", before + callback, exc_info=info)


def _thread_died(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "?"
    error = args.exc_value or args.exc_type()
    logger.error("a thread died", extra=fields(thread=name), exc_info=(args.exc_type, error, args.exc_traceback))


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    error = args.exc_value or args.exc_type()
    logger.error("an exception had nowhere to go", exc_info=(args.exc_type, error, args.exc_traceback))
