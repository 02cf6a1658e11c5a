from __future__ import annotations

import pytest

from pellucid.client import http


@pytest.fixture(autouse=True)
def patient_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept connections are used again however long a busy machine takes between two requests."""
    monkeypatch.setattr(http, "MAX_IDLE_SECONDS", 600.0)
