"""Settings of the property tests; Python's own handler for Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Neither a deadline nor a verdict on slow data: a busy machine fails no test.
settings.register_profile("pellucid", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pellucid")


@pytest.fixture(scope="session", autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """A shell takes the handler from processes that it starts in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
