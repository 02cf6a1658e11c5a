"""The benchmarks that start a server, on a model that takes no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_models import write_chat_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr + result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    if not Path("/proc/self/status").exists():
        pytest.skip("what a process holds is read as Linux tells it")
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.mark.slow
def test_a_short_soak_leaves_nothing(model: str) -> None:
    small = ("--clients", "4", "--max-tokens", "16", "--kv-cache-memory", "2MB", "--interval", "0.5", "--abort", "0.3")
    result = run("soak.py", model, "--minutes", "0.05", *small)
    assert result["load"]["completed"] > 0
    assert result["load"]["failed"] == 0
    assert set(result["left_over"].values()) == {0}
    assert 0 < result["rss_bytes"]["first"] <= result["rss_bytes"]["max"]


@pytest.mark.slow
def test_the_layer_is_measured(model: str) -> None:
    result = run("http_layer.py", model, "--rounds", "1", "--clients", "4", "--max-tokens", "16")
    assert {way: figures["tokens_per_s"] > 0 for way, figures in result["median"].items()} == {
        "offline": True,
        "server": True,
    }
    assert result["share"] == pytest.approx(1 - result["median_ratio"])
