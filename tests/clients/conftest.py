"""Servers that clients talk to, and clients that talk to nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from pellucid.weights.catalog import DEFAULT_MODEL, entries, is_cached
from tests.support.server_process import ServerProcess, ready_server

# Before the libraries are imported, which read these then: no telemetry, nothing fetched, no proxy in between.
os.environ |= {
    "ANONYMIZED_TELEMETRY": "false",
    "DISABLE_AIOHTTP_TRANSPORT": "True",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}

KEY = "sk-test"


@pytest.fixture(scope="session")
def server(chat_model: str) -> Iterator[ServerProcess]:
    """One that answers nonsense, and wants KEY."""
    with ready_server(chat_model, "--api-key", KEY) as server:
        yield server


@pytest.fixture(scope="session")
def full_server(chat_model: str) -> Iterator[ServerProcess]:
    """One that computes a single sequence at a time, slowly, and lets nobody wait."""
    slow = ("--backend", "reference", "--max-num-seqs", "1", "--max-waiting", "1", "--request-timeout", "5")
    with ready_server(chat_model, "--api-key", KEY, *slow) as server:
        yield server


@pytest.fixture(scope="session")
def real_server() -> Iterator[ServerProcess]:
    """One with a model that can be understood. It caches no prompts: how many tokens of one were found in the cache
    would depend on what was asked before."""
    pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    entry = next(entry for entry in entries() if entry.name == DEFAULT_MODEL)
    if not is_cached(entry):
        pytest.skip(f"{DEFAULT_MODEL} is not in the cache: pellucid pull {DEFAULT_MODEL}")
    sizes = ("--threads", "2", "--kv-cache-memory", "256MiB", "--no-enable-prefix-caching")
    with ready_server(DEFAULT_MODEL, *sizes, "--api-key", KEY, name=DEFAULT_MODEL) as server:
        yield server


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if "tests/clients" in item.path.as_posix():
            item.add_marker(pytest.mark.slow)
