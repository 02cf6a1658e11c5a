"""A server that is killed while it decodes: clients are told, and another one serves in its place at once."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pellucid import LLM
from pellucid.client.errors import ConnectionFailedError, ConnectionLostError
from pellucid.client.openai import OpenAIClient
from pellucid.weights import file_hash
from tests.support.server_process import MODEL, SECONDS, ServerProcess

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")

OPTIONS = ("--threads", "1", "--kv-cache-memory", "64MiB", "--served-model-name", MODEL, "--backend", "reference")
ENDLESS = {"max_tokens": 1000, "ignore_eos": True, "temperature": 1, "n": 4}
"""Takes the reference backend longer than any test waits."""
SHORT = {"model": MODEL, "prompt": "once", "max_tokens": 4, "temperature": 0, "ignore_eos": True}

TERMINAL = ("[DONE]", "message_stop", "response.completed", "response.failed", "event: error", '"error":{')


@pytest.fixture
def folder(chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a model, its hash and a prefix that was saved."""
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path))
    model = tmp_path / "models" / "tiny.gguf"
    model.parent.mkdir()
    shutil.copy(chat_model, model)
    monkeypatch.setattr(file_hash, "_UNSETTLED_NS", 0)
    with LLM(str(model), threads=1, backend="reference") as llm:
        llm.save_prefix("Once upon a time", tmp_path / "prefix")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def stream(url: str, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    """An answer that is streamed, of which the first event has been read."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)
    try:
        data = json.dumps({"model": MODEL, **body, "stream": True})
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline()
        yield response
    finally:
        connection.close()


def rest(response: http.client.HTTPResponse) -> str:
    """What still came of a stream that broke."""
    try:
        data = response.read()
    except http.client.IncompleteRead as error:
        return error.partial.decode(errors="replace")
    except ConnectionResetError:
        return ""
    raise AssertionError(f"the stream came to an end: {data[-200:]!r}")


@contextmanager
def chat(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`pellucid chat` in the middle of an answer."""
    options = ("--max-tokens", "1000", "--ignore-eos", "--temperature", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "pellucid", "chat", "--url", url, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Tell me a story.\n")
        process.stdin.close()
        process.stdin = None
        assert process.stdout.read(1)
        yield process
    finally:
        process.kill()
        process.communicate()


async def kill_while_it_streams(server: ServerProcess, came: list[str]) -> None:
    """Read an answer with the client's library; after its first piece the server is killed."""
    client = OpenAIClient(server.url, read_timeout=SECONDS)
    async with client.stream("completions", {"model": MODEL, "prompt": "once", **ENDLESS}) as chunks:
        async for chunk in chunks:
            if not came:
                server.send(signal.SIGKILL)
            came.append(chunk.text)


def test_clients_are_told_and_another_server_takes_its_place(folder: Path) -> None:
    before = contents(folder)
    assert {name.partition("/")[0] for name in before} == {"models", "hashes", "prefix"}
    model = folder / "models" / "tiny.gguf"
    with ServerProcess(str(model), *OPTIONS) as server:
        server.wait_for("Ready in")
        status, expected = server.post("/v1/completions", SHORT)
        assert status == 200
        message = {"role": "user", "content": "hello"}
        paths = {
            "/v1/completions": {"prompt": "once"},
            "/v1/chat/completions": {"messages": [message]},
            "/v1/messages": {"messages": [message], "max_tokens": 1000, "n": None},
            "/v1/responses": {"input": "hello", "max_output_tokens": 1000, "max_tokens": None, "n": None},
        }
        with chat(server.url) as talking, ExitStack() as opened:
            streams = [
                opened.enter_context(stream(server.url, path, {**ENDLESS, **body})) for path, body in paths.items()
            ]
            came: list[str] = []
            with pytest.raises(ConnectionLostError, match="before the answer was whole") as caught:
                asyncio.run(kill_while_it_streams(server, came))
            assert server.wait() == -signal.SIGKILL
            for response in streams:
                events = rest(response)
                assert not [terminal for terminal in TERMINAL if terminal in events]
            _, told = talking.communicate(timeout=SECONDS)
            with pytest.raises(ConnectionFailedError, match="nothing listens there"):
                asyncio.run(OpenAIClient(server.url).models())
        assert came
        assert server.url in caught.value.message
        assert talking.returncode != 0
        assert told.decode().splitlines()[-1].startswith(f"error: {server.url} ")
        assert b"before the answer was whole" in told
        assert b"Traceback" not in told
        assert contents(folder) == before
        with ServerProcess(str(model), *OPTIONS, "--port", str(urlsplit(server.url).port)) as second:
            second.wait_for("Ready in")
            assert second.url == server.url
            status, answer = second.post("/v1/completions", SHORT)
            assert (status, answer["choices"]) == (200, expected["choices"])
            assert second.stop() == 0
    assert contents(folder) == before
