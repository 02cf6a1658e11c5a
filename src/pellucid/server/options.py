"""The options of a server: for each setting a flag, an environment variable and a key of a TOML file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_type_hints

from pellucid.core.config import layer_numbers
from pellucid.server.settings import ServerSettings

ENVIRONMENT_PREFIX = "PELLUCID_SERVE_"
NONE = "none"

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_BYTES = re.compile(r"([0-9]{1,19}) ?([kmg]i?b|)", re.IGNORECASE)
_MAY_BE_NONE = {name for name, kind in get_type_hints(ServerSettings).items() if type(None) in get_args(kind)}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def num_bytes(text: str) -> int:
    """`65536`, `64KiB`, `2 MiB`, `4GB`."""
    found = _BYTES.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[1]) * _UNITS[found[2].lower()]


@dataclass(frozen=True, slots=True)
class Option:
    """Attributes:
    name: of the field of ServerSettings, and the key in a file.
    metavar: what help calls its value; None for a switch.
    help: what it does.
    read: from text to value; raises ValueError for a text that it cannot read.
    singular: of an option that may be given several times: what its flag and the help call one of them.
    """

    name: str
    metavar: str | None
    help: str
    read: Callable[[str], Any] = str
    singular: str | None = None

    @property
    def flag(self) -> str:
        return "--" + (self.singular or self.name).replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    def from_text(self, text: str) -> Any:
        """The value that a text stands for. One that cannot be read is left as it is, and ServerSettings refuses it."""
        if text == NONE and self.name in _MAY_BE_NONE:
            return None
        try:
            return self.read(text)
        except ValueError:
            return text


API_KEY_FILE = Option("api_key_file", "FILE", "a file with an API key on each line; these come on top of the others")

GROUPS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model", "MODEL", "a name from `pellucid models`, a .gguf file, or hf:org/repo[:file]"),
        Option(
            "served_model_names",
            "NAME",
            "what requests may call the model; answers bear the first (repeat for several; default: what MODEL says)",
            singular="served_model_name",
        ),
        Option(
            "tool_call_parser",
            "NAME",
            "how the model writes tool calls; auto goes by its chat template, none for not at all",
        ),
        Option("reasoning_parser", "NAME", "how the model marks its reasoning; auto and none as before"),
    ),
    "network": (
        Option("host", "ADDRESS", "address to listen on; 0.0.0.0 for all, which wants an API key"),
        Option("port", "N", "port to listen on; 0 for any that is free", int),
        Option("max_connections", "N", "most connections at a time", int),
        Option("header_timeout", "SECONDS", "how long the headers of a request may take to arrive", float),
        Option("body_timeout", "SECONDS", "how long its body may take", float),
        Option("keep_alive_timeout", "SECONDS", "how long a connection stays open between two requests", float),
        Option("max_header_bytes", "SIZE", "most bytes of a request's first line and headers", num_bytes),
        Option("max_body_bytes", "SIZE", "most bytes of its body", num_bytes),
    ),
    "who may use it": (
        Option(
            "api_keys",
            "KEY",
            "let in only requests with this key, on every route but /health (repeat for several). Other users of the "
            "machine can read a command line: a file or the environment keeps keys to yourself",
            singular="api_key",
        ),
        API_KEY_FILE,
        Option(
            "allowed_hosts",
            "NAME",
            "what the Host header may name besides localhost, addresses and --host; * for any (repeat for several)",
            singular="allowed_host",
        ),
        Option(
            "cors_origins",
            "ORIGIN",
            "let pages of this origin call from browsers, as https://example.com; * for any (repeat for several)",
            singular="cors_origin",
        ),
        Option("per_key_cache_salt", None, "share cached prefixes only among requests with the same API key", boolean),
    ),
    "limits": (
        Option(
            "max_waiting", "N", "most sequences that wait to be scheduled; more get status 429 (none: no limit)", int
        ),
        Option(
            "max_queue_seconds", "SECONDS", "longest that a request may wait to be scheduled; then status 429", float
        ),
        Option(
            "request_timeout", "SECONDS", "longest that an answer may take; then status 504 (none: no limit)", float
        ),
        Option("max_output_tokens", "N", "most tokens that a request may ask for, over all its answers", int),
        Option(
            "stream_interval",
            "N",
            "tokens of a streamed answer in one event, after the first; fewer events leave more of the processors to "
            "the model",
            int,
        ),
        Option("heartbeat_seconds", "SECONDS", "after so much silence a stream sends a comment", float),
        Option("drain_seconds", "SECONDS", "how long running requests may go on after SIGTERM", float),
    ),
    "log": (
        Option("log_level", "LEVEL", "debug, info, warning or error"),
        Option("log_format", "FORMAT", "text, or json for one object a line"),
    ),
    "engine": (
        Option("threads", "N", "threads to compute with (default: one for each usable processor)", int),
        Option("max_model_len", "N", "longest context in tokens (default: the model's)", int),
        Option("seed", "N", "from which requests without a seed draw theirs (default: the system's entropy)", int),
        Option("backend", "NAME", "cpu (the native core), reference (clear numpy, slow), or auto"),
        Option("kv_cache_dtype", "DTYPE", "how the KV cache is stored: f16, bf16, f32, or q8, half as large as f16"),
        Option("kv_cache_memory", "SIZE", "memory for the KV cache (default: a share of what is free)", num_bytes),
        Option("max_num_seqs", "N", "most sequences in one step", int),
        Option("max_num_batched_tokens", "N", "most tokens in one step", int),
        Option(
            "enable_prefix_caching", None, "keep what was computed of a prompt for prompts that begin alike", boolean
        ),
    ),
    "speculation": (
        Option(
            "speculative",
            "METHOD",
            "guess tokens ahead, which changes no answer: ngram (what followed the same words earlier), lookahead, "
            "layer_skip or draft_model",
        ),
        Option("num_draft_tokens", "N", "most tokens guessed in a step; fewer are where fewer pay (default: 16)", int),
        Option("draft_model", "MODEL", "with draft_model, the smaller model that guesses"),
        Option(
            "draft_layers",
            "LAYERS",
            "with layer_skip, the layers that guess, as 0-10,19-29 (default: all but the middle quarter)",
            layer_numbers,
        ),
    ),
}
"""Every option, by the heading that it has in the help."""

OPTIONS: dict[str, Option] = {option.name: option for group in GROUPS.values() for option in group}

DEFAULTS: dict[str, Any] = {
    field.name: field.default if field.default_factory is MISSING else field.default_factory()
    for field in fields(ServerSettings)
}
