from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid.backends import registry
from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig
from pellucid.core.errors import BackendError

MODEL_FILE: Any = object()
CPU = "pellucid.backends.cpu.backend"


def fake_module(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        load=lambda model_file, *, threads, kv_cache_dtype: (name, model_file, threads, kv_cache_dtype)
    )


@pytest.fixture(autouse=True)
def fake_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "reference"):
        monkeypatch.setitem(sys.modules, f"pellucid.backends.{name}.backend", fake_module(name))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "expected"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_names(name: Any, expected: str) -> None:
    loaded: Any = load_backend(MODEL_FILE, BackendConfig(name, threads=3), kv_cache_dtype="f16")
    assert loaded == (expected, MODEL_FILE, 3, "f16")


def test_auto_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, CPU, None)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="reference backend, which is far slower; .* is not installed: "):
        loaded: Any = load_backend(MODEL_FILE, BackendConfig("auto"), kv_cache_dtype="f16")
    assert loaded[0] == "reference"


def test_cpu_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, CPU, None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match='backend="reference"'):
        load_backend(MODEL_FILE, BackendConfig("cpu"), kv_cache_dtype="f16")


def test_the_reason_is_the_one_the_installation_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, CPU, None)  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "BUILD_RECORD", tmp_path / "BUILD_FAILED.txt")
    (tmp_path / "BUILD_FAILED.txt").write_text("It is not installed.\nReason: no compiler was found.\nMore.\n")
    with pytest.raises(BackendError, match=r"the cpu backend is not installed: no compiler was found\. Install again"):
        load_backend(MODEL_FILE, BackendConfig("cpu"), kv_cache_dtype="f16")
