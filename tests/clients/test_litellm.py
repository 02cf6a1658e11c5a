"""The `litellm` client, unchanged, in its OpenAI-compatible mode."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
import pytest

from tests.clients.conftest import KEY
from tests.clients.test_openai import HI, TOOL, Wall
from tests.support.server_process import MODEL, SECONDS, ServerProcess


@pytest.fixture(scope="module")
def asked(server: ServerProcess) -> dict[str, Any]:
    """What every call says."""
    return {
        "model": f"openai/{MODEL}",
        "api_base": f"{server.url}/v1",
        "api_key": KEY,
        "timeout": SECONDS,
        "num_retries": 0,
        "max_tokens": 24,
        "seed": 7,
        "temperature": 1.0,
    }


def test_a_stream_is_the_answer(asked: dict[str, Any]) -> None:
    whole = litellm.completion(messages=HI, **asked)
    chunks = list(litellm.completion(messages=HI, stream=True, **asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 24


def test_async(asked: dict[str, Any]) -> None:
    async def ask() -> str:
        answer = await litellm.acompletion(messages=HI, **asked)
        return str(answer.choices[0].message.content)

    assert asyncio.run(ask()) == litellm.completion(messages=HI, **asked).choices[0].message.content


def test_an_answer_is_held_to_a_class(asked: dict[str, Any]) -> None:
    answer = litellm.completion(messages=HI, response_format=Wall, **{**asked, "max_tokens": 100})
    Wall.model_validate_json(answer.choices[0].message.content)


def test_a_tool_is_called(asked: dict[str, Any]) -> None:
    tools = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    # Without the last argument it imports what only its proxy installs.
    answer = litellm.completion(messages=HI, **{**asked, "max_tokens": 200}, **tools, _skip_mcp_handler=True)
    (call,) = answer.choices[0].message.tool_calls
    Wall.model_validate(json.loads(call.function.arguments))
    message, result = answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}
    for sent in (message, message.model_dump()):
        going_on = [*HI, sent, result]
        assert litellm.completion(messages=going_on, **asked, tools=[TOOL], _skip_mcp_handler=True).choices


def test_embeddings(server: ServerProcess) -> None:
    answer = litellm.embedding(
        model=f"openai/{MODEL}", input=["Hi", "Ho"], api_base=f"{server.url}/v1", api_key=KEY, encoding_format="float"
    )
    assert [item["index"] for item in answer.data] == [0, 1]


def test_errors_have_their_class(asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=HI, **{**asked, "api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=HI, **{**asked, "temperature": -1})
    with pytest.raises(litellm.BadRequestError, match="context holds 1024 tokens"):
        litellm.completion(messages=[{"role": "user", "content": "word " * 1000}], **asked)
