"""Reads of a body's parts: each refusal names the part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.json_fields import (
    check_fields,
    check_neutral,
    read_choice,
    read_list,
    read_object,
    read_schema,
    read_string,
    required,
)


def test_what_is_read() -> None:
    assert read_object("a", {"b": 1, "c": None}) == {"b": 1}
    assert read_schema("a", {"b": None}) == {"b": None}
    assert read_list("a", [1]) == [1]
    assert read_string("a", "b") == "b"
    assert read_choice("a", "b", ("b", "c")) == "b"
    assert required("a", {"b": 1}, "b") == 1
    check_fields("a", {"b": 1}, ("b", "c"))
    check_neutral("a", [], ([],))
    check_neutral("a", 0, (0,))


@pytest.mark.parametrize(
    ("read", "param", "message"),
    [
        (lambda: read_object("a", []), "a", "a must be an object, not []"),
        (lambda: read_schema("a", "{}"), "a", "a must be a JSON schema, an object, not '{}'"),
        (lambda: read_list("a", "b"), "a", "a must be a list, not 'b'"),
        (lambda: read_list("a", {}, "a list of parts"), "a", "a must be a list of parts, not {}"),
        (lambda: read_string("a", 1), "a", "a must be a string, not 1"),
        (lambda: read_string("a", "\ud800"), "a", "lone surrogate"),
        (lambda: read_choice("a", [], ("b", "c")), "a", 'a must be "b" or "c", not []'),
        (lambda: read_choice("a", "d", ("b", "c")), "a", 'a must be "b" or "c", not \'d\''),
        (lambda: required("a[0]", {}, "b"), "a[0].b", "a[0].b is missing"),
        (lambda: required("", {}, "b"), "b", "b is missing"),
        (lambda: check_fields("a", {"bee": 1}, ("beer",)), "a.bee", "'bee' is not a field of a: did you mean beer?"),
        (lambda: check_fields("", {"b": 1}, ("xyzzy",)), "b", "'b' is not a parameter of this endpoint"),
        (lambda: check_neutral("a", "b", ("c",)), "a", "a of 'b' is not supported: leave it out"),
        (lambda: check_neutral("a", "b", ()), "a", "a is not supported: leave it out"),
        (lambda: check_neutral("a", True, (1,)), "a", "a of True is not supported"),
        (lambda: check_neutral("a", 0, (False,)), "a", "a of 0 is not supported"),
    ],
)
def test_what_is_refused(read: Callable[[], Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read()
    assert caught.value.param == param
    assert message in caught.value.message
