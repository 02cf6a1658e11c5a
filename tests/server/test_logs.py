from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import sys
import threading
import warnings
from typing import Any

import pytest

from pellucid.server import logs
from pellucid.server.logs import Formatter, JsonFormatter, LogWriter, LoopErrorLog, fields, logging_to
from pellucid.server.settings import LogFormat, LogLevel

SECRET = "the prompt of a user"


def logged(*steps: Any, level: LogLevel = "info", log_format: LogFormat = "text") -> str:
    """What is written while the steps run."""
    stream = io.StringIO()
    with logging_to(stream, level, log_format):
        for step in steps:
            step()
    return stream.getvalue()


def raise_secret() -> None:
    raise ValueError(SECRET)


def log_exception() -> None:
    try:
        raise_secret()
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")


def test_text_is_a_line_of_fields() -> None:
    values = {"path": "/v1", "seconds": 0.12345, "gone": True, "count": 3, "odd": 'a "b"\n=c'}
    line = logged(lambda: logs.logger.info("request", extra=fields(**values)))
    time, _, rest = line.partition(" ")
    assert time.endswith("Z")
    assert len(time) == len("2026-11-21T19:50:00.123Z")
    assert rest == 'info request path=/v1 seconds=0.123 gone=true count=3 odd="a \\"b\\"\\n=c"\n'


def test_json_is_an_object_a_line() -> None:
    values = {"path": "/v1\n\x1b[2J", "seconds": 0.12345, "gone": True}
    line = logged(lambda: logs.logger.warning("two\nlines %s", 1, extra=fields(**values)), log_format="json")
    assert line.count("\n") == 1
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {"level": "warning", "message": "two\nlines 1", **values}


def test_no_control_character_reaches_a_terminal() -> None:
    line = logged(lambda: logs.logger.info("a\x1b[2Jb\x9b\tc", extra=fields(path="\x1b]0;x\x07\x9b")))
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in line.rstrip("\n"))
    assert "a\\x1b[2Jb" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_of_an_exception_only_type_and_place_are_written(log_format: LogFormat) -> None:
    def in_a_thread() -> None:
        thread = threading.Thread(target=raise_secret, name="worker")
        thread.start()
        thread.join()

    class Unraisable:
        def __del__(self) -> None:
            raise_secret()

    def in_a_finalizer() -> None:
        Unraisable()

    def in_a_loop() -> None:
        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(LoopErrorLog())
            asyncio.get_running_loop().call_soon(raise_secret)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        asyncio.run(main())

    text = logged(log_exception, in_a_thread, in_a_finalizer, in_a_loop, level="debug", log_format=log_format)
    assert text.count("ValueError") == 4
    assert text.count("raise_secret") == 4
    assert "thread=worker" in text or '"thread": "worker"' in text
    assert SECRET not in text


def test_a_loop_that_can_accept_no_connection_is_told_of_once() -> None:
    loop = asyncio.new_event_loop()
    log = LoopErrorLog()

    def fail() -> None:
        for _ in range(2048):  # as asyncio does each second
            log(loop, {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "")})
        log(loop, {"message": "something else", "exception": OSError(errno.EPIPE, "")})

    text = logged(fail)
    loop.close()
    assert text.count("out of system resource") == 1
    assert text.count("something else") == 1


def test_a_formatter_that_quotes_exceptions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: the formatter of the standard library.
    monkeypatch.setattr(Formatter, "format", logging.Formatter.format)
    assert SECRET in logged(log_exception)


def test_info_is_ours_and_others_only_warn() -> None:
    def talk() -> None:
        for name in ("pellucid.server", "uvicorn.error", "asyncio"):
            logging.getLogger(name).info("from %s", name)
            logging.getLogger(name).warning("warned by %s", name)
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        text = logged(talk)
        quiet = logged(talk, level="error")
    assert "from pellucid.server" in text
    assert "from uvicorn" not in text
    assert text.count("warned by") == 3
    assert "deprecated" in text
    assert quiet == ""
    assert "from uvicorn.error" in logged(talk, level="debug")


def test_everything_is_as_before_afterwards() -> None:
    def state() -> list[Any]:
        names = ("pellucid", "uvicorn", "asyncio", "py.warnings")
        loggers = [logging.getLogger(name) for name in names]
        return [(each.handlers, each.level, each.propagate) for each in loggers] + [
            threading.excepthook,
            sys.unraisablehook,
        ]

    before = state()
    logged()
    assert state() == before


class Stuck(io.StringIO):
    """A pipe that nobody reads until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.has_begun = threading.Event()

    def write(self, text: str) -> int:
        self.has_begun.set()
        self.go.wait()
        return super().write(text)


def test_a_pipe_that_is_not_read_holds_nobody_up_and_what_is_lost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_UNWRITTEN_LINES", 3)
    stream = Stuck()
    writer = LogWriter(stream)
    writer.setFormatter(Formatter())
    for number in range(10):
        writer.handle(logging.makeLogRecord({"msg": f"line {number}", "levelname": "INFO"}))
        if number == 0:
            stream.has_begun.wait()
    stream.go.set()
    writer.close()
    lines = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == ["info line 0", "warning log lines left out lines=6", "info line 1", "info line 2", "info line 3"]


def test_a_pipe_that_is_closed_ends_nothing() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream)
    writer.setFormatter(JsonFormatter())
    stream.close()
    for _ in range(3):
        writer.handle(logging.makeLogRecord({"msg": "x", "levelname": "INFO"}))
    writer.close()
    assert not writer._thread.is_alive()
