"""Reasoning in three forms: chat completions, messages, responses; whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support.chat_models import CHAT_TEMPLATE, TOKENIZER, TOKENS
from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_models import write_tiny_model

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
HI: Any = [{"role": "user", "content": "hi"}]
THOUGHT, TEXT = "hm, é", "yes"


def scripted(answer: str) -> dict[str, Any]:
    """What makes the model say `answer`."""
    return {"structured_outputs": {"structural_tag": {"format": {"type": "const_string", "value": answer}}}}


ANSWER = scripted(f"<think>{THOUGHT}</think>\n\n{TEXT}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    metadata = {**TOKENIZER, "tokenizer.chat_template": CHAT_TEMPLATE + SWITCH}
    path = tmp_path_factory.mktemp("model") / "thinking.gguf"
    write_tiny_model(path, vocab_size=len(TOKENS), extra_metadata=metadata)
    with live_server(str(path)) as server:
        yield server


@pytest.fixture(scope="module")
def openai_client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def anthropic_client(server: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def message(client: anthropic.Anthropic, *, stream: bool, **body: Any) -> anthropic.types.Message:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 2000, "messages": HI, "extra_body": ANSWER, **body}
    if stream:
        with client.messages.stream(**asked) as events:
            return events.get_final_message()
    whole: anthropic.types.Message = client.messages.create(**asked)
    return whole


@pytest.fixture(scope="module")
def num_thought(openai_client: openai.OpenAI) -> int:
    """How many tokens are spent on the thought, by the count of chat completions."""
    completion = openai_client.chat.completions.create(model="tiny", messages=HI, extra_body=ANSWER)
    choice: Any = completion.choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == (THOUGHT, TEXT)
    usage: Any = completion.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    num: int = usage.completion_tokens_details.reasoning_tokens
    return num


def test_a_stream_of_chat_completions(openai_client: openai.OpenAI, num_thought: int) -> None:
    chunks: Any = openai_client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}, extra_body=ANSWER
    )
    *chunks, last = chunks
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert last.usage.completion_tokens_details.reasoning_tokens == num_thought


@pytest.mark.parametrize("stream", [False, True])
def test_messages(anthropic_client: anthropic.Anthropic, num_thought: int, stream: bool) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = message(anthropic_client, stream=stream, thinking=thinking)
    thought, text = answer.content
    assert thought.type == "thinking"
    assert text.type == "text"
    assert (thought.thinking, text.text, answer.stop_reason) == (THOUGHT, TEXT, "end_turn")
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == num_thought
    again: Any = [*HI, {"role": "assistant", "content": [block.to_dict() for block in answer.content]}, *HI]
    assert message(anthropic_client, stream=stream, messages=again).content[1].to_dict() == text.to_dict()


@pytest.mark.parametrize("stream", [False, True])
def test_messages_without_thinking(anthropic_client: anthropic.Anthropic, stream: bool) -> None:
    off: Any = {"type": "disabled"}
    answer = message(anthropic_client, stream=stream, thinking=off, extra_body=scripted(TEXT))
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": TEXT}]


@pytest.mark.parametrize("stream", [False, True])
def test_responses(openai_client: openai.OpenAI, num_thought: int, stream: bool) -> None:
    response: Any = openai_client.responses.create(model="tiny", input=HI, stream=stream, extra_body=ANSWER)
    if stream:
        *events, last = response
        response = last.response
        told = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert told == THOUGHT
    thought, text = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", THOUGHT)
    assert text.content[0].text == response.output_text == TEXT
    assert response.usage.output_tokens_details.reasoning_tokens == num_thought
    items: Any = [*HI, *[item.to_dict() for item in response.output], *HI]
    again: Any = openai_client.responses.create(model="tiny", input=items, extra_body=ANSWER)
    assert again.output_text == TEXT
