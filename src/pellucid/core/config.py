"""What an engine was built with. Frozen once resolved; measured values are returned, never written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pellucid.core.batch import BLOCK_SIZE
from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, UINT64_MAX, check_boolean, check_integer, check_real, refusal

MAX_NUM_SEQS = 4096
MAX_NUM_BATCHED_TOKENS = 2**20
MAX_THREADS = 1024
MAX_MEMORY = 2**63 - 1

KVCacheDtype = Literal["f16", "bf16", "f32", "q8"]
BackendName = Literal["auto", "cpu", "reference"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Attributes:
    model: a catalog name, a path or an `hf:` reference.
    max_model_len: most tokens of a prompt and its continuation together; None takes the model's own limit, or what
        the KV cache holds where that is less.
    seed: from which requests without a seed of their own draw theirs; None takes the operating system's entropy.
    """

    model: str
    max_model_len: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, 2, INT32_MAX)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, UINT64_MAX, "None or an integer from 0 to 2^64 - 1")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Attributes:
    dtype: how keys and values are stored.
    memory: bytes for KV blocks; None takes a share of the free memory (pellucid.estimate.memory).
    enable_prefix_caching: keep full blocks for later prompts that begin alike.
    """

    dtype: KVCacheDtype = "f16"
    memory: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in get_args(KVCacheDtype):
            raise refusal("kv_cache_dtype", self.dtype, f"one of {', '.join(get_args(KVCacheDtype))}")
        if self.memory is not None:
            check_integer("kv_cache_memory", self.memory, 1, MAX_MEMORY, "a positive number of bytes")
        check_boolean("enable_prefix_caching", self.enable_prefix_caching)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Attributes:
    max_num_seqs: most sequences in one step.
    max_num_batched_tokens: most tokens in one step, at least `max_num_seqs`. A longer prefill is cut into chunks, so
        this bounds how long a running sequence waits for its next token.
    max_waiting: most sequences in the waiting queue; None for no limit.
    max_queue_seconds: longest a request may wait to be first scheduled; None for no limit.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int | None = None
    max_queue_seconds: float | None = None

    def __post_init__(self) -> None:
        check_integer("max_num_seqs", self.max_num_seqs, 1, MAX_NUM_SEQS)
        check_integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, MAX_NUM_BATCHED_TOKENS)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"not {self.max_num_batched_tokens}: each running sequence gets a token in every step",
                param="max_num_batched_tokens",
            )
        if self.max_waiting is not None:
            check_integer("max_waiting", self.max_waiting, 1, INT32_MAX)
        if self.max_queue_seconds is not None:
            seconds = check_real("max_queue_seconds", self.max_queue_seconds, "a number over 0")
            if seconds <= 0:
                raise refusal("max_queue_seconds", seconds, "a number over 0")


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Attributes:
    name: "cpu" (the native core), "reference" (numpy, slow), or "auto": the native core where it is installed.
    threads: threads that compute; None lets the backend choose.
    """

    name: BackendName = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(BackendName):
            raise refusal("backend", self.name, f"one of {', '.join(get_args(BackendName))}")
        if self.threads is not None:
            check_integer("threads", self.threads, 1, MAX_THREADS)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine was asked for."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    backend: BackendConfig


def num_blocks_for(num_tokens: int) -> int:
    """KV blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
