from __future__ import annotations

import inspect
from typing import Any

import pytest

from pellucid import LLM, AsyncEngine
from pellucid.core.config import ENGINE_DEFAULTS, EngineOptions


@pytest.mark.parametrize("kind", [LLM, AsyncEngine])
def test_the_signature_lists_every_option_with_its_default(kind: Any) -> None:
    parameters = inspect.signature(kind).parameters
    assert ENGINE_DEFAULTS.keys() == EngineOptions.__annotations__.keys() <= parameters.keys()
    assert {name: parameters[name].default for name in ENGINE_DEFAULTS} == ENGINE_DEFAULTS
    assert parameters["max_num_batched_tokens"].annotation == "int"
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize(("kind", "name"), [(LLM, "thread"), (LLM, "max_waiting"), (AsyncEngine, "thread")])
def test_an_option_that_there_is_not_is_refused_by_name(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}'; there are threads, "):
        kind("fake", **{name: 3})
