"""Nothing that a client says, and no key, is in any log: at debug level, whatever goes wrong."""

from __future__ import annotations

import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pellucid.server import request_log
from pellucid.server.app import routes
from pellucid.server.generation import Generation
from pellucid.server.logs import logging_to
from pellucid.server.settings import LogFormat
from tests.support.live_server import LiveServer, live_server

SECRET = "xyzzy"
KEY = f"key-{SECRET}"
USER = {"role": "user", "content": SECRET}
TOOL = {
    "type": "function",
    "function": {"name": SECRET, "description": SECRET, "parameters": {"type": "object", "properties": {SECRET: {}}}},
}
CALL = {"id": SECRET, "type": "function", "function": {"name": SECRET, "arguments": json.dumps({SECRET: SECRET})}}

BODIES: list[Any] = [
    {"model": "tiny", "prompt": SECRET, "max_tokens": 4, "stop": [SECRET], "user": SECRET},
    {"model": "tiny", "prompt": [SECRET, SECRET], "max_tokens": 4, "stream": True},
    {"model": "tiny", "messages": [USER], "max_tokens": 4, "bad_words": [SECRET]},
    {"model": "tiny", "messages": [USER], "max_tokens": 4, "stream": True},
    {"model": "tiny", "messages": [USER], "max_tokens": 4, "tools": [TOOL], "tool_choice": "required"},
    {"model": "tiny", "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "max_tokens": 4},
    {"model": "tiny", "messages": [USER], "max_tokens": 4, "response_format": {"type": SECRET}},
    {"model": "tiny", "prompt": SECRET, "structured_outputs": {"regex": f"({SECRET}"}},
    {"model": "tiny", "messages": [USER], "system": SECRET, "metadata": {"user_id": SECRET}, "max_tokens": 4},
    {"model": "tiny", "input": SECRET, "instructions": SECRET, "max_output_tokens": 4},
    {"model": "tiny", "input": [SECRET]},
    {"model": "tiny", "text_1": SECRET, "text_2": [SECRET]},
    {"model": "tiny", "prompt": SECRET * 1000},
    {"model": SECRET, "prompt": SECRET},
    {"model": SECRET, "messages": [USER]},
    {"model": SECRET, "input": SECRET},
    {"model": "tiny", "prompt": SECRET, "temperature": SECRET},
    {"model": "tiny", "messages": [{"role": SECRET, "content": SECRET}]},
    {"model": "tiny", "messages": [{"role": "user", "content": [{"type": SECRET, SECRET: SECRET}]}]},
    {"model": "tiny", "messages": SECRET},
    {"model": "tiny", "prompt": {SECRET: SECRET}},
    {SECRET: SECRET},
    [SECRET],
    SECRET,
]
RAW = [f'{{"{SECRET}": "{SECRET}'.encode(), f'{{"{SECRET}": 1, "{SECRET}": 2}}'.encode(), SECRET.encode() + b"\xff"]
HEADERS: list[dict[str, str]] = [
    {"Authorization": f"Bearer {SECRET}"},
    {"Authorization": SECRET},
    {"x-api-key": SECRET},
    {"Origin": f"https://{SECRET}.example"},
    {"Host": f"{SECRET}.example"},
    {"Content-Type": SECRET},
    {"X-Request-Id": f"<{SECRET}>"},
    {"User-Agent": SECRET, "Cookie": SECRET},
]


@contextmanager
def logged_server(chat_model: str, log_format: LogFormat) -> Iterator[tuple[LiveServer, io.StringIO]]:
    log = io.StringIO()
    with logging_to(log, "debug", log_format), live_server(chat_model, api_keys=[KEY]) as server:
        yield server, log


def send(server: LiveServer, path: str, body: bytes, **headers: str) -> int:
    """The status of the answer, which is read to its end."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    request = urllib.request.Request(f"{server.url}{path}?{SECRET}={KEY}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def paths() -> list[str]:
    return [route.path for route in routes() if "POST" in (route.methods or ())]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_log_has_what_a_client_said(chat_model: str, log_format: LogFormat) -> None:
    with logged_server(chat_model, log_format) as (server, log):
        statuses = {
            send(server, path, body)
            for path in paths()
            for body in [*(json.dumps(body).encode() for body in BODIES), *RAW]
        }
        for headers in HEADERS:
            statuses.add(send(server, paths()[0], json.dumps(BODIES[0]).encode(), **headers))
    assert {200, 400, 401, 403, 404, 415} <= statuses
    assert 500 not in statuses
    text = log.getvalue()
    assert text.count("completions") > len(BODIES)
    assert SECRET not in text
    assert KEY not in text


def test_nor_when_the_server_runs_into_a_defect(chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Generation) -> Any:
        raise RuntimeError(f"cannot make sense of {SECRET!r}")

    monkeypatch.setattr(Generation, "complete", fail)
    monkeypatch.setattr(Generation, "stream", fail)
    with logged_server(chat_model, "text") as (server, log):
        statuses = [send(server, path, json.dumps(body).encode()) for path in paths()[:2] for body in BODIES[:4]]
    assert 500 in statuses
    assert "internal error" in log.getvalue()
    assert "RuntimeError" in log.getvalue()
    assert SECRET not in log.getvalue()


def test_a_log_that_quotes_would_be_seen(chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: a log that has the message of the error.
    def work(state: dict[str, Any]) -> dict[str, object]:
        return {"error": state["error"].message} if "error" in state else {}

    monkeypatch.setattr(request_log, "_work", work)
    with logged_server(chat_model, "text") as (server, log):
        assert send(server, "/v1/completions", json.dumps({"model": SECRET, "prompt": "x"}).encode()) == 404
    assert SECRET in log.getvalue()
    assert logging.getLogger("pellucid").handlers == []
