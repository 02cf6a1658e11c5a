"""Errors of rewritten bodies name what the caller wrote."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.server.openai import chat_body
from pellucid.server.openai.chat_body import extensions, parse_chat_body
from tests.support.served_models import served_model

RENAMINGS = ((r"response_format\.json_schema", "text.format"), (r"(tools\[\d+\])\.function", r"\1"))


@pytest.mark.parametrize("kind", [InvalidRequestError, ContextLengthError])
def test_names(monkeypatch: pytest.MonkeyPatch, kind: type[InvalidRequestError]) -> None:
    def refuse(body: Any, model: Any) -> None:
        raise kind("tools[3].function.name and response_format.json_schema.x", param="tools[3].function.name")

    monkeypatch.setattr(chat_body, "parse_chat_completion", refuse)
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat_body({}, served_model(), RENAMINGS)
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.param) == ("tools[3].name and text.format.x", "tools[3].name")


def test_extensions() -> None:
    assert extensions({"n": 1, "min_p": 0.5, "messages": [], "prompt_logprobs": 1}) == {"n": 1, "min_p": 0.5}
    for several in (2, 0, True):
        with pytest.raises(InvalidRequestError, match="one answer"):
            extensions({"n": several})
