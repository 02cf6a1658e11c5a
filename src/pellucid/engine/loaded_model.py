"""What LLM and AsyncEngine have in common: a model that is loaded, and the options that it was loaded with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import TYPE_CHECKING, TypeVar

from pellucid.core.config import ENGINE_DEFAULTS, EngineConfig, EngineOptions
from pellucid.core.metrics import EngineMetrics
from pellucid.core.trace import TraceSink
from pellucid.engine.loading import load_engine

if TYPE_CHECKING:
    from pellucid.weights.cache import Progress

Init = TypeVar("Init", bound=Callable[..., None])


class LoadedModel:
    """A model and the engine that runs it.

    Attributes:
        config: what was asked for.
        model_path: the model file.
        spec: what the model computes.
        tokenizer: text to token ids and back.
        backend: what runs the model, to be looked at and not to be run.
        backend_name: which backend that is.
        max_model_len: most tokens of a prompt and its continuation together.
        num_kv_blocks: KV blocks of 64 tokens.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None, trace: TraceSink | None) -> None:
        """Raises what `load_engine` does."""
        loaded = load_engine(config, progress=progress, trace=trace)
        self.config = config
        self.model_path = loaded.model_path
        self.spec = loaded.spec
        self.tokenizer = loaded.tokenizer
        self.backend = loaded.backend
        self.backend_name = loaded.backend.name
        self.max_model_len = loaded.capacity.max_model_len
        self.num_kv_blocks = loaded.capacity.num_blocks
        self._engine = loaded.engine
        self._loaded = loaded

    def metrics(self) -> EngineMetrics:
        """The engine now: requests, tokens, KV blocks, and where the time of its steps went. From any thread."""
        return self._engine.metrics()


def with_engine_options(init: Init) -> Init:
    """Lists EngineOptions one by one, with their defaults, in the signature that `help` and notebooks show of an
    `__init__` that takes them as `**options`. Type checkers and editors know them already."""
    signature = inspect.signature(init)
    *own, _ = signature.parameters.values()
    listed = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=ENGINE_DEFAULTS[name], annotation=annotation.__forward_arg__)
        for name, annotation in EngineOptions.__annotations__.items()
    ]
    setattr(init, "__signature__", signature.replace(parameters=[*own, *listed]))  # noqa: B010
    return init
