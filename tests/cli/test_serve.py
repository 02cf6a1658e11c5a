"""`pellucid serve` as a process: it starts, serves, drains, and ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pellucid.server.options import OPTIONS
from tests.support.server_process import SECONDS, ServerProcess

SMALL = ("--threads", "1", "--kv-cache-memory", "64MiB", "--served-model-name", "tiny")
SLOW = (*SMALL, "--backend", "reference")
LONG = {"model": "tiny", "prompt": "once", "max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0}
"""Takes a second of the reference backend, or as good as no time of the native core."""
ENDLESS = {**LONG, "max_tokens": 1000, "n": 16, "temperature": 1}
"""Takes the reference backend longer than any test waits."""


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pellucid", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **(environment or {})},
    )


class Stream:
    """A completion that is read as it comes."""

    def __init__(self, server: ServerProcess, body: Any) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=SECONDS)
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def event(self) -> str:
        """The data of the next event; "" at the end."""
        for line in self._answer:
            if line.startswith(b"data: "):
                return line[6:].decode().strip()
        return ""

    def rest(self) -> list[str]:
        """The data of all further events."""
        return list(iter(self.event, ""))

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@pytest.fixture(scope="module")
def server(chat_model: str) -> Iterator[ServerProcess]:
    with ServerProcess(chat_model, *SMALL) as server:
        server.wait_for("Ready in")
        yield server


def test_it_says_where_it_listens_what_it_was_told_and_when_it_is_ready(server: ServerProcess, chat_model: str) -> None:
    log = "\n".join(server.log)
    assert f"Listening on {server.url}" in log
    assert 'served_model_names = ["tiny"]' in log
    assert "# --served-model-name" in log
    assert "model=tiny max_model_len=1024" in server.wait_for("Ready in")
    lines = [line for line in server.log if "  # " in line]
    assert {line.split(" = ")[0].removeprefix("# ").partition(":")[0] for line in lines} == OPTIONS.keys() - {
        "api_key_file"
    }


def test_it_answers(server: ServerProcess) -> None:
    assert server.get("/health") == (200, {"status": "ok"})
    status, state = server.get("/ready")
    assert (status, state["state"], state["models"]) == (200, "ready", ["tiny"])
    body = {"model": "tiny", "prompt": "once", "max_tokens": 3, "ignore_eos": True}
    status, answer = server.post("/v1/completions", body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)


def test_a_stream_that_runs_when_the_signal_comes_is_finished(chat_model: str) -> None:
    with ServerProcess(chat_model, *SLOW) as server:
        server.wait_for("Ready in")
        stream = Stream(server, LONG)
        events = [stream.event()]
        server.send(signal.SIGTERM)
        server.wait_for("Finishing what was begun")
        assert server.get("/health") == (200, {"status": "ok"})
        assert server.get("/ready")[1]["state"] == "draining"
        events += stream.rest()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert server.log[-1].endswith("Stopped")
        assert not any("Aborting" in line for line in server.log)


def test_nothing_new_is_begun_and_a_second_signal_aborts_what_runs(chat_model: str) -> None:
    with ServerProcess(chat_model, *SLOW) as server:
        server.wait_for("Ready in")
        stream = Stream(server, ENDLESS)
        stream.event()
        server.send(signal.SIGTERM)
        server.wait_for("Finishing what was begun")
        status, body = server.post("/v1/completions", {**LONG, "stream": False})
        assert (status, body["error"]["code"]) == (503, "engine_closed")
        assert server.get("/ready")[0] == 503
        server.send(signal.SIGINT)
        events = stream.rest()
        assert [json.loads(event)["error"]["code"] for event in events if '"error"' in event] == ["engine_closed"]
        assert server.wait() == 0
        assert any("Aborting requests requests=1" in line for line in server.log)
        requests = [line.partition(" path=")[2] for line in server.log if " request id=" in line]
        assert [line.partition(" error=")[2] for line in requests] == ["engine_closed", "engine_closed"]


def test_what_takes_longer_than_the_drain_is_aborted(chat_model: str) -> None:
    with ServerProcess(chat_model, *SLOW, "--drain-seconds", "0.05") as server:
        server.wait_for("Ready in")
        stream = Stream(server, ENDLESS)
        stream.event()
        server.send(signal.SIGINT)
        events = stream.rest()
        assert sum('"error"' in event for event in events) == 1
        assert server.wait() == 130


def test_a_client_that_leaves_is_noted_and_holds_nothing_up(chat_model: str) -> None:
    with ServerProcess(chat_model, *SLOW) as server:
        server.wait_for("Ready in")
        stream = Stream(server, ENDLESS)
        stream.event()
        stream.close()
        line = server.wait_for("client_gone=true")
        assert "path=/v1/completions status=200" in line
        assert server.stop() == 0
        assert not any("Finishing" in line for line in server.log)


def test_neither_an_idle_connection_nor_one_that_is_not_read_keeps_it_from_ending(chat_model: str) -> None:
    with ServerProcess(chat_model, *SMALL) as server:
        server.wait_for("Ready in")
        address = urlsplit(server.url)
        idle = socket.create_connection((address.hostname, address.port), timeout=SECONDS)
        unread = socket.socket()
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect((address.hostname, address.port))
        body = json.dumps({**ENDLESS, "logprobs": 5}).encode()
        unread.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        unread.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert unread.recv(4) == b"HTTP"
        with idle, unread:
            server.send(signal.SIGTERM)
            server.wait_for("Finishing what was begun")
            server.send(signal.SIGTERM)
            assert server.wait() == 0
            assert idle.recv(1) == b""


def test_a_port_in_use_is_refused_before_anything_is_loaded(chat_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(chat_model, "--port", str(port))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: port {port} of 127.0.0.1 is in use: ")


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    result = run(str(tmp_path / "none.gguf"), "--port", "0")
    assert result.returncode == 2
    assert "error the model cannot be loaded: " in result.stderr
    assert "none.gguf" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--port", "http"], {}, "error: --port: port must be an integer from 0 to 65535, not 'http'"),
        (["--prot", "80"], {}, "error: unknown option `--prot`: did you mean `--port`?"),
        (["one", "two"], {}, "error: unexpected argument `two`"),
        ([], {"PELLUCID_SERVE_PROT": "80"}, "did you mean `PELLUCID_SERVE_PORT`?"),
        (["--config", "/nowhere/serve.toml"], {}, "error: No such file or directory: /nowhere/serve.toml"),
        (["--host", "host.invalid"], {}, "error: host 'host.invalid' is not known"),
        (["--host", "192.0.2.1"], {}, "error: host 192.0.2.1 is not an address of this machine"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], environment: dict[str, str], message: str) -> None:
    result = run(*arguments, environment=environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_configuration_can_be_printed_and_has_no_key(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 8123\napi_keys = ["open-sesame"]\n')
    result = run("--config", str(file), "--print-config", environment={"PELLUCID_SERVE_SEED": "7"})
    assert result.returncode == 0
    assert "open-sesame" not in result.stdout + result.stderr
    lines = [line.split("  # ") for line in result.stdout.splitlines()]
    assert {("port = 8123", str(file)), ("seed = 7", "PELLUCID_SERVE_SEED")} <= {(a.strip(), b) for a, b in lines}


def test_help_has_every_option() -> None:
    result = run("--help")
    assert result.returncode == 0
    for option in OPTIONS.values():
        assert (option.metavar if option.name == "model" else option.flag) in result.stdout


def test_json_logs_are_json_to_the_last_line(chat_model: str) -> None:
    with ServerProcess(chat_model, *SMALL, "--log-format", "json", "--log-level", "debug") as server:
        server.wait_for("Ready in")
        server.post("/v1/completions", {"model": "tiny", "prompt": "once", "max_tokens": 3, "ignore_eos": True})
        server.get("/health")
        assert server.stop() == 0
        records = [json.loads(line) for line in server.log]
    assert all({"time", "level", "message"} <= record.keys() for record in records)
    assert records[0]["options"]["served_model_names"] == {"value": ["tiny"], "source": "--served-model-name"}
    (request,) = [record for record in records if record.get("path") == "/v1/completions"]
    assert request["message"] == "request"
    assert (request["method"], request["status"], request["finish"]) == ("POST", 200, "length")
    assert (request["output_tokens"], request["cached_tokens"]) == (3, 0)
    assert 0 < request["ttft"] < request["seconds"]


@pytest.mark.parametrize("command", [["generate", "once", "--max-tokens", "2"], ["run-batch", "/dev/null", "-"]])
def test_no_other_command_loads_what_only_a_server_needs(command: list[str], chat_model: str) -> None:
    arguments = [*command, "--model", chat_model]
    code = f"import sys; from pellucid.cli.main import main; main({arguments!r}); print('MODULES', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )
    loaded = set(result.stdout.rpartition("MODULES")[2].split())
    assert "pellucid.cli." + command[0].replace("-", "_") in loaded
    assert loaded.isdisjoint(("starlette", "uvicorn", "h11", "anyio", "prometheus_client", "pellucid.server.app"))
