"""From what was asked for to an engine that is ready: finds, fetches, opens and loads a model."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.config import EngineConfig
from pellucid.core.errors import ModelFileError
from pellucid.core.trace import TraceSink
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.loading import check_same_vocabulary, make_drafter
from pellucid.estimate.memory import KVCapacity, decide_kv_capacity, free_memory, kv_bytes_per_token
from pellucid.models.kv_groups import kv_windows
from pellucid.models.spec import ModelSpec
from pellucid.tokenizer.tokenizer import Tokenizer
from pellucid.weights.catalog import resolve
from pellucid.weights.loader import open_model

if TYPE_CHECKING:
    from pellucid.weights.cache import Progress


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine, and what it was made of; whoever asked for it closes it.

    Attributes:
        model_path: the model file.
        model_status: of that file, as it was read.
        spec: what the model computes.
        tokenizer: text to token ids and back.
        backend: runs the model.
        drafter: guesses ahead; None where nobody does.
        capacity: KV blocks, and the longest sequence.
        engine: requests in, replies out.
    """

    model_path: Path
    model_status: os.stat_result
    spec: ModelSpec
    tokenizer: Tokenizer
    backend: Backend
    drafter: Drafter | None
    capacity: KVCapacity
    engine: LLMEngine

    def close(self) -> None:
        """Free weights, KV caches and threads."""
        if self.drafter is not None:
            self.drafter.close()
        self.backend.close()


def load_engine(
    config: EngineConfig, *, progress: Progress | None = None, trace: TraceSink | None = None
) -> LoadedEngine:
    """Find, fetch where needed, and load a model, and the one that guesses if there is one; size their KV caches; build
    the engine.

    Args:
        progress: called while a model is fetched.
        trace: told of every step and request.

    Raises:
        ModelNotFoundError, DownloadError, IntegrityError, StorageError: a model cannot be had.
        ModelFileError, UnsupportedModelError: it cannot be used.
        InvalidRequestError: `max_model_len` is more than the model was made for, it does not have the layers that are
            to guess, or the draft model has another vocabulary.
        CapacityError: it does not fit in memory, or `max_model_len` not in the KV cache.
        BackendError: the backend is not available on this machine.
    """
    with ExitStack() as unless_done:
        model = _load_model(config.model.model, config, progress)
        unless_done.callback(model.backend.close)
        draft_backend = None
        if config.speculative is not None and config.speculative.draft_model is not None:
            draft_model = _load_model(config.speculative.draft_model, config, progress)
            draft_backend = draft_model.backend
            unless_done.callback(draft_backend.close)
            check_same_vocabulary(model.tokenizer, draft_model.tokenizer)
        capacity, draft_capacity = _kv_capacities(config, model.backend, draft_backend)
        model.backend.allocate_kv_cache(capacity.num_blocks)
        if draft_backend is not None:
            draft_backend.allocate_kv_cache(draft_capacity.num_blocks)
        drafter = make_drafter(config, draft_backend or model.backend, draft_capacity)
        engine = LLMEngine(
            model.backend,
            model.tokenizer,
            config.scheduler,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            seed=config.model.seed,
            speculative=config.speculative,
            drafter=drafter,
            trace=trace,
        )
        unless_done.pop_all()
    return LoadedEngine(
        model.path, model.status, model.backend.spec, model.tokenizer, model.backend, drafter, capacity, engine
    )


@dataclass(frozen=True, slots=True)
class _ModelParts:
    path: Path
    status: os.stat_result
    tokenizer: Tokenizer
    backend: Backend


def _load_model(name: str, config: EngineConfig, progress: Progress | None) -> _ModelParts:
    """Find, fetch where needed, and load a model. Raises what `load_engine` does."""
    path = resolve(name, progress=progress)
    with open_model(path) as model_file:
        with _TokenizerThread(model_file.metadata) as tokenizer_thread:
            backend = load_backend(model_file, config.backend, kv_cache_dtype=config.cache.kv_cache_dtype)
        try:
            tokenizer = tokenizer_thread.result()
            if tokenizer.vocab_size != backend.spec.vocab_size:
                raise ModelFileError(
                    f"the tokenizer has {tokenizer.vocab_size} tokens, but embed_tokens has "
                    f"{backend.spec.vocab_size} rows; a sound file has as many of one as of the other",
                    param="tokenizer.ggml.tokens",
                )
        except BaseException:
            backend.close()
            raise
    return _ModelParts(path, model_file.status, tokenizer, backend)


def _kv_capacities(
    config: EngineConfig, backend: Backend, draft_backend: Backend | None
) -> tuple[KVCapacity, KVCapacity]:
    """KV blocks and longest sequence of the model, and of the one that guesses: itself if that is None. Two models
    share the memory so that they hold about as many tokens."""
    dtype, free = config.cache.kv_cache_dtype, free_memory()

    def decide(backend: Backend, model_max_len: int, max_model_len: int | None, share: float) -> KVCapacity:
        return decide_kv_capacity(
            bytes_per_block=backend.kv_bytes_per_block(),
            windows=kv_windows(backend.spec),
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            model_max_len=model_max_len,
            max_model_len=max_model_len,
            max_num_seqs=config.scheduler.max_num_seqs,
            kv_cache_memory=config.cache.kv_cache_memory,
            free_memory=free,
            share=share,
        )

    longest = backend.spec.max_position_embeddings
    if draft_backend is None:
        capacity = decide(backend, longest, config.model.max_model_len, 1.0)
        return capacity, capacity
    own, drafts = (kv_bytes_per_token(each.spec, dtype) for each in (backend, draft_backend))
    capacity = decide(backend, longest, config.model.max_model_len, own / (own + drafts))
    draft_longest = min(capacity.max_model_len, draft_backend.spec.max_position_embeddings)
    return capacity, decide(draft_backend, draft_longest, None, drafts / (own + drafts))


class _TokenizerThread(threading.Thread):
    """Builds the tokenizer while the block, which loads the weights, runs."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        super().__init__(name="tokenizer")
        self._metadata = metadata
        self._tokenizer: Tokenizer | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            tokenizer = Tokenizer.from_gguf(self._metadata)
            tokenizer.prepare()
            self._tokenizer = tokenizer
        except BaseException as error:
            self._error = error

    def result(self) -> Tokenizer:
        """The tokenizer; raises what building it raised."""
        if self._tokenizer is None:
            assert self._error is not None
            raise self._error
        return self._tokenizer

    def __enter__(self) -> _TokenizerThread:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.join()
