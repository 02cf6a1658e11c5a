"""The state of one server."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pellucid.core.errors import EngineClosedError
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings


def test_work_is_done_in_a_thread_of_its_own_until_the_end() -> None:
    async def main() -> None:
        serving = Serving(ServerSettings())
        assert (await serving.run(threading.current_thread)).name.startswith("pellucid-parsing")
        await serving.close()
        with pytest.raises(EngineClosedError, match="shutting down"):
            await serving.run(threading.current_thread)

    asyncio.run(main())
