from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server import config as config_module
from pellucid.server.config import resolve
from pellucid.server.options import OPTIONS
from pellucid.server.settings import ServerSettings


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_setting_has_an_option() -> None:
    assert {field.name for field in fields(ServerSettings)} | {"api_key_file"} == OPTIONS.keys()
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)


def test_nothing_given_is_the_defaults() -> None:
    config = resolve({}, {"HOME": "/"})
    assert config.settings == ServerSettings()
    assert set(config.sources.values()) == {"default"}


def test_flags_win_over_the_environment_over_the_file(tmp_path: Path) -> None:
    name = write(tmp_path / "serve.toml", "port = 1\nhost = '::1'\nmax_waiting = 7\n")
    config = resolve({"port": "3"}, {"PELLUCID_SERVE_PORT": "2", "PELLUCID_SERVE_HOST": "::"}, name)
    settings = config.settings
    assert (settings.port, settings.host, settings.max_waiting) == (3, "::", 7)
    assert config.sources["port"] == "--port"
    assert config.sources["host"] == "PELLUCID_SERVE_HOST"
    assert config.sources["max_waiting"] == name
    assert config.sources["seed"] == "default"


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    name = write(tmp_path / "a.toml", "port = 1")
    other = write(tmp_path / "b.toml", "port = 2")
    assert resolve({}, {"PELLUCID_SERVE_CONFIG": name}).settings.port == 1
    assert resolve({}, {"PELLUCID_SERVE_CONFIG": name}, other).settings.port == 2


GIVEN: list[tuple[str, str, Any]] = [
    ("model", "gemma-3-270m", "gemma-3-270m"),
    ("port", "0", 0),
    ("drain_seconds", "1.5", 1.5),
    ("max_body_bytes", "3MiB", 3 * 2**20),
    ("max_header_bytes", "4 kb", 4000),
    ("kv_cache_memory", "2GB", 2 * 10**9),
    ("max_waiting", "none", None),
    ("request_timeout", "none", None),
    ("per_key_cache_salt", "true", True),
    ("enable_prefix_caching", "false", False),
    ("log_format", "json", "json"),
]


@pytest.mark.parametrize(("name", "text", "value"), GIVEN)
def test_a_text_means_the_same_in_every_place(name: str, text: str, value: Any, tmp_path: Path) -> None:
    option = OPTIONS[name]
    file = write(tmp_path / "serve.toml", f'{name} = "{text}"')
    for config in (resolve({name: text}, {}), resolve({}, {option.variable: text}), resolve({}, {}, file)):
        assert getattr(config.settings, name) == value


def test_values_of_the_file_may_have_their_own_types(tmp_path: Path) -> None:
    text = (
        'max_body_bytes = 4096\ndrain_seconds = 2\nper_key_cache_salt = true\ncors_origins = ["http://a", "http://b"]'
    )
    settings = resolve({}, {}, write(tmp_path / "serve.toml", text)).settings
    assert (settings.max_body_bytes, settings.drain_seconds, settings.per_key_cache_salt) == (4096, 2.0, True)
    assert settings.cors_origins == ("http://a", "http://b")


def test_lists_have_commas_in_the_environment() -> None:
    environment = {"PELLUCID_SERVE_SERVED_MODEL_NAMES": "a, b", "PELLUCID_SERVE_DRAFT_LAYERS": "0-2,5"}
    environment["PELLUCID_SERVE_SPECULATIVE"] = "layer_skip"
    settings = resolve({}, environment).settings
    assert settings.served_model_names == ("a", "b")
    assert settings.draft_layers == (0, 1, 2, 5)


