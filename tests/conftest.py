"""Settings of the property tests; Python's own handler for Ctrl-C; tiny models as files."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.chat_models import write_base_model, write_chat_model

# Neither a deadline nor a verdict on slow data: a busy machine fails no test. And the same examples in every run, so
# that none fails for what nobody changed; `--hypothesis-profile=explore` goes looking for others.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("pellucid", UNHURRIED, derandomize=True)
settings.register_profile("explore", UNHURRIED, derandomize=False)
settings.load_profile("pellucid")


@pytest.fixture(scope="session", autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """A shell takes the handler from processes that it starts in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny model with a chat template; its context holds 1,024 tokens."""
    return write_chat_model(tmp_path_factory.mktemp("models") / "chat.gguf")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model without a chat template."""
    return write_base_model(tmp_path_factory.mktemp("models") / "base.gguf")
