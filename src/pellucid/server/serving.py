"""What the server serves: the model, from the moment it begins to load until the server ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeAlias, TypeVar

from starlette.requests import Request

from pellucid.core.errors import EngineClosedError
from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.errors import NotReadyError
from pellucid.server.metrics.server_metrics import ServerMetrics
from pellucid.server.served_model import ServedModel
from pellucid.server.settings import ServerSettings

P = ParamSpec("P")
T = TypeVar("T")
State: TypeAlias = Literal["loading", "ready", "draining", "failed"]

NUM_PARSING_THREADS = 2


@dataclass(slots=True)
class LoadProgress:
    """How far loading has come.

    Attributes:
        stage: what is being done.
        done, total: bytes of it; 0 where they are not known.
    """

    stage: str = "starting"
    done: int = 0
    total: int = 0


class Serving:
    """The state of one server.

    Attributes:
        settings: as resolved at start.
        created: when, in seconds since 1970.
        metrics: what the server counts.
        progress: of loading.
        failure: why the model could not be loaded; None if it was, or is being.
        load_seconds: how long loading took; None before it is done.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.metrics = ServerMetrics()
        self.progress = LoadProgress()
        self.failure: str | None = None
        self.load_seconds: float | None = None
        self._state: State = "loading"
        self._begin = time.monotonic()
        self._is_closed = False
        self._engine: AsyncEngine | None = None
        self._model: ServedModel | None = None
        self._threads = ThreadPoolExecutor(NUM_PARSING_THREADS, "pellucid-parsing")

    @property
    def state(self) -> State:
        return self._state

    @property
    def engine(self) -> AsyncEngine:
        """Raises NotReadyError while there is none."""
        if self._engine is None:
            raise self._not_ready()
        return self._engine

    @property
    def model(self) -> ServedModel:
        """Raises NotReadyError while there is none."""
        if self._model is None:
            raise self._not_ready()
        return self._model

    def set_ready(self, engine: AsyncEngine) -> None:
        """The model is loaded.

        Raises:
            InvalidRequestError: there is no parser of a name that the settings have.
        """
        settings = self.settings
        self._model = ServedModel.of(
            engine,
            settings.served_model_names,
            max_output_tokens=settings.max_output_tokens,
            tool_call_parser=settings.tool_call_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        self._engine = engine
        self.load_seconds = time.monotonic() - self._begin
        self._state = "ready"

    def set_failed(self, reason: str) -> None:
        """The model cannot be loaded."""
        self.failure = reason
        self._state = "failed"

    def set_draining(self) -> None:
        """The server is about to end: what was begun is finished, and nothing else is begun."""
        self._state = "draining"

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function` in a thread of its own: what takes a moment must not hold up the tokens of others.

        Raises:
            EngineClosedError: the server has come to its end while the body of a request still came.
        """
        if self._is_closed:
            raise EngineClosedError("the server is shutting down")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        """Abort what runs, and free the model."""
        self._is_closed = True
        self._threads.shutdown(wait=False)
        if self._engine is not None:
            await self._engine.shutdown()

    def _not_ready(self) -> NotReadyError:
        if self.failure is not None:
            return NotReadyError(f"the model could not be loaded: {self.failure}")
        return NotReadyError("the model is still loading: try again in a moment; /ready tells how far it is")


def serving_of(request: Request) -> Serving:
    """The state of the server that got `request`."""
    serving: Serving = request.app.state.serving
    return serving