@pytest.mark.parametrize(
    ("flags", "environment", "text", "message"),
    [
        ({"port": "70000"}, {}, "", "--port: port must be an integer from 0 to 65535, not 70000"),
        ({"port": "http"}, {}, "", "--port: port must be an integer from 0 to 65535, not 'http'"),
        ({"port": "9" * 5000}, {}, "", "--port: port must be an integer"),
        ({"port": "none"}, {}, "", "--port: port must be an integer"),
        ({"max_body_bytes": "2 MiBs"}, {}, "", "--max-body-bytes: max_body_bytes must be"),
        ({"drain_seconds": "nan"}, {}, "", "--drain-seconds: drain_seconds must be a number"),
        ({"speculative": "layer_skip", "draft_layers": "0-9999999999"}, {}, "", "--draft-layers: layers must be"),
        ({"speculative": "layer_skip", "draft_layers": "2,1"}, {}, "", "--draft-layers: layers must be"),
        ({"num_draft_tokens": "3"}, {}, "", "--num-draft-tokens: num_draft_tokens needs a method"),
        ({}, {"PELLUCID_SERVE_PORT": ""}, "", "PELLUCID_SERVE_PORT: port must be"),
        ({}, {"PELLUCID_SERVE_API_KEYS": ""}, "", "PELLUCID_SERVE_API_KEYS: API key number 1 must be"),
        ({}, {"PELLUCID_SERVE_PER_KEY_CACHE_SALT": "on"}, "", "must be true or false, not 'on'"),
        (
            {},
            {"PELLUCID_SERVE_PROT": "1"},
            "",
            "unknown environment variable `PELLUCID_SERVE_PROT`: did you mean `PELLUCID_SERVE_PORT`?",
        ),
        ({}, {}, "prot = 1", "`prot` in FILE: did you mean `port`?"),
        ({}, {}, "[xyz]\nport = 1", "unknown option `xyz` in FILE: there are model, served_model_names, "),
        ({}, {}, "port = ", "FILE is not TOML: Invalid value"),
        ({}, {}, "port = 1\nport = 2", "FILE is not TOML"),
        ({}, {}, "port = 1.5", "FILE: port must be an integer from 0 to 65535, not 1.5"),
        ({}, {}, "api_keys = 5", "FILE: api_keys must be a list of keys"),
        ({}, {}, "api_key_file = 5", "FILE: api_key_file must be the name of a file"),
        ({}, {}, "model = 'caf\udce9'", "FILE is not UTF-8: invalid continuation byte at byte 12"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(
    flags: dict[str, Any], environment: dict[str, str], text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidRequestError) as caught:
        resolve(flags, environment, str(file))
    assert message.replace("FILE", str(file)) in caught.value.message


def test_a_file_that_never_ends_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="longer than 1048576 bytes"):
        resolve({}, {}, "/dev/zero")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        resolve({}, {}, str(tmp_path / "none.toml"))


def test_keys_of_a_file_come_on_top(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys", "# ours\nfrom-file\n\n  padded  \r\n")
    config = resolve({"api_keys": ["from-flag"]}, {"PELLUCID_SERVE_API_KEY_FILE": keys})
    for key in (b"from-flag", b"from-file", b"padded"):
        assert config.settings.api_keys.identify(key)
    assert len(config.settings.api_keys) == 3
    assert config.sources["api_keys"] == "--api-key and PELLUCID_SERVE_API_KEY_FILE"
    with pytest.raises(InvalidRequestError, match=r"--api-key-file: .* holds no API key"):
        resolve({"api_key_file": write(tmp_path / "empty", "# none\n")}, {})


def test_what_is_shown_can_be_read_again_and_has_no_key(tmp_path: Path) -> None:
    flags = {"model": 'a "b"\\\n\x1bé', "port": "0", "max_waiting": "none", "speculative": "layer_skip"}
    flags |= {"draft_layers": "0-2", "allowed_hosts": ["a", "b"], "api_keys": ["sesame"]}
    config = resolve(flags, {})
    assert "sesame" not in config.as_toml()
    assert "sesame" not in str(config.as_dict())
    assert "# api_keys: <1 API key>" in config.as_toml()
    again = resolve({"api_keys": ["sesame"]}, {}, write(tmp_path / "serve.toml", config.as_toml()))
    assert again.settings == config.settings
    assert tomllib.loads(config.as_toml())["port"] == 0
    lines = {line.split(" = ")[0]: line.partition("  # ")[2] for line in config.as_toml().splitlines()}
    assert (lines["port"], lines["host"], lines["model"]) == ("--port", "default", "MODEL")


def test_messages_show_no_key(tmp_path: Path) -> None:
    for flags, text in (
        ({"api_keys": ["open sesame"]}, ""),
        ({}, 'api_keys = ["open sesame"]'),
        ({}, 'api_keys = "sesame"'),
        ({}, 'api_key = ["sesame"]'),
        ({}, "api_keys = [sesame]"),
        ({}, 'api_keys = [{a = "sesame"}]'),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            resolve(flags, {}, write(tmp_path / "serve.toml", text))
        assert "sesame" not in caught.value.message


def test_a_key_that_leaks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: settings that keep their keys.
    monkeypatch.setattr(config_module.ApiKeys, "__repr__", lambda self: "sesame")
    assert "sesame" in resolve({"api_keys": ["sesame"]}, {}).as_toml()
