"""Work is cancelled where its client leaves, and else ends as it would by itself."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from pellucid.core.errors import EngineClosedError
from pellucid.server.http import disconnect
from pellucid.server.http.disconnect import unless_disconnected
from tests.support.mutants import mutant


def run(work: Coroutine[Any, Any, Any], *, leaves: bool) -> tuple[Any, list[dict[str, Any]]]:
    """What comes of `work`, result or kind of exception, and what the event loop had to complain of."""
    complaints: list[dict[str, Any]] = []

    async def receive() -> Message:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        try:
            return await disconnect.unless_disconnected(Request({"type": "http"}, receive), work)
        except Exception as error:
            return type(error)  # the error itself would keep the tasks alive

    result = asyncio.run(main())
    gc.collect()
    return result, complaints


async def endless() -> None:
    await asyncio.Event().wait()


async def failing_at_its_end() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise EngineClosedError("the server is shutting down")


async def answer() -> int:
    return 3


async def refuse() -> None:
    raise EngineClosedError("no")


def test_work_ends_as_by_itself() -> None:
    assert run(answer(), leaves=False) == (3, [])
    assert run(refuse(), leaves=False) == (EngineClosedError, [])


@pytest.mark.parametrize("work", [endless, failing_at_its_end])
def test_who_leaves_cancels_the_work(work: Any) -> None:
    assert run(work(), leaves=True) == (ClientDisconnect, [])


def test_failures_that_nobody_looks_at_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "asyncio.gather(working, leaving, return_exceptions=True)"
    monkeypatch.setattr(
        disconnect, "unless_disconnected", mutant(unless_disconnected, waits, "asyncio.wait((working, leaving))")
    )
    _, complaints = run(failing_at_its_end(), leaves=True)
    assert "never retrieved" in complaints[0]["message"]
