"""The `langchain-openai` client, unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.conftest import KEY
from tests.clients.test_openai import Wall
from tests.support.server_process import MODEL, SECONDS, ServerProcess


@tool
def paint(colour: bool) -> str:
    """Paint the wall."""
    return "done"


@pytest.fixture(scope="module")
def connection(server: ServerProcess) -> dict[str, Any]:
    return {"model": MODEL, "base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": SECONDS}


@pytest.fixture(scope="module")
def chat(connection: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(**connection, max_tokens=200, seed=7, temperature=1.0)


def test_a_stream_is_the_answer(chat: ChatOpenAI) -> None:
    whole = chat.invoke("Hi")
    assert "".join(str(chunk.content) for chunk in chat.stream("Hi")) == whole.content
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    assert asyncio.run(chat.ainvoke("Hi")).content == whole.content


def test_batches(chat: ChatOpenAI) -> None:
    assert [each.content for each in chat.batch(["Hi"] * 3)] == [chat.invoke("Hi").content] * 3


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_is_held_to_a_class(chat: ChatOpenAI, method: Any) -> None:
    assert isinstance(chat.with_structured_output(Wall, method=method).invoke("Hi"), Wall)


def test_a_tool_is_called(chat: ChatOpenAI) -> None:
    with_tools = chat.bind_tools([paint], tool_choice="any", parallel_tool_calls=False)
    answer = with_tools.invoke("Hi")
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert call["name"] == "paint"
    assert isinstance(call["args"]["colour"], bool)
    going_on = [HumanMessage("Hi"), answer, ToolMessage("done", tool_call_id=call["id"])]
    assert chat.bind_tools([paint]).invoke(going_on).response_metadata["model_name"] == MODEL


def test_embeddings(connection: dict[str, Any]) -> None:
    embeddings = OpenAIEmbeddings(**connection, check_embedding_ctx_length=False)
    one, same = embeddings.embed_documents(["Hi", "Hi"])
    assert one == same == embeddings.embed_query("Hi")
