"""A `pellucid serve` process for benchmarks: started, watched from outside, ended."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pellucid.client.errors import ServerError
from pellucid.client.http import HttpClient

START_SECONDS = 120
STOP_SECONDS = 60
SAMPLE = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds, as Linux tells.

    Attributes:
        rss: bytes of memory it has, those of mapped files among them.
        files: open files and connections.
        threads: of it.
    """

    rss: int
    files: int
    threads: int


class ServerProcess:
    """The server, ready when this is entered.

    Args:
        options: of `pellucid serve`, with the model.

    Raises:
        ServerError: it ended, or was not ready in time; the message has the end of its log.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed on leaving

    def __enter__(self) -> ServerProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "pellucid", "serve", "--port", str(port), *self._options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PELLUCID_SERVE_")}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=environment)
        try:
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            if self._process.poll() is not None:
                raise ServerError(f"the server ended:\n{self.log_tail()}")
            try:
                if (await self._get("/ready"))[0] == 200:
                    return
            except ServerError:
                continue
        raise ServerError(f"the server was not ready after {START_SECONDS} seconds:\n{self.log_tail()}")

    async def _get(self, path: str) -> tuple[int, str]:
        client = HttpClient(self.url, read_timeout=30)
        try:
            async with client.request("GET", path) as response:
                return response.status, (await response.read(2**22)).decode()
        finally:
            await client.aclose()

    async def metrics(self) -> dict[str, float]:
        """The samples of /metrics, by name and labels as they stand there."""
        _, text = await self._get("/metrics")
        return {match[1] + (match[2] or ""): float(match[3]) for match in SAMPLE.finditer(text)}

    def footprint(self) -> Footprint:
        process = Path("/proc") / str(self._process.pid)
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        rss = int(status["VmRSS"].split()[0]) * 1024
        return Footprint(rss, len(list((process / "fd").iterdir())), int(status["Threads"]))

    def processor_seconds(self) -> float:
        """Processor time that it has taken so far."""
        fields = (Path("/proc") / str(self._process.pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log_tail(self, num_lines: int = 10) -> str:
        """The last lines that it has written."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-num_lines:])

    def log_lines(self, *words: str) -> Sequence[str]:
        """The lines that it has written with one of `words` in them."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in words)]
