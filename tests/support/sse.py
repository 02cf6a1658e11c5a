"""Server-sent events, read."""

from __future__ import annotations

import json
from typing import Any


def read_events(data: bytes) -> list[dict[str, Any]]:
    """What the events of `data` hold; each must be whole, and named by its `type`."""
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        name, _, body = block.partition("\n")
        event = json.loads(body.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    assert data.endswith(b"\n\n") or not data
    return events
