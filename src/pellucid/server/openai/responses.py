"""Response bodies of the OpenAI API. (https://platform.openai.com/docs/api-reference)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import CompletionOutput, RequestOutput
from pellucid.server.chat.parser import read_message
from pellucid.server.chat.usage import num_reasoning_tokens
from pellucid.server.openai.chat_messages import finish_reason_of, message_body
from pellucid.server.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from pellucid.server.openai.requests import GenerationRequest
from pellucid.tokenizer.tokenizer import Tokenizer


def response_body(
    request: GenerationRequest,
    outputs: Sequence[RequestOutput],
    tokenizer: Tokenizer,
    *,
    name: str,
    created: int,
    tells_cached: bool = True,
) -> dict[str, Any]:
    """The body that answers `request`.

    Args:
        outputs: one for each of its prompts, none of them failed.
        name: unique; the body's `id` is made from it.
        created: seconds since 1970.
        tells_cached: whether it says how many tokens were cached, which depends on what ran before.
    """
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for completion in output.outputs:
            if request.is_prompt_only:
                completion = _prompt_only(request, completion, tokenizer)
            choice = _choice(request, completion, tokenizer)
            choice["index"] = len(choices)
            if output.prompt_logprobs is not None:
                choice["prompt_logprobs"] = [prompt_logprobs(entry) for entry in output.prompt_logprobs]
            if request.return_token_ids:
                choice["prompt_token_ids"] = output.prompt_token_ids
                choice["token_ids"] = completion.token_ids
            choices.append(choice)
    return {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": usage(request, outputs, tokenizer, tells_cached=tells_cached),
    }


def usage(
    request: GenerationRequest, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, *, tells_cached: bool = True
) -> dict[str, Any]:
    """How many tokens `request` took. Those of reasoning are told of where the model may write some."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = 0 if request.is_prompt_only else sum(output.metrics.output_tokens for output in outputs)
    told: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if tells_cached:
        told["prompt_tokens_details"] = {"cached_tokens": sum(output.metrics.cached_tokens for output in outputs)}
    if request.chat.format.reasoning is not None:
        answers = [completion.token_ids for output in outputs for completion in output.outputs]
        chat = (request.chat, request.sampling_params, tokenizer)
        num = sum(num_reasoning_tokens(token_ids, *chat) for token_ids in answers)
        told["completion_tokens_details"] = {"reasoning_tokens": num}
    return told


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: PellucidError) -> dict[str, Any]:
    """The body that tells of `error`."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _prompt_only(request: GenerationRequest, completion: CompletionOutput, tokenizer: Tokenizer) -> CompletionOutput:
    """The echo of the prompt, without what was generated after it, a token."""
    params, token_ids = request.sampling_params, completion.token_ids[:-1]
    text = tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens) if params.detokenize else ""
    logprobs = None if completion.logprobs is None else completion.logprobs[:-1]
    return CompletionOutput(
        completion.index, text.strip() if params.strip else text, token_ids, "length", None, logprobs
    )


def _choice(request: GenerationRequest, completion: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0}
    finish_reason: str = completion.finish_reason
    if request.is_chat:
        message = read_message(request.chat.format.parser(request.chat), completion.text)
        choice["message"] = message_body(message)
        finish_reason = finish_reason_of(finish_reason, completion.stop_reason, has_tool_calls=bool(message.tool_calls))
    else:
        choice["text"] = completion.text
    choice["logprobs"] = _logprobs(request, completion, tokenizer)
    choice["finish_reason"] = finish_reason
    choice["stop_reason"] = completion.stop_reason
    return choice


def _logprobs(request: GenerationRequest, completion: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    steps = zip(completion.token_ids, completion.logprobs, strict=True)
    if request.is_chat:
        return {"content": [chat_logprobs(token_id, step, tokenizer) for token_id, step in steps], "refusal": None}
    logprobs = CompletionLogprobs(tokenizer, request.sampling_params)
    for token_id, step in steps:
        logprobs.add(token_id, step)
    return logprobs.take(len(completion.text), is_end=True)
