"""Where the settings of a server come from: flags, else the environment, else a TOML file, else the defaults."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.server.options import API_KEY_FILE, ENVIRONMENT_PREFIX, NONE, OPTIONS, Option
from pellucid.server.settings import ApiKeys, ServerSettings

CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
DEFAULT = "default"
MAX_FILE_BYTES = 1024 * 1024
_OPTION_OF_PARAM = {"layers": "draft_layers"}


@dataclass(frozen=True, slots=True)
class Config:
    """Attributes:
    settings: what the server is to do.
    sources: for each option, where its value came from: a flag, a variable, a file, or "default".
    """

    settings: ServerSettings
    sources: Mapping[str, str]

    def as_toml(self) -> str:
        """Every option with its value and where that came from, in the form of a configuration file. API keys are only
        counted."""
        shown = {name: self._shown(name) for name in OPTIONS if name != API_KEY_FILE.name}
        width = max(map(len, shown.values()))
        return "\n".join(f"{value:<{width}}  # {self.sources[name]}" for name, value in shown.items())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The same as data: for each option its `value` and its `source`."""
        values = {name: getattr(self.settings, name) for name in OPTIONS if name != API_KEY_FILE.name}
        values["api_keys"] = repr(self.settings.api_keys)
        return {name: {"value": value, "source": self.sources[name]} for name, value in values.items()}

    def _shown(self, name: str) -> str:
        value = getattr(self.settings, name)
        if isinstance(value, ApiKeys):
            return f"# {name}: {value!r}"
        return f"{name} = {_toml(value)}"


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str], config_file: str | None = None) -> Config:
    """Settings from what was given in each place.

    Args:
        flags: for each option that was given as a flag, by the name of its field: the text, the list of texts, or the
            bool.
        environment: the process's.
        config_file: a TOML file; None for the one that the environment names, if it does.

    Raises:
        InvalidRequestError: a key, a variable or a value is not known, not readable or out of range. The message says
            where it is, and shows no API key.
        OSError: a file cannot be read.
    """
    variables = _variables(environment)
    file_name = config_file or environment.get(CONFIG_VARIABLE)
    places = [
        {name: (_read_flag(OPTIONS[name], given), OPTIONS[name].flag) for name, given in flags.items()},
        {option.name: (_read_variable(option, text), option.variable) for option, text in variables},
        {} if not file_name else {name: (value, file_name) for name, value in _read_file(file_name)},
    ]
    if "model" in places[0]:
        places[0]["model"] = (places[0]["model"][0], "MODEL")
    found = {name: place[name] for place in reversed(places) for name in place}
    values = {name: value for name, (value, _) in found.items()}
    sources = {name: found[name][1] if name in found else DEFAULT for name in OPTIONS}
    key_file = values.pop(API_KEY_FILE.name, None)
    try:
        if key_file is not None:
            keys = values.get("api_keys", [])
            ApiKeys(keys)  # so that those of the file are not blamed for these
            values["api_keys"] = [*keys, *_read_keys(key_file)]
            given = [sources[name] for name in ("api_keys", API_KEY_FILE.name) if sources[name] != DEFAULT]
            sources["api_keys"] = " and ".join(given)
        return Config(ServerSettings(**values), sources)
    except InvalidRequestError as error:
        name = _OPTION_OF_PARAM.get(error.param or "", error.param or "")
        source = sources.get(name, DEFAULT)
        if source == DEFAULT:
            raise
        raise InvalidRequestError(f"{source}: {error.message}", param=name) from None


def _variables(environment: Mapping[str, str]) -> Iterator[tuple[Option, str]]:
    """Options that the environment holds."""
    known = {option.variable: option for option in OPTIONS.values()}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in known:
            raise _unknown(f"environment variable `{variable}`", variable, [*known, CONFIG_VARIABLE])
        yield known[variable], text


def _read_flag(option: Option, given: Any) -> Any:
    return option.from_text(given) if isinstance(given, str) else given


def _read_variable(option: Option, text: str) -> Any:
    return [part.strip() for part in text.split(",")] if option.singular else option.from_text(text)


def _read_file(name: str) -> Iterator[tuple[str, Any]]:
    """The options in a TOML file. A text stands for what it would as a flag: "2MiB", "none"."""
    try:
        table = tomllib.loads(_read_text(name))
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequestError(f"{name} is not TOML: {error}", param="config") from None
    for key, value in table.items():
        if key not in OPTIONS:
            raise _unknown(f"option `{key}` in {name}", key, OPTIONS)
        yield key, OPTIONS[key].from_text(value) if isinstance(value, str) and not OPTIONS[key].singular else value


def _read_keys(name: Any) -> list[str]:
    """The keys of a file: one a line. Blank lines and those that begin with # are none."""
    if not isinstance(name, str):
        raise InvalidRequestError("api_key_file must be the name of a file", param=API_KEY_FILE.name)
    lines = (line.strip() for line in _read_text(name).splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequestError(f"{name} holds no API key", param=API_KEY_FILE.name)
    return keys


def _read_text(name: str) -> str:
    with Path(name).expanduser().open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequestError(f"{name} is longer than {MAX_FILE_BYTES} bytes", param="config")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}", param="config"
        ) from None


def _unknown(what: str, name: str, known: Iterable[str]) -> InvalidRequestError:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}"
    return InvalidRequestError(f"unknown {what}: {hint}", param="config")


def _toml(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
