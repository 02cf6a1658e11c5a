"""What a server was told to do. Frozen and checked; where each value came from is the concern of config.py."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from pellucid.core.config import (
    MAX_MEMORY,
    BackendName,
    EngineOptions,
    KVCacheDtype,
    SpeculativeConfig,
    SpeculativeMethod,
    engine_config,
    speculation,
)
from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, RealRange, check_boolean, check_integer, check_strings, refusal
from pellucid.weights.catalog import DEFAULT_MODEL

MAX_KEYS = 1024
MAX_KEY_CHARACTERS = 1024
MAX_NAMES = 64
MAX_NAME_CHARACTERS = 256
ANY = "*"
MAX_STREAM_INTERVAL = 16
QUEUE_LIMITS = ("max_waiting", "max_queue_seconds")
"""What an AsyncEngine has beyond EngineOptions."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_SECONDS = RealRange(0, 604_800, open=True)  # a week
_KEY = re.compile(r"[!-~]+")
_HOST = re.compile(r"[0-9A-Za-z._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")


class ApiKeys:
    """The keys that open a server, of which nothing but the SHA-256 is kept."""

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises:
        InvalidRequestError: there are more than 1024, or one is not 1 to 1024 visible ASCII characters. The message
            does not show it.
        """
        if isinstance(keys, (str, bytes, Mapping)) or not isinstance(keys, Iterable):
            raise InvalidRequestError("api_keys must be a list of keys", param="api_keys")
        given = list(keys)
        if len(given) > MAX_KEYS:
            raise InvalidRequestError(f"api_keys must be at most {MAX_KEYS} keys, not {len(given)}", param="api_keys")
        for number, key in enumerate(given, 1):
            if not isinstance(key, str) or len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
                raise InvalidRequestError(
                    f"API key number {number} must be 1 to {MAX_KEY_CHARACTERS} visible ASCII characters",
                    param="api_keys",
                )
        self._digests = tuple(sorted({hashlib.sha256(key.encode()).digest() for key in given}))

    def identify(self, key: bytes) -> str | None:
        """What tells a known key from the others, and tells nobody the key: its SHA-256 in hexadecimal. None for a key
        that is not known; how long that takes does not depend on the key."""
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return digest.hex() if found else None

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} API keys>" if len(self) != 1 else "<1 API key>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApiKeys) and self._digests == other._digests

    def __hash__(self) -> int:
        return hash(self._digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Attributes:
    model: a catalog name, a path or an `hf:` reference.
    served_model_names: what requests may call the model, the first being what answers call it; none given is `model`.
    tool_call_parser, reasoning_parser: in which format the model writes tool calls, and marks its reasoning; "auto"
        goes by its chat template, "none" reads nothing out of answers.

    host: the address to listen on.
    port: 0 for any that is free.
    max_connections: most connections at a time; further ones are turned away.
    header_timeout: most seconds until the headers of a request are there.
    body_timeout: most seconds until its body is there.
    keep_alive_timeout: seconds that a connection without a request stays open.
    max_header_bytes: most bytes of a request's first line and headers together.
    max_body_bytes: most bytes of its body.

    api_keys: given as strings; with none, everybody is let in.
    allowed_hosts: what the Host header may name besides `host`, localhost and addresses; "*" for any name. Pages of
        other names are thus kept from reaching the server through DNS rebinding.
    cors_origins: from which origins browsers may call, as "https://example.com"; "*" for any, none for none.
    per_key_cache_salt: requests share cached prefixes only with requests of the same API key.

    max_waiting: most sequences that wait to be scheduled; more are refused. None for no limit.
    max_queue_seconds: longest that a request may wait to be scheduled; None for no limit.
    request_timeout: seconds after which a request that is not answered is ended; None for no limit.
    max_output_tokens: most tokens that a request may ask for, over all its answers; None for what the context holds.
    stream_interval: tokens of a streamed answer that come in one event, after the first one. Fewer events leave more of
        the processors to the model.
    heartbeat_seconds: after so much silence a stream sends a comment, so that nobody takes it for dead.
    drain_seconds: how long running requests may go on once the server was told to stop.

    log_level: the least that is logged: "debug", "info", "warning" or "error".
    log_format: "text", or "json" for an object a line.

    seed, threads, max_model_len, backend, kv_cache_dtype, kv_cache_memory, max_num_seqs, max_num_batched_tokens,
        enable_prefix_caching: as for AsyncEngine.
    speculative, num_draft_tokens, draft_model, draft_layers: as `method` and the fields of SpeculativeConfig; None for
        its defaults.

    Raises:
        InvalidRequestError: a value is out of its range; `param` names it.
    """

    model: str = DEFAULT_MODEL
    served_model_names: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    host: str = "127.0.0.1"
    port: int = 8000
    max_connections: int = 1024
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    keep_alive_timeout: float = 75.0
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 2 * 1024 * 1024

    api_keys: ApiKeys = field(default_factory=ApiKeys)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    per_key_cache_salt: bool = False

    max_waiting: int | None = 256
    max_queue_seconds: float | None = None
    request_timeout: float | None = 3600.0
    max_output_tokens: int | None = None
    stream_interval: int = 1
    heartbeat_seconds: float = 15.0
    drain_seconds: float = 30.0

    log_level: LogLevel = "info"
    log_format: LogFormat = "text"

    threads: int | None = None
    max_model_len: int | None = None
    seed: int | None = None
    backend: BackendName = "auto"
    kv_cache_dtype: KVCacheDtype = "f16"
    kv_cache_memory: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    speculative: SpeculativeMethod | None = None
    num_draft_tokens: int | None = None
    draft_model: str | None = None
    draft_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "tool_call_parser", "reasoning_parser"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or "\0" in value:
                raise refusal(name, value, "a text")
        names = check_strings("served_model_names", self.served_model_names, MAX_NAMES, MAX_NAME_CHARACTERS)
        self._set("served_model_names", names or (self.model,))
        self._check_network()
        self._check_access()
        self._check_limits()
        for name, values in (("log_level", get_args(LogLevel)), ("log_format", get_args(LogFormat))):
            if getattr(self, name) not in values:
                raise refusal(name, getattr(self, name), f"one of {', '.join(values)}")
        self._set("draft_layers", None if self.draft_layers is None else tuple(self.draft_layers))
        options = self.engine_options()
        limits = {name: options.pop(name) for name in QUEUE_LIMITS}
        engine_config(self.model, cast(EngineOptions, options), **limits)

    def _check_network(self) -> None:
        if not isinstance(self.host, str) or not _HOST.fullmatch(self.host):
            raise refusal("host", self.host, "an address or a name, without a port")
        check_integer("port", self.port, 0, 65_535)
        check_integer("max_connections", self.max_connections, 1, 1_000_000)
        for name in ("header_timeout", "body_timeout", "keep_alive_timeout"):
            self._set(name, _SECONDS.check(name, getattr(self, name)))
        check_integer("max_header_bytes", self.max_header_bytes, 1024, 16 * 1024 * 1024)
        check_integer("max_body_bytes", self.max_body_bytes, 1024, MAX_MEMORY)

    def _check_access(self) -> None:
        if not isinstance(self.api_keys, ApiKeys):
            self._set("api_keys", ApiKeys(self.api_keys))
        hosts = check_strings("allowed_hosts", self.allowed_hosts, MAX_NAMES, MAX_NAME_CHARACTERS)
        for host in hosts:
            if host != ANY and not _HOST.fullmatch(host):
                raise refusal("allowed_hosts", host, "names without a port, or * for any")
        self._set("allowed_hosts", tuple(host.lower() for host in hosts))
        origins = check_strings("cors_origins", self.cors_origins, MAX_NAMES, MAX_NAME_CHARACTERS)
        for origin in origins:
            if origin != ANY and not _ORIGIN.fullmatch(origin):
                raise refusal("cors_origins", origin, "origins as https://example.com or http://localhost:3000, or *")
        self._set("cors_origins", tuple(origin.lower() for origin in origins))
        check_boolean("per_key_cache_salt", self.per_key_cache_salt)

    def _check_limits(self) -> None:
        if self.request_timeout is not None:
            self._set("request_timeout", _SECONDS.check("request_timeout", self.request_timeout))
        if self.max_output_tokens is not None:
            check_integer("max_output_tokens", self.max_output_tokens, 1, INT32_MAX)
        check_integer("stream_interval", self.stream_interval, 1, MAX_STREAM_INTERVAL)
        self._set("heartbeat_seconds", _SECONDS.check("heartbeat_seconds", self.heartbeat_seconds))
        self._set("drain_seconds", RealRange(0, _SECONDS.high).check("drain_seconds", self.drain_seconds))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def speculative_config(self) -> SpeculativeConfig | None:
        """How to guess ahead; None where nothing is to be guessed."""
        return speculation(
            self.speculative,
            num_draft_tokens=self.num_draft_tokens,
            draft_model=self.draft_model,
            layers=self.draft_layers,
        )

    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of the AsyncEngine that is to serve."""
        names = (*EngineOptions.__annotations__, *QUEUE_LIMITS)
        return {name: getattr(self, name) for name in names} | {"speculative": self.speculative_config}
