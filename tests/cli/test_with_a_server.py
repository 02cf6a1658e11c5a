"""`pellucid bench serve` and `pellucid chat --url` with Pellucid's own server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pellucid.cli.main import main
from pellucid.client.http import HttpClient
from tests.support.live_server import LiveServer, live_server

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")

BENCH = (
    "--concurrency",
    "4",
    "--requests",
    "12",
    "--max-tokens",
    "8",
    "--prompt-words",
    "5",
    "--warmup",
    "1",
    "--json",
)
CHAT = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def server(chat_model: str) -> Iterator[LiveServer]:
    with live_server(chat_model) as started:
        yield started


@pytest.fixture(autouse=True)
def no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def bench(capsys: pytest.CaptureFixture[str], server: LiveServer, *arguments: str) -> dict[str, Any]:
    """The summary of the only run."""
    assert main(["bench", "serve", "--url", server.url, *BENCH, *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    summary: dict[str, Any] = result["results"][0]["servers"][0]["rounds"][0]
    return summary


async def metrics(server: LiveServer) -> str:
    client = HttpClient(server.url)
    async with client.request("GET", "/metrics") as response:
        text = (await response.read(2**22)).decode()
    await client.aclose()
    return text


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_answer_is_whole(server: LiveServer, capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    summary = bench(capsys, server, "--endpoint", endpoint)
    assert (summary["completed"], summary["errors"], summary["output_tokens"]) == (12, {}, 96)
    assert (summary["answers_without_usage"], summary["answers_short_of_max_tokens"]) == (0, 0)
    assert summary["prompt_tokens"] > 0
    assert 0 < summary["output_events"] <= 96  # a character of several tokens comes with the last of them


def test_clients_that_leave_leave_nothing(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    summary = bench(capsys, server, "--abort", "1", "--requests", "40", "--max-tokens", "200")
    assert summary["failed"] == 0
    assert summary["aborted"] > 0  # the others had ended before

    async def until_idle() -> None:
        idle = ('pellucid_kv_blocks{state="used"} 0.0', "pellucid_num_requests_unfinished 0.0")
        async with asyncio.timeout(60):
            text = ""
            while not all(line in text for line in idle):
                await asyncio.sleep(0.01)
                text = await metrics(server)

    asyncio.run(until_idle())


def test_too_many_requests_are_counted_as_such(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with live_server(chat_model, max_num_seqs=1, max_waiting=1) as full:
        summary = bench(capsys, full, "--concurrency", "12", "--max-tokens", "100", "--warmup", "0")
    assert summary["errors"].keys() == {"429"}
    assert summary["refusals_with_retry_after"] == summary["failed"] > 0
    assert summary["completed"] == 12 - summary["failed"] > 0


def test_a_conversation_is_the_one_with_the_model_itself(
    server: LiveServer, chat_model: str, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for who in (("--model", chat_model), ("--url", server.url)):
        pipe_in("hi\nand ü?\n".encode())
        assert main(["chat", *who, *CHAT, "--system", "be brief"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 20


def test_a_context_that_is_full(
    server: LiveServer, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(b"a" * 2000 + b"\nhi\n")
    assert main(["chat", "--url", server.url, *CHAT, "--timing"]) == 0
    captured = capsys.readouterr()
    assert "/clear starts a new conversation." in captured.err
    assert captured.err.count("TTFT") == 1
    assert captured.out


def test_a_key_is_asked_for(
    chat_model: str, pipe_in: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    key = "a-key-that-is-long-enough"
    with live_server(chat_model, api_keys=(key,)) as closed:
        pipe_in(b"hi\n")
        assert main(["chat", "--url", closed.url, *CHAT]) == 2
        assert "answered with status 401" in capsys.readouterr().err
        pipe_in(b"hi\n")
        assert main(["chat", "--url", closed.url, *CHAT, "--api-key", key]) == 0
        assert capsys.readouterr().out
        assert bench(capsys, closed, "--api-key", key)["completed"] == 12
