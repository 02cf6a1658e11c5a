"""Pellucid: an LLM inference engine you can see through."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.core.capture import Captured, CaptureParams, OperationCost
    from pellucid.core.config import SpeculativeConfig
    from pellucid.core.errors import (
        BackendError,
        CapacityError,
        ContextLengthError,
        DownloadError,
        EngineClosedError,
        EngineError,
        IntegrityError,
        InvalidRequestError,
        ModelFileError,
        ModelNotFoundError,
        PellucidError,
        PrefixFileError,
        QueueFullError,
        StorageError,
        UnsupportedModelError,
    )
    from pellucid.core.metrics import EngineMetrics, RequestMetrics
    from pellucid.core.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        LabelOutput,
        Logprob,
        RequestOutput,
        TokenOutput,
    )
    from pellucid.core.sampling_params import SamplingParams
    from pellucid.core.structured_outputs import StructuredOutputsParams
    from pellucid.engine.async_engine import AsyncEngine
    from pellucid.engine.async_request import AsyncTokenStream
    from pellucid.engine.llm import LLM

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "pellucid.engine.async_engine",
    "AsyncTokenStream": "pellucid.engine.async_request",
    "LLM": "pellucid.engine.llm",
    "SamplingParams": "pellucid.core.sampling_params",
    "StructuredOutputsParams": "pellucid.core.structured_outputs",
    "CaptureParams": "pellucid.core.capture",
    "Captured": "pellucid.core.capture",
    "OperationCost": "pellucid.core.capture",
    "CompletionOutput": "pellucid.core.outputs",
    "EmbeddingOutput": "pellucid.core.outputs",
    "LabelOutput": "pellucid.core.outputs",
    "Logprob": "pellucid.core.outputs",
    "SpeculativeConfig": "pellucid.core.config",
    "EngineMetrics": "pellucid.core.metrics",
    "RequestMetrics": "pellucid.core.metrics",
    "RequestOutput": "pellucid.core.outputs",
    "TokenOutput": "pellucid.core.outputs",
    "PellucidError": "pellucid.core.errors",
    "InvalidRequestError": "pellucid.core.errors",
    "ContextLengthError": "pellucid.core.errors",
    "QueueFullError": "pellucid.core.errors",
    "ModelNotFoundError": "pellucid.core.errors",
    "ModelFileError": "pellucid.core.errors",
    "PrefixFileError": "pellucid.core.errors",
    "UnsupportedModelError": "pellucid.core.errors",
    "DownloadError": "pellucid.core.errors",
    "IntegrityError": "pellucid.core.errors",
    "StorageError": "pellucid.core.errors",
    "BackendError": "pellucid.core.errors",
    "EngineError": "pellucid.core.errors",
    "EngineClosedError": "pellucid.core.errors",
    "CapacityError": "pellucid.core.errors",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncTokenStream",
    "BackendError",
    "CapacityError",
    "CaptureParams",
    "Captured",
    "CompletionOutput",
    "ContextLengthError",
    "DownloadError",
    "EmbeddingOutput",
    "EngineClosedError",
    "EngineError",
    "EngineMetrics",
    "IntegrityError",
    "InvalidRequestError",
    "LabelOutput",
    "Logprob",
    "ModelFileError",
    "ModelNotFoundError",
    "OperationCost",
    "PellucidError",
    "PrefixFileError",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeConfig",
    "StorageError",
    "StructuredOutputsParams",
    "TokenOutput",
    "UnsupportedModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
