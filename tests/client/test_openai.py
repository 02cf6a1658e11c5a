from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pellucid.client.errors import ApiError, ConnectionLostError, ProtocolError
from pellucid.client.openai import Endpoint, OpenAIClient, StreamChunk, Usage, read_chunk
from pellucid.core.errors import InvalidRequestError
from tests.support.fake_api_server import FakeApiServer, FakeReply, FakeRequest, Script, telling, text_chunk

PATIENCE = 600  # seconds, for a machine that is busy or stands still
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def ask(script: Script, endpoint: Endpoint = "chat", body: dict[str, Any] = BODY) -> list[StreamChunk]:
    async def chunks(url: str) -> list[StreamChunk]:
        async with asyncio.timeout(PATIENCE), OpenAIClient(url).stream(endpoint, body) as stream:
            return [chunk async for chunk in stream]

    with FakeApiServer(script) as server:
        return asyncio.run(chunks(server.url))


def raw_events(*data: bytes) -> Script:
    """A stream of these bytes, each in a chunk of its own, and then the end of the body."""

    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.begin_events()
        for piece in data:
            await reply.chunk(piece)
        await reply.chunk(b"")

    return script


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_answer_and_its_usage(endpoint: Endpoint) -> None:
    chunks = ask(telling("Hel", "lo"), endpoint, {**BODY, "stream_options": {"include_usage": True}})
    assert chunks == [
        StreamChunk("Hel"),
        StreamChunk("lo"),
        StreamChunk(finish_reason="stop"),
        StreamChunk(usage=Usage(7, 2)),
    ]
    assert [chunk.has_output for chunk in chunks] == [True, True, False, False]


def test_events_cut_anywhere() -> None:
    event = json.dumps(text_chunk(FakeRequest("POST", "/chat/completions", {}, b""), "日本 🎈"), ensure_ascii=False)
    stream = f": hello\n\ndata: {event}\r\n\r\ndata: [DONE]\n\n".encode()
    for size in (1, 2, 5, len(stream)):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert ask(raw_events(*pieces)) == [StreamChunk("日本 🎈")]


def test_the_request() -> None:
    async def one(url: str) -> None:
        client = OpenAIClient(f"{url}/base/v2", api_key="secret", headers=[("X-Mine", "1")])
        async with client.stream("completions", {"prompt": "\ud800", "top_k": 1}) as stream:
            assert [chunk.text async for chunk in stream] == ["a", ""]

    with FakeApiServer(telling("a")) as server:
        asyncio.run(one(server.url))
        request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/base/v2/completions")
    assert {"authorization": "Bearer secret", "x-mine": "1"}.items() <= request.headers.items()
    assert request.body == {"prompt": "\ud800", "top_k": 1, "stream": True}


def test_a_header_of_the_callers_replaces_the_key() -> None:
    async def one(url: str) -> None:
        assert await OpenAIClient(url, api_key="a", headers=[("authorization", "Basic x")]).models() == ["m", "n"]

    with FakeApiServer(telling("a"), models=("m", "n")) as server:
        asyncio.run(one(server.url))
        assert server.requests[0].headers["authorization"] == "Basic x"
        assert server.requests[0].path == "/v1/models"


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        OpenAIClient("http://h", api_key="sec\r\nret")
    assert caught.value.param == "api_key"
    assert "ret" not in caught.value.message.replace("characters", "")


def test_connections_are_kept_after_an_answer() -> None:
    async def several(url: str) -> None:
        client = OpenAIClient(url)
        for _ in range(3):
            async with client.stream("chat", BODY) as stream:
                async for _ in stream:
                    pass
        await client.aclose()

    with FakeApiServer(telling("a", "b")) as server:
        asyncio.run(several(server.url))
        assert server.connections == 1


def refusing(value: Any, status: int = 400, headers: dict[str, str] | None = None) -> Script:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.json(value, status, headers)

    return script


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"error": {"message": "no such\nmodel", "code": "model_not_found"}}, "status 400: no such model"),
        ({"error": "plain"}, "status 400: plain"),
        ({"object": "error", "message": "vLLM's"}, "status 400: vLLM's"),
        ({"detail": [{"loc": ["body"], "msg": "x"}]}, 'status 400: [{"loc": ["body"], "msg": "x"}]'),
        ("text", "status 400: text"),
        ({}, "status 400"),
        ([1], "status 400: [1]"),
        ({"error": {"message": "x" * 5000}}, "status 400: " + "x" * 500 + "..."),
    ],
)
def test_refusals(value: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(refusing(value))
    assert caught.value.message.endswith(f"answered with {message}")
    assert caught.value.http_status == 400


def test_what_a_refusal_tells() -> None:
    error = {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}
    with pytest.raises(ApiError) as caught:
        ask(refusing(error, 429, {"Retry-After": "7"}))
    refusal = caught.value
    assert (refusal.http_status, refusal.retry_after) == (429, 7.0)
    assert (refusal.param, refusal.error_code, refusal.error_type) == ("p", "c", "t")


def test_a_refusal_that_is_no_json() -> None:
    async def script(request: FakeRequest, reply: FakeReply) -> None:
        await reply.head(502, {"Content-Length": "20", "Content-Type": "text/html"})
        await reply.write(b"<html>Bad\n gateway\xff<")

    with pytest.raises(ApiError, match="status 502: <html>Bad gateway"):
        ask(script)


def test_an_error_within_the_stream() -> None:
    good = b'data: {"choices": [{"text": "a"}]}\n\n'
    for event in (b'{"error": {"message": "broke", "code": 500}}', b'{"object": "error", "message": "broke"}'):
        with pytest.raises(ApiError, match="failed: broke") as caught:
            ask(raw_events(good, b"data: " + event + b"\n\n"))
        assert caught.value.http_status == 200


def test_a_stream_that_ends_without_its_terminal_event_is_cut_off() -> None:
    with pytest.raises(ConnectionLostError, match="without the event that ends a stream"):
        ask(raw_events(b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n', b"data: [DONE]\n"))


def test_an_answer_that_is_not_streamed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'application/json' instead of an event stream"):
        ask(refusing({"choices": []}, 200))


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"role": "assistant", "content": None}, StreamChunk()),
        ({"reasoning_content": "hm"}, StreamChunk(reasoning="hm")),
        ({"reasoning": "hm", "content": ""}, StreamChunk(reasoning="hm")),
        ({"tool_calls": [{"index": 0}]}, StreamChunk(has_tool_call=True)),
    ],
)
def test_deltas(delta: dict[str, Any], expected: StreamChunk) -> None:
    assert read_chunk(json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}), "o") == expected


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "1",
        "[]",
        "null",
        '"x"',
        '{"choices": 1}',
        '{"choices": [1]}',
        '{"choices": [{"text": 1}]}',
        '{"usage": {"prompt_tokens": "x"}}',
        "[" * 100_000,
    ],
)
def test_an_event_that_is_no_piece_of_an_answer(data: str) -> None:
    with pytest.raises(ProtocolError, match="no piece of an answer"):
        read_chunk(data, "o")


@pytest.mark.parametrize("value", [{}, {"data": []}, {"data": [{"id": 1}]}, [], {"data": None}])
def test_no_list_of_models(value: Any) -> None:
    with FakeApiServer(refusing(value, 200)) as server, pytest.raises(ProtocolError, match="model"):
        asyncio.run(OpenAIClient(f"{server.url}/other").models())
