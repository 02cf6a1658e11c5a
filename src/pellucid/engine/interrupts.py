"""Ctrl-C between steps, never inside one: a half-done step would leave the KV cache's books half-written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferInterrupt:
    """Holds SIGINT back while the block runs, then hands it to the handler that was there.

    Does nothing off the main thread, the only one that signals interrupt, or where SIGINT is left to the system.
    """

    __slots__ = ("_frame", "_handler", "_pending")

    def __init__(self) -> None:
        self._handler: signal._HANDLER = None
        self._pending = False
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._pending = False
                self._handler = handler
                signal.signal(signal.SIGINT, self._defer)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        handler, self._handler = self._handler, None
        if callable(handler):
            signal.signal(signal.SIGINT, handler)
            if self._pending:
                handler(signal.SIGINT, self._frame)

    def _defer(self, _signum: int, frame: FrameType | None) -> None:
        self._pending = True
        self._frame = frame
