from __future__ import annotations

import hashlib
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from pellucid.core.config import ENGINE_DEFAULTS, SpeculativeConfig
from pellucid.core.errors import InvalidRequestError
from pellucid.server.settings import ApiKeys, ServerSettings


def test_loopback_and_no_keys_unless_asked() -> None:
    settings = ServerSettings(model="m")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert len(settings.api_keys) == 0
    assert settings.cors_origins == ()
    assert settings.served_model_names == ("m",)
    with pytest.raises(FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("model", "a\0b"),
        ("tool_call_parser", ""),
        ("reasoning_parser", None),
        ("served_model_names", [""]),
        ("served_model_names", ["a"] * 65),
        ("host", ""),
        ("host", "localhost:8000"),
        ("host", "a b"),
        ("port", -1),
        ("port", 65_536),
        ("port", "8000"),
        ("port", True),
        ("max_connections", 0),
        ("header_timeout", 0),
        ("body_timeout", float("nan")),
        ("keep_alive_timeout", -1),
        ("max_header_bytes", 10),
        ("max_body_bytes", 0),
        ("max_body_bytes", 10**30),
        ("api_keys", "one"),
        ("api_keys", ["two words"]),
        ("api_keys", [""]),
        ("api_keys", ["k" * 1025]),
        ("api_keys", ["k"] * 1025),
        ("api_keys", [b"bytes"]),
        ("allowed_hosts", ["example.com:80"]),
        ("allowed_hosts", ["http://example.com"]),
        ("cors_origins", ["example.com"]),
        ("cors_origins", ["https://example.com/"]),
        ("per_key_cache_salt", 1),
        ("max_waiting", 0),
        ("max_queue_seconds", 0),
        ("request_timeout", 0),
        ("max_output_tokens", 0),
        ("stream_interval", 0),
        ("stream_interval", 17),
        ("heartbeat_seconds", 0),
        ("drain_seconds", -1),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("threads", 0),
        ("max_model_len", 1),
        ("seed", -1),
        ("backend", "gpu"),
        ("kv_cache_dtype", "int3"),
        ("kv_cache_memory", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("enable_prefix_caching", "yes"),
        ("speculative", "magic"),
        ("num_draft_tokens", 3),
        ("draft_model", "small"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ServerSettings(**{"model": "m", name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "fe80::1", "::ffff:1.2.3.4", "localhost", "a-b.example.com"])
def test_hosts(host: str) -> None:
    assert ServerSettings(host=host, allowed_hosts=[host]).host == host  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "origin", ["https://Example.com", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc", "*"]
)
def test_origins_compare_in_lower_case(origin: str) -> None:
    assert ServerSettings(cors_origins=[origin]).cors_origins == (origin.lower(),)  # type: ignore[arg-type]


def test_of_keys_only_the_hash_is_kept() -> None:
    settings = ServerSettings(api_keys=["secret-one", "secret-two"])  # type: ignore[arg-type]
    assert "<2 API keys>" in repr(settings)
    for shown in (repr(settings), str(settings), repr(settings.api_keys._digests)):
        assert "secret" not in shown
    assert not any(isinstance(getattr(settings.api_keys, name), str) for name in ApiKeys.__slots__)


def test_keys_are_told_apart_by_their_hash() -> None:
    keys = ApiKeys(["one", "two"])
    assert keys.identify(b"two") == hashlib.sha256(b"two").hexdigest()
    for stranger in (b"", b"on", b"one ", b"three", b"\xff"):
        assert keys.identify(stranger) is None
    assert ApiKeys().identify(b"") is None
    assert keys == ApiKeys(["two", "one", "one"])
    assert hash(keys) == hash(ApiKeys(["two", "one"]))


def test_a_refused_key_is_not_shown() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ApiKeys(["fine", "my secret"])
    assert "number 2" in caught.value.message
    assert "secret" not in caught.value.message


def test_engine_options_are_those_of_an_engine() -> None:
    settings = ServerSettings(threads=2, speculative="layer_skip", num_draft_tokens=3, draft_layers=[0, 1])  # type: ignore[arg-type]
    options = settings.engine_options()
    assert options["threads"] == 2
    assert options["max_waiting"] == 256
    assert options["speculative"] == SpeculativeConfig("layer_skip", 3, layers=[0, 1])
    queue = {"max_waiting": 256, "max_queue_seconds": None}
    assert ServerSettings().engine_options() == {**ENGINE_DEFAULTS, **queue}
    assert replace(settings, speculative=None, num_draft_tokens=None, draft_layers=None).speculative_config is None
