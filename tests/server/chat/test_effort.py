"""`reasoning_effort` is told to the chat template where it listens, and else refused."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.chat import template_support
from pellucid.server.chat.effort import EFFORTS, effort_variables
from pellucid.server.chat.formats import ChatFormat, chat_format_of
from pellucid.server.openai.requests import parse_chat_completion
from pellucid.server.openai.responses_api_requests import parse_response
from tests.server.chat.test_constraints import served
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer

HI = [{"role": "user", "content": "hi"}]
GRADED = chat_templates.PLAIN + "{{ 'effort ' + reasoning_effort if reasoning_effort is defined }}"
BOTH = chat_templates.THINKING + "{{ reasoning_effort }}"
OLD = chat_templates.PLAIN + "{% set thinking = thinking | default(false) %}{% if thinking %}<think>{% endif %}"


def format_of(template: str) -> ChatFormat:
    return chat_format_of(chat_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "low", "none"),
    [
        (GRADED, {"reasoning_effort": "low"}, {"reasoning_effort": "none"}),
        (chat_templates.THINKING, {"enable_thinking": True}, {"enable_thinking": False}),
        (OLD, {"thinking": True}, {"thinking": False}),
        (
            BOTH,
            {"reasoning_effort": "low", "enable_thinking": True},
            {"reasoning_effort": "none", "enable_thinking": False},
        ),
    ],
)
def test_a_template_is_told_what_it_reads(template: str, low: dict[str, Any], none: dict[str, Any]) -> None:
    assert effort_variables("low", {}, format_of(template)) == low
    assert effort_variables("none", {"date_string": "x"}, format_of(template)) == {**none, "date_string": "x"}


@pytest.mark.parametrize(
    ("template", "efforts"), [(chat_templates.ALWAYS_THINKING, EFFORTS), (chat_templates.PLAIN, EFFORTS[1:])]
)
def test_what_a_model_cannot_be_told_is_refused(template: str, efforts: tuple[str, ...]) -> None:
    for effort in efforts:
        with pytest.raises(InvalidRequestError, match="chat template does not read it") as caught:
            effort_variables(effort, {}, format_of(template))
        assert caught.value.param == "reasoning_effort"


def test_a_model_that_does_not_reason_is_asked_for_nothing() -> None:
    assert effort_variables("none", {}, format_of(chat_templates.PLAIN)) == {}


@pytest.mark.parametrize("effort", ["", "None", "ultra", 1, True, ["low"]])
def test_other_efforts_are_refused(effort: Any) -> None:
    with pytest.raises(InvalidRequestError, match="reasoning_effort must be") as caught:
        effort_variables(effort, {}, format_of(GRADED))
    assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize("given", [{"reasoning_effort": "high"}, {"enable_thinking": False}])
def test_what_is_said_twice_must_be_the_same(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="differ") as caught:
        effort_variables("low", given, format_of(BOTH))
    assert caught.value.param == "reasoning_effort"
    same = effort_variables("low", {}, format_of(BOTH))
    assert effort_variables("low", same, format_of(BOTH)) == same


def check_prompts() -> None:
    """Prompts in both APIs are those of the variables; without reasoning, the answer has none."""
    for template in (GRADED, BOTH, chat_templates.THINKING):
        model = served(chat_tokenizer(template))
        prompts = []
        for effort in EFFORTS:
            variables = effort_variables(effort, {}, model.chat_format)
            wanted = parse_chat_completion({"messages": HI, "chat_template_kwargs": variables}, model)
            asked = parse_chat_completion({"messages": HI, "reasoning_effort": effort}, model)
            assert asked == wanted
            assert parse_response({"input": "hi", "reasoning": {"effort": effort}}, model).generation == wanted
            if "enable_thinking" in variables:
                assert asked.chat.reasoning == ("off" if effort == "none" else "possible")
            prompts.append(str(asked.prompts))
        assert len(set(prompts)) == (2 if template is chat_templates.THINKING else len(EFFORTS))


def test_prompts() -> None:
    check_prompts()


def test_errors_name_the_field_of_the_api() -> None:
    with pytest.raises(InvalidRequestError, match=r"^reasoning\.effort is not supported by this model") as caught:
        parse_response({"input": "hi", "reasoning": {"effort": "low"}}, served(chat_tokenizer(chat_templates.PLAIN)))
    assert caught.value.param == "reasoning.effort"


def test_a_switch_that_is_not_seen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_support, "_SWITCHES", ())
    with pytest.raises((AssertionError, InvalidRequestError)):
        check_prompts()
