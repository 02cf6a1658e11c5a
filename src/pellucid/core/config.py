"""What an engine was built with. Frozen once resolved; measured values are returned, never written back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar, get_args

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, UINT64_MAX, check_boolean, check_integer, check_real, refusal

BLOCK_SIZE = 64
"""Tokens a KV block holds, of the layers of one KV group (pellucid.models.kv_groups). Attention folds these blocks at
absolute positions (docs/kernels.md)."""

MAX_NUM_SEQS = 4096
MAX_NUM_BATCHED_TOKENS = 2**20
MAX_THREADS = 1024
MAX_MEMORY = 2**63 - 1
MAX_DRAFT_TOKENS = 64
MAX_PROMPT_LOOKUP = 32
MAX_LOOKAHEAD_NGRAM = 16
MAX_LAYER = 9_999

KVCacheDtype = Literal["f16", "bf16", "f32", "q8"]
BackendName = Literal["auto", "cpu", "reference"]
SpeculativeMethod = Literal["ngram", "lookahead", "layer_skip", "draft_model"]


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
    kv_cache_dtype: how keys and values are stored.
    kv_cache_memory: bytes for KV blocks; None takes a share of the free memory (pellucid.estimate.memory).
    enable_prefix_caching: keep full blocks for later prompts that begin alike.
    """

    kv_cache_dtype: KVCacheDtype = "f16"
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in get_args(KVCacheDtype):
            raise refusal("kv_cache_dtype", self.kv_cache_dtype, f"one of {', '.join(get_args(KVCacheDtype))}")
        if self.kv_cache_memory is not None:
            check_integer("kv_cache_memory", self.kv_cache_memory, 1, MAX_MEMORY, "a positive number of bytes")
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
    backend: "cpu" (the native core), "reference" (numpy, slow), or "auto": the native core where it is installed.
    threads: threads that compute; None lets the backend choose.
    """

    backend: BackendName = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            raise refusal("backend", self.backend, f"one of {', '.join(get_args(BackendName))}")
        if self.threads is not None:
            check_integer("threads", self.threads, 1, MAX_THREADS)


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How to guess ahead (docs/speculation.md). Never changes a token, only how many steps they take.

    Attributes:
        method: who guesses: "ngram" (what followed the same tokens earlier in the text), "lookahead" (n-grams that the
            model has produced in passing), "layer_skip" (some layers of the model itself) or "draft_model" (a smaller
            model).
        num_draft_tokens: most tokens guessed of a sequence in a step.
        adaptive: guess as many, up to that, as pay by what was accepted and what steps were measured to take, and none
            where that is best; False guesses `num_draft_tokens` always.
        prompt_lookup_min, prompt_lookup_max: with "ngram", how many tokens must be the same, and how many are compared;
            None for 2 and 4.
        lookahead_ngram: with "lookahead", tokens of an n-gram, of which all but the last say what comes next; None for
            4.
        lookahead_window: with "lookahead", most guesses that are refined from step to step; None for 8.
        draft_model: with "draft_model", a catalog name, a path or an `hf:` reference. Its vocabulary is the model's.
        layers: with "layer_skip", the layers that guess, rising; None leaves the choice to the engine.

    Raises:
        InvalidRequestError: a value is out of its range, or belongs to another method; `param` names it.
    """

    method: SpeculativeMethod
    num_draft_tokens: int = 16
    adaptive: bool = True
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    lookahead_ngram: int | None = None
    lookahead_window: int | None = None
    draft_model: str | None = None
    layers: Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(SpeculativeMethod):
            raise refusal("speculative", self.method, f"one of {', '.join(get_args(SpeculativeMethod))}")
        check_integer("num_draft_tokens", self.num_draft_tokens, 1, MAX_DRAFT_TOKENS)
        check_boolean("adaptive", self.adaptive)
        for name, method in _METHOD_OF_OPTION.items():
            if getattr(self, name) is not None and self.method != method:
                raise InvalidRequestError(
                    f"{name} is an option of the method '{method}', not of '{self.method}'", param=name
                )
        if self.method == "ngram":
            longest = 4 if self.prompt_lookup_max is None else self.prompt_lookup_max
            check_integer("prompt_lookup_max", longest, 1, MAX_PROMPT_LOOKUP)
            shortest = min(2, longest) if self.prompt_lookup_min is None else self.prompt_lookup_min
            check_integer("prompt_lookup_min", shortest, 1, longest, f"an integer from 1 to {longest}, the longest")
            self._set("prompt_lookup_max", int(longest))
            self._set("prompt_lookup_min", int(shortest))
        if self.method == "lookahead":
            size = 4 if self.lookahead_ngram is None else self.lookahead_ngram
            self._set("lookahead_ngram", check_integer("lookahead_ngram", size, 2, MAX_LOOKAHEAD_NGRAM))
            window = 8 if self.lookahead_window is None else self.lookahead_window
            self._set("lookahead_window", check_integer("lookahead_window", window, 1, MAX_DRAFT_TOKENS))
        if self.method == "draft_model" and (not isinstance(self.draft_model, str) or not self.draft_model):
            raise refusal("draft_model", self.draft_model, "a catalog name, a path or an hf: reference")
        if self.layers is not None:
            self._set("layers", _rising_layers(self.layers))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


