"""Drives peer.py in the peer's own Python."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("peer.py")


class PeerError(RuntimeError):
    """The peer did not start, or died."""


class PeerProcess:
    """A peer engine waiting for requests; a context manager.

    Attributes:
        version: what the peer calls itself.
    """

    def __init__(self, python: str, engine: str, *arguments: object) -> None:
        self.engine = engine
        self._process = subprocess.Popen(
            [python, str(WORKER), engine, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = str(self._reply()["version"])

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Run one request and return its reply.

        Raises:
            PeerError: the peer died.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing reply says how it ended
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raise PeerError(f"{self.engine} {how}; its output is above")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.close()
