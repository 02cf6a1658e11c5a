"""Messages that the Anthropic API answers with. (https://docs.anthropic.com/en/api/messages)"""

from __future__ import annotations

from typing import Any

from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.server.anthropic.content import ContentEvents, content_of
from pellucid.server.chat.usage import num_reasoning_tokens
from pellucid.server.openai.requests import GenerationRequest
from pellucid.tokenizer.tokenizer import Tokenizer


def message_body(
    request: GenerationRequest, output: RequestOutput, tokenizer: Tokenizer, *, name: str
) -> dict[str, Any]:
    """The message that answers `request`.

    Args:
        output: the answer, which did not fail.
        name: unique; the message's `id` is made from it.
    """
    parser, content = request.chat.format.parser(request.chat), ContentEvents()
    pieces = [*parser.push(output.outputs[0].text), *parser.finish()]
    events = [event for piece in pieces for event in content.push(piece)] + content.end()
    return {
        **new_message(request, name=name),
        "content": content_of(events),
        **ending(request, output, content, tokenizer),
    }


def new_message(request: GenerationRequest, *, name: str) -> dict[str, Any]:
    """The message before anything of it is there."""
    return {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(RequestMetrics(prompt_tokens=len(request.prompts[0]))),
    }


def ending(
    request: GenerationRequest, output: RequestOutput, content: ContentEvents, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Why the answer ended, and how many tokens it took."""
    thinking_tokens = 0
    if content.has_thinking:
        token_ids = output.outputs[0].token_ids
        thinking_tokens = num_reasoning_tokens(token_ids, request.chat, request.sampling_params, tokenizer)
    return {
        **_stop(request, output.outputs[0], has_tool_use=content.has_tool_use),
        "usage": {**_usage(output.metrics), "output_tokens_details": {"thinking_tokens": thinking_tokens}},
    }


def _stop(request: GenerationRequest, completion: CompletionOutput, *, has_tool_use: bool) -> dict[str, Any]:
    sequence: str | None = None
    if completion.finish_reason == "length":
        is_whole = request.sampling_params.max_tokens == len(completion.token_ids)
        reason = "max_tokens" if is_whole else "model_context_window_exceeded"
    elif isinstance(completion.stop_reason, str):
        reason, sequence = "stop_sequence", completion.stop_reason
    else:
        reason = "tool_use" if has_tool_use else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(metrics: RequestMetrics) -> dict[str, Any]:
    """The tokens of the prompt are told in two parts: those computed, and those found in the prefix cache. Which of
    them are kept there is nobody's request: none count as that."""
    return {
        "input_tokens": metrics.prompt_tokens - metrics.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": metrics.cached_tokens,
        "output_tokens": metrics.output_tokens,
    }
