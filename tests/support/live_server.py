"""A server that listens, for tests with real clients."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.app import create_app
from pellucid.server.run import WebServer, bind, url_of, web_config
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings

START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that is ready.

    Attributes:
        url: without a path, as "http://127.0.0.1:1234".
        model: what requests call its model.
    """

    url: str
    model: str

    def get(self, path: str, **headers: str) -> bytes:
        """The body of `GET path`; HTTPError where the status is not 200."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            body: bytes = answer.read()
            return body

    def post(self, path: str, body: Any, **headers: str) -> Any:
        """What answers a POST of a body as JSON; HTTPError where the status is not 200."""
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@contextmanager
def live_server(model: str, **settings: Any) -> Iterator[LiveServer]:
    """A server of the model at path `model`, on a port of its own, in a thread; `settings` are those of ServerSettings.

    It is ended at the end, whatever runs.
    """
    options = {"served_model_names": ("tiny",), "threads": 1, "kv_cache_memory": 64 << 20, **settings}
    serving = Serving(ServerSettings(model=model, port=0, **options))
    listener = bind("127.0.0.1", 0)
    server = WebServer(web_config(create_app(serving), serving.settings))

    async def serve() -> None:
        serving.set_ready(AsyncEngine(model, **serving.settings.engine_options()))
        try:
            await server.serve([listener])
        finally:
            await serving.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="live-server", daemon=True)
    thread.start()
    try:
        waited = threading.Event()
        for _ in range(START_SECONDS * 100):
            if server.started or not thread.is_alive():
                break
            waited.wait(0.01)
        assert server.started, "the server did not start"
        yield LiveServer(url_of(listener), serving.settings.served_model_names[0])
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
