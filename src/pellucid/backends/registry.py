"""Backends by name, imported only when wanted."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.backends.base import Backend
from pellucid.core.config import BackendConfig
from pellucid.core.errors import BackendError

if TYPE_CHECKING:
    from pellucid.weights.loader import ModelFile

_MODULES = {"cpu": "pellucid.backends.cpu.backend", "reference": "pellucid.backends.reference.backend"}

# What the installation leaves where it could not build the native core (build_backend/pellucid_build.py).
BUILD_RECORD = Path(__file__).parent / "cpu" / "BUILD_FAILED.txt"


def load_backend(model_file: ModelFile, config: BackendConfig, *, kv_cache_dtype: str) -> Backend:
    """Load a model's weights into the backend that `config` names. "auto" warns where it has to take the slow one.

    Raises:
        BackendError: the native core was asked for and is not installed, or a backend failed to start.
        ModelFileError, UnsupportedModelError, CapacityError: the weights cannot be loaded.
    """
    name = "cpu" if config.backend == "auto" else config.backend
    try:
        module = import_module(_MODULES[name])
    except ImportError as error:
        if config.backend != "auto":
            raise BackendError(
                f"the {name} backend is not installed: {_reason(error)} "
                'Install again where it can be built, or use backend="reference".',
                param="backend",
            ) from error
        warnings.warn(
            f"using the reference backend, which is far slower; the native core is not installed: {_reason(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        module = import_module(_MODULES["reference"])
    backend: Backend = module.load(model_file, threads=config.threads, kv_cache_dtype=kv_cache_dtype)
    return backend


def _reason(error: ImportError) -> str:
    """Why the native core cannot be imported, as a sentence: what the installation recorded, else what Python says."""
    if BUILD_RECORD.is_file():
        for line in BUILD_RECORD.read_text(encoding="utf-8").splitlines():
            if line.startswith("Reason: "):
                return line.removeprefix("Reason: ")
    return f"{error}."
