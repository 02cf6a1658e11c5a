"""`pellucid serve` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

SECONDS = 180
"""How long anything may take on a machine that is busy."""
MODEL = "tiny"
"""What requests call the model of `ready_server`."""


class ServerProcess:
    """Starts it at a port of its own. What it logs is in `log`, line by line.

    Attributes:
        url: where it listens, as "http://127.0.0.1:1234"; "" if it ended before it did.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "pellucid", "serve", "--port", "0", *arguments]
        self.log: list[str] = []
        self._new_line = threading.Condition()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.wait_for("http://127.0.0.1:")
        self.url = "http" + line.partition("http")[2].split()[0].strip('",}') if line else ""

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def wait_for(self, text: str) -> str:
        """The first line of the log that has `text` in it, once it is there; "" if the process ends without it."""

        def find() -> str | None:
            found = next((line for line in self.log if text in line), None)
            return "" if found is None and not self._reader.is_alive() else found

        with self._new_line:
            line = self._new_line.wait_for(lambda: find() is not None, SECONDS)
            assert line, f"nothing with {text!r} came:\n" + "\n".join(self.log)
            return find() or ""

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, once it has ended; the log is whole then."""
        code = self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def stop(self) -> int:
        """Ask it to stop. Returns the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and body, read as JSON, of a GET."""
        return self._ask(urllib.request.Request(self.url + path, headers=headers))

    def text(self, path: str, **headers: str) -> str:
        """The body, as it is, of a GET; HTTPError where the status is not 200."""
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers), timeout=SECONDS
        ) as answer:
            return str(answer.read(), "utf-8")

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and body, read as JSON, of a POST of a body as JSON."""
        headers = {"Content-Type": "application/json", **headers}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._new_line:
                self.log.append(line.rstrip("\n"))
                self._new_line.notify_all()
        with self._new_line:
            self._new_line.notify_all()


@contextmanager
def ready_server(
    model: str, *arguments: str, name: str = MODEL, environment: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server of the model at path `model`, once it is ready. Its log is printed at the end, for pytest to show with a
    test that fails.

    Args:
        arguments: of the command; they win over those that keep it small.
        name: what requests call the model.
        environment: variables beside those of this process.
    """
    small = ("--threads", "1", "--kv-cache-memory", "64MiB", "--served-model-name", name)
    with ServerProcess(model, *small, *arguments, environment=environment) as server:
        try:
            server.wait_for("Ready in")
            yield server
        finally:
            print("\n".join(server.log))