_METHOD_OF_OPTION: dict[str, SpeculativeMethod] = {
    "prompt_lookup_min": "ngram",
    "prompt_lookup_max": "ngram",
    "lookahead_ngram": "lookahead",
    "lookahead_window": "lookahead",
    "draft_model": "draft_model",
    "layers": "layer_skip",
}


def _rising_layers(value: Any) -> tuple[int, ...]:
    range_text = "layer numbers from 0, each once, rising"
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise refusal("layers", value, range_text)
    layers = tuple(check_integer("layers", layer, 0, INT32_MAX, range_text) for layer in value)
    if not layers or list(layers) != sorted(set(layers)):
        raise refusal("layers", list(layers), range_text)
    return layers


def layer_numbers(text: str) -> list[int]:
    """`0-10,19-29`: numbers and ranges, which include their ends.

    Raises:
        ValueError: it is anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers += range(_layer_number(first), _layer_number(last or first) + 1)
    return layers


def _layer_number(text: str) -> int:
    number = int(text[:10])
    if number > MAX_LAYER:  # before a range is made of it
        raise ValueError(text)
    return number


def speculative_config(value: SpeculativeMethod | SpeculativeConfig | None) -> SpeculativeConfig | None:
    """What the name of a method stands for, or a configuration as it is.

    Raises:
        InvalidRequestError: it is neither, nor None.
    """
    if isinstance(value, str):
        return SpeculativeConfig(value)
    if value is not None and not isinstance(value, SpeculativeConfig):
        raise refusal("speculative", value, "None, the name of a method or a SpeculativeConfig")
    return value


def speculation(method: SpeculativeMethod | None, **options: Any) -> SpeculativeConfig | None:
    """The configuration of a method with those `options` that are not None; None where nothing is to be guessed.

    Raises:
        InvalidRequestError: an option is out of range, or says how to guess where nothing is to be guessed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if method is None:
        for name in given:
            raise InvalidRequestError(f"{name} needs a method: give --speculative too", param=name)
        return None
    return SpeculativeConfig(method, **given)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine was asked for."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    backend: BackendConfig
    speculative: SpeculativeConfig | None = None


class EngineOptions(TypedDict, total=False):
    """The keyword arguments of LLM and AsyncEngine that make an EngineConfig. Each is a field of one of its parts,
    which has the default and checks the range.

    A TypedDict, so that they are listed once and editors and type checkers still know them by name in each signature
    (PEP 692); an object to be passed instead would make every caller import and build it.
    """

    threads: int | None
    max_model_len: int | None
    seed: int | None
    backend: BackendName
    kv_cache_dtype: KVCacheDtype
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None
    enable_prefix_caching: bool
    speculative: SpeculativeMethod | SpeculativeConfig | None


ENGINE_DEFAULTS: Mapping[str, Any] = {
    field.name: field.default
    for config in (ModelConfig, CacheConfig, SchedulerConfig, BackendConfig)
    for field in fields(config)
    if field.name in EngineOptions.__annotations__
} | {"speculative": None}
"""What each of EngineOptions is where it is not given."""

_Config = TypeVar("_Config", ModelConfig, CacheConfig, SchedulerConfig, BackendConfig)


def engine_config(
    model: str, options: EngineOptions, *, max_waiting: int | None = None, max_queue_seconds: float | None = None
) -> EngineConfig:
    """The configuration that a model and options amount to.

    Raises:
        TypeError: there is no such option.
        InvalidRequestError: a value is out of its range; `param` names it.
    """
    for name in options.keys() - EngineOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {name!r}; there are {', '.join(EngineOptions.__annotations__)}")
    given = {**options, "model": model, "max_waiting": max_waiting, "max_queue_seconds": max_queue_seconds}
    return EngineConfig(
        _filled(ModelConfig, given),
        _filled(CacheConfig, given),
        _filled(SchedulerConfig, given),
        _filled(BackendConfig, given),
        speculative_config(options.get("speculative")),
    )


def _filled(config: type[_Config], given: Mapping[str, Any]) -> _Config:
    return config(**{field.name: given[field.name] for field in fields(config) if field.name in given})


def num_blocks_for(num_tokens: int) -> int:
    """KV blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)
