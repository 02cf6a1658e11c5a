from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.server.openai import inputs
from pellucid.server.openai.inputs import MAX_INPUTS, check_vocabulary, encode_inputs, input_list
from pellucid.tokenizer.tokenizer import Tokenizer
from tests.support.chat_models import TOKENIZER
from tests.support.served_models import served_model

MODEL = served_model()


def refused(function: Any, *arguments: Any, kind: Any = InvalidRequestError) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments)
    assert caught.value.param == "input"
    return str(caught.value.message)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("abc", ["abc"]),
        ("", [""]),
        (["abc"], ["abc"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[1], "a"], [[1], "a"]),
        (["a"] * MAX_INPUTS, ["a"] * MAX_INPUTS),
    ],
)
def test_every_form_is_a_list(value: Any, expected: list[Any]) -> None:
    assert input_list("input", value) == expected


@pytest.mark.parametrize("value", [None, 3, True, [], {}, {"a": 1}, [None], [1.5], [True], ["a", 3], [["a"], None]])
def test_what_is_no_input_is_refused(value: Any) -> None:
    assert "2048" in refused(input_list, "input", value)


def test_too_many_are_refused_with_both_numbers() -> None:
    message = refused(input_list, "input", ["a"] * (MAX_INPUTS + 1))
    assert "2049" in message
    assert "2048" in message


def test_texts_become_token_ids() -> None:
    assert encode_inputs({"input": ["ab", [3, 4]]}, MODEL) == [[1, 2], [3, 4]]
    assert encode_inputs({"text_1": ["a"], "text_2": ["b", "c"]}, MODEL) == [[1], [2], [3]]


@pytest.mark.parametrize("each", ["", []])
def test_an_empty_one_is_refused(each: Any) -> None:
    assert "number 1" in refused(encode_inputs, {"input": ["a", each]}, MODEL)


@pytest.mark.parametrize("token_id", [-1, 61, 2**63, 1.0, "1", None, True, [1]])
def test_what_is_no_token_id_is_refused(token_id: Any) -> None:
    assert "0 to 60" in refused(check_vocabulary, "input", [1, token_id], MODEL)
    refused(encode_inputs, {"input": [[1, token_id]]}, MODEL)


def test_one_that_is_too_long_is_refused_with_both_numbers() -> None:
    assert len(encode_inputs({"input": ["a" * 1000]}, MODEL)[0]) == 1000
    message = refused(encode_inputs, {"input": ["a", "a" * 1001]}, MODEL, kind=ContextLengthError)
    assert "1001 tokens" in message
    assert "1000 tokens" in message


def test_one_that_cannot_be_encoded_is_refused_by_name() -> None:
    model = served_model(tokenizer=Tokenizer.from_gguf(TOKENIZER))
    assert "number 1" in refused(encode_inputs, {"input": ["a", "\ud800"]}, model)
    message = refused(encode_inputs, {"input": ["a", "ab" * 50_000]}, model, kind=ContextLengthError)
    assert message.startswith("input: number 1")


def test_too_much_together_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_INPUT_TOKENS", 10)
    assert len(encode_inputs({"input": ["aaaaa"] * 2}, MODEL)) == 2
    message = refused(encode_inputs, {"input": ["aaaaa", "aaaaaa", "a"]}, MODEL)
    assert "first 2 inputs have 11" in message
    assert "may have 10" in message
