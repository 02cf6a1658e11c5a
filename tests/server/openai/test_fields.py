from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, ModelNotFoundError
from pellucid.server.openai.fields import cache_salt, check_names, metadata, model_name, priority, without_nulls
from tests.support.served_models import served_model


def refused_param(function: Any, *arguments: Any) -> str | None:
    with pytest.raises((InvalidRequestError, ModelNotFoundError)) as caught:
        function(*arguments)
    return caught.value.param


def test_null_is_as_good_as_nothing() -> None:
    assert without_nulls({"a": None, "b": 0, "c": False}) == {"b": 0, "c": False}


def test_every_name_is_known_or_refused() -> None:
    check_names({"input": 1, "user": "me"}, {"input"}, {"store": (False,)})
    check_names({"store": False}, {"input"}, {"store": (False,)})
    assert refused_param(check_names, {"store": 0}, {"input"}, {"store": (False,)}) == "store"
    assert refused_param(check_names, {"user": 3}, {"input"}) == "user"
    with pytest.raises(InvalidRequestError, match="did you mean input"):
        check_names({"inptu": 1}, {"input"})


def test_who_asks_and_of_which_model() -> None:
    model = served_model("a", "b")
    assert [model_name(body, model) for body in ({}, {"model": "a"}, {"model": "b"})] == ["a", "a", "b"]
    assert refused_param(model_name, {"model": "c"}, model) == "model"
    assert refused_param(model_name, {"model": 3}, model) == "model"
    assert (priority({}), priority({"priority": -5})) == (0, -5)
    assert refused_param(priority, {"priority": 2**40}) == "priority"
    assert (cache_salt({}), cache_salt({"cache_salt": "x"})) == ("", "x")
    assert refused_param(cache_salt, {"cache_salt": 1}) == "cache_salt"


def test_notes_of_the_caller() -> None:
    assert (metadata({}), metadata({"metadata": {"a": "b", "c": None}})) == ({}, {"a": "b"})
    for notes in ("x", {"a": 1}, {"a": "b" * 513}, {"a" * 65: "b"}, {str(place): "b" for place in range(17)}):
        assert refused_param(metadata, {"metadata": notes}) == "metadata"
