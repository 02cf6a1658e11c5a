from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pellucid.cli import console, conversation
from pellucid.cli.main import main
from tests.support.fake_api_server import (
    FakeApiServer,
    FakeReply,
    FakeRequest,
    Script,
    telling,
    text_chunk,
    usage_chunk,
)

PipeIn = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Types these turns at a terminal."""

    def type_in(*turns: str) -> None:
        lines = iter(turns)

        def read(prompt: str) -> str:
            for line in lines:
                return line
            raise EOFError

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(conversation, "enable_line_editing", lambda: None)

    return type_in


def chat(server: FakeApiServer, *arguments: str) -> int:
    return main(["chat", "--url", server.url, *arguments])


def bodies(server: FakeApiServer) -> list[dict[str, Any]]:
    return [request.body for request in server.requests if request.method == "POST"]


def test_a_conversation(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"hi\n/clear\nagain\nand on\n")
    with FakeApiServer(telling("Hel", "lo")) as server:
        assert chat(server, "--system", "be brief") == 0
        asked = bodies(server)
    opening = {"role": "system", "content": "be brief"}
    again = {"role": "user", "content": "again"}
    assert [body["messages"] for body in asked] == [
        [opening, {"role": "user", "content": "hi"}],
        [opening, again],
        [opening, again, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "and on"}],
    ]
    assert capsys.readouterr().out == "Hello\n" * 3


def test_only_what_was_given_is_sent(pipe_in: PipeIn, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    named = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    cases: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((), {}),
        (("--model", "named"), {"model": "named"}),
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--max-tokens", "5", "--top-k", "3"), {"max_tokens": 5, "top_k": 3}),
        (("--stop", "a", "--stop", "b"), {"stop": ["a", "b"]}),
        (("--logit-bias", "5=1.5", "--seed", "7"), {"logit_bias": {"5": 1.5}, "seed": 7}),
        (("--no-skip-special-tokens",), {"skip_special_tokens": False}),
        (("--json-object",), {"response_format": {"type": "json_object"}}),
        (("--json-schema", str(schema)), {"response_format": {"type": "json_schema", "json_schema": named}}),
        (("--regex", "[ab]"), {"structured_outputs": {"regex": "[ab]"}}),
        (("--choice", "x", "--choice", "y"), {"structured_outputs": {"choice": ["x", "y"]}}),
        (("--timing",), {"stream_options": {"include_usage": True}}),
    ]  # fmt: skip
    for arguments, expected in cases:
        pipe_in(b"hi\n")
        with FakeApiServer(telling("a")) as server:
            assert chat(server, *arguments) == 0
            messages = [{"role": "user", "content": "hi"}]
            assert bodies(server) == [{"model": "fake", "messages": messages, "stream": True, **expected}]


def test_the_key(pipe_in: PipeIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    for arguments, key in (((), "of the environment"), (("--api-key", "given"), "given")):
        pipe_in(b"hi\n")
        with FakeApiServer(telling("a")) as server:
            assert chat(server, *arguments, "--header", "X-Mine: 1") == 0
            headers = [request.headers for request in server.requests]
        assert {header["authorization"] for header in headers} == {f"Bearer {key}"}
        assert {header["x-mine"] for header in headers} == {"1"}


def test_ctrl_c_disconnects_and_keeps_what_was_said(
    at_a_terminal: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    left: list[bool] = []
    write_text = console.write_text
    monkeypatch.setattr(
        console, "write_text", lambda text, **options: (write_text(text, **options), shown.append(text))
    )

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        if len(server.requests) > 2:
            await telling("three")(request, reply)
            return
        await reply.begin_events()
        for text in ("one, ", "two, "):
            await reply.event(text_chunk(request, text))
        while len(shown) < 2:
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        await reply.until_client_leaves()
        left.append(True)

    at_a_terminal("count", "go on")
    with FakeApiServer(script) as server:
        assert chat(server) == 0
        said = bodies(server)[1]["messages"]
        assert left == [True]
    assert said[1] == {"role": "assistant", "content": "one, two, "}
    captured = capsys.readouterr()
    assert captured.out == "one, two, three\n\n"
    assert "(stopped)" in captured.err


def test_an_error_takes_the_turn_back_and_the_conversation_goes_on(
    at_a_terminal: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        number = len(bodies(server))
        if number == 1:
            await reply.json({"error": {"message": "wait\na bit"}}, 429)
        elif number == 2:
            await reply.json({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400)
        elif number == 3:
            await reply.begin_events()
            await reply.event(text_chunk(request, "half"))
            reply.reset()
        else:
            await telling("fine")(request, reply)

    at_a_terminal("a", "b", "c", "d")
    with FakeApiServer(script) as server:
        assert chat(server) == 0
        assert bodies(server)[3]["messages"] == [{"role": "user", "content": "d"}]
    captured = capsys.readouterr()
    assert captured.out == "half\nfine\n\n"
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "status 429: wait a bit" in errors[0]
    assert "status 400: too long\n/clear starts a new conversation." in captured.err
    assert "broke the connection off" in errors[2] or "closed the connection" in errors[2]


def test_an_error_ends_a_conversation_that_nobody_types(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.json({"error": {"message": "no"}}, 401)

    pipe_in(b"a\nb\n")
    with FakeApiServer(script) as server:
        assert chat(server) == 2
        assert len(bodies(server)) == 1
    assert "status 401: no" in capsys.readouterr().err


def reasoning() -> Script:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        for delta in ({"role": "assistant", "content": ""}, {"reasoning_content": "hm\x1b"}, {"content": "Yes."}):
            await reply.event({"choices": [{"index": 0, "delta": delta}]})
        await reply.end_events()

    return script


def test_reasoning_is_dim_on_a_terminal_and_no_part_of_the_answer(
    pipe_in: PipeIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe_in(b"a\nb\n")
    with FakeApiServer(reasoning()) as server:
        assert chat(server) == 0
        assert bodies(server)[1]["messages"][1] == {"role": "assistant", "content": "Yes."}
    assert capsys.readouterr().out == "Yes.\n" * 2
    pipe_in(b"a\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with FakeApiServer(reasoning()) as server:
        assert chat(server) == 0
    assert capsys.readouterr().out == "\x1b[2mhm\\x1b\x1b[22m\n\nYes.\n"


def test_timing(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"a\n")
    with FakeApiServer(telling("a", "b", "c")) as server:
        assert chat(server, "--timing") == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith("7 prompt tokens, TTFT ")
    assert line.endswith("tok/s (3 tokens)")

    async def uncounted(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        await reply.event(text_chunk(request, "a", "length"))
        await reply.end_events()

    async def silent(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        await reply.event(usage_chunk(3, 0))
        await reply.end_events()

    for script, expected in ((uncounted, "ms, the server did not count the tokens"), (silent, "3 prompt tokens")):
        pipe_in(b"a\n")
        with FakeApiServer(script) as server:
            assert chat(server, "--timing") == 0
        err = capsys.readouterr().err
        assert err.strip().endswith(expected)
        assert ("(cut off at the limit of tokens" in err) == (script is uncounted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "2"), "--threads is about a model that runs in this process"),
        (("--backend", "cpu"), "--backend is about"),
        (("--speculative", "ngram"), "--speculative is about"),
        (("--draft-layers", "1"), "--draft-layers is about"),
        (("--session", "x.chat"), "--session is about"),
        (("--header", "a b: c"), "has characters that no header may have"),
        (("--timeout", "0"), "timeout must be a number over 0 and up to 86400, not 0.0"),
        (("--timeout", "nan"), "timeout must be a number over 0"),
    ],
)
def test_what_has_no_use_with_a_server(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--api-key", "x"), ("--header", "A: b"), ("--timeout", "3")])
def test_what_needs_a_server(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *arguments]) == 2
    assert f"{arguments[0]} is about a server: give --url too" in capsys.readouterr().err


def test_nobody_listens(pipe_in: PipeIn, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeApiServer(telling("a")) as server:
        url = server.url
    pipe_in(b"hi\n")
    assert main(["chat", "--url", url]) == 2
    assert f"error: no connection to {url}: nothing listens there" in capsys.readouterr().err
