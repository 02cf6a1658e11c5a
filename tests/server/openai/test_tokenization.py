from __future__ import annotations

import json
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, ModelNotFoundError
from pellucid.server.openai.tokenization import detokenize, tokenize
from pellucid.tokenizer.tokenizer import Tokenizer
from tests.support.chat_models import CHAT_TEMPLATE, TOKENIZER
from tests.support.served_models import served_model

TINY = Tokenizer.from_gguf({**TOKENIZER, "tokenizer.chat_template": CHAT_TEMPLATE})
MODEL = served_model(tokenizer=TINY)
MESSAGES = [{"role": "user", "content": "Hi there"}]


def tokenized(**body: Any) -> Any:
    return json.loads(tokenize(body, MODEL))


def test_a_prompt() -> None:
    found = tokenized(prompt="Hi there", model="m")
    assert found == {
        "count": 7,
        "max_model_len": 1000,
        "tokens": TINY.encode("Hi there"),
        "token_strs": None,
    }
    assert tokenized(prompt="")["tokens"] == TINY.encode("")
    assert tokenized(prompt="Hi", add_special_tokens=False)["tokens"] == TINY.encode("Hi", add_special_tokens=False)


def test_special_tokens_count_as_such_where_that_is_asked_for() -> None:
    assert tokenized(prompt="<|im_end|>")["count"] == len("<|im_end|>")
    assert tokenized(prompt="<|im_end|>", parse_special=True)["tokens"] == [259]


def test_strings_are_those_of_the_vocabulary() -> None:
    assert tokenized(prompt="Hi there", return_token_strs=True)["token_strs"] == ["H", "i", "Ġt", "h", "e", "r", "e"]


def test_a_conversation() -> None:
    found = tokenized(messages=MESSAGES)
    assert found["tokens"] == TINY.apply_chat_template(MESSAGES)
    whole = TINY.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert tokenized(messages=MESSAGES, add_generation_prompt=False)["tokens"] == whole
    assert len(whole) < found["count"]


def test_a_text_may_be_longer_than_the_context() -> None:
    found = tokenized(prompt="ab " * 20_000, return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 60_000
    assert found["tokens"] == TINY.encode("ab " * 20_000)
    assert found["max_model_len"] == 1000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": "a"}, "messages"),
        ({"messages": MESSAGES, "add_generation_prompt": 1}, "add_generation_prompt"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ({"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ({"messages": MESSAGES, "chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"turn": 1}}, "chat_template_kwargs.turn"),
        (
            {"messages": MESSAGES, "chat_template_kwargs": {"add_generation_prompt": False}},
            "chat_template_kwargs.add_generation_prompt",
        ),
        ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ({"prompt": "a", "parse_special": None, "truncate": 3}, "truncate"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tokenize(body, MODEL)
    assert caught.value.param == param


def test_a_model_without_a_chat_template_has_no_conversations() -> None:
    model = served_model(tokenizer=Tokenizer.from_gguf(TOKENIZER))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenize({"messages": MESSAGES}, model)


def test_there_and_back() -> None:
    for text in ("Hi there", "naïve 漢字 🙂", "<|im_end|>", ""):
        assert json.loads(detokenize({"tokens": tokenized(prompt=text)["tokens"]}, MODEL)) == {"prompt": text}


def test_special_tokens_are_spelled_out_unless_they_are_not_wanted() -> None:
    assert json.loads(detokenize({"tokens": [258, 0]}, MODEL))["prompt"].startswith("<|im_start|>")
    assert json.loads(detokenize({"tokens": [258], "skip_special_tokens": True}, MODEL)) == {"prompt": ""}


@pytest.mark.parametrize("tokens", ["abc", [-1], [10**6], [2**63], ["a"], [1.5], [True], None, {}])
def test_what_is_no_token_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        detokenize({"tokens": tokens}, MODEL)
    assert caught.value.param == "tokens"


def test_another_model_is_not_found() -> None:
    for function, body in ((tokenize, {"prompt": "a"}), (detokenize, {"tokens": [1]})):
        with pytest.raises(ModelNotFoundError):
            function({**body, "model": "other"}, MODEL)  # type: ignore[dict-item]
