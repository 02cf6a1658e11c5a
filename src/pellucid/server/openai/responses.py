"""Response bodies of the OpenAI API. (https://platform.openai.com/docs/api-reference)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import CompletionOutput, Logprob, RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai.requests import GenerationRequest
from pellucid.tokenizer.detokenizer import IncrementalDetokenizer
from pellucid.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""


def response_body(
    request: GenerationRequest, outputs: Sequence[RequestOutput], tokenizer: Tokenizer, *, name: str, created: int
) -> dict[str, Any]:
    """The body that answers `request`.

    Args:
        outputs: one for each of its prompts, none of them failed.
        name: unique; the body's `id` is made from it.
        created: seconds since 1970.
    """
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = 0 if request.is_prompt_only else sum(output.metrics.output_tokens for output in outputs)
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for completion in output.outputs:
            if request.is_prompt_only:
                completion = _prompt_only(request, completion, tokenizer)
            choice = _choice(request, completion, tokenizer)
            choice["index"] = len(choices)
            if output.prompt_logprobs is not None:
                choice["prompt_logprobs"] = [_prompt_logprobs(entry) for entry in output.prompt_logprobs]
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
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


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


def _prompt_logprobs(entry: dict[int, Logprob] | None) -> dict[str, dict[str, Any]] | None:
    """In the form of vLLM."""
    if entry is None:
        return None
    return {
        str(token_id): {
            "logprob": max(item.logprob, LEAST_LOGPROB),
            "rank": item.rank,
            "decoded_token": item.decoded_token,
        }
        for token_id, item in entry.items()
    }


def _choice(request: GenerationRequest, completion: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    params = request.sampling_params
    choice: dict[str, Any] = {"index": 0}
    if request.is_chat:
        choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        choice["logprobs"] = _chat_logprobs(completion, tokenizer)
    else:
        choice["text"] = completion.text
        choice["logprobs"] = _completion_logprobs(completion, tokenizer, params)
    choice["finish_reason"] = completion.finish_reason
    choice["stop_reason"] = completion.stop_reason
    return choice


def _chat_logprobs(completion: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    content = []
    for token_id, step in zip(completion.token_ids, completion.logprobs, strict=True):
        content.append(
            {
                **_chat_token(token_id, step[token_id], tokenizer),
                "top_logprobs": [_chat_token(*item, tokenizer) for item in _likeliest(step)],
            }
        )
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, item: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": _token_text(token_id, item.decoded_token, tokenizer),
        "logprob": max(item.logprob, LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _completion_logprobs(
    completion: CompletionOutput, tokenizer: Tokenizer, params: SamplingParams
) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for token_id, step in zip(completion.token_ids, completion.logprobs, strict=True):
        if step:
            tokens.append(_token_text(token_id, step[token_id].decoded_token, tokenizer))
            token_logprobs.append(max(step[token_id].logprob, LEAST_LOGPROB))
            top_logprobs.append(
                {
                    _token_text(each, item.decoded_token, tokenizer): max(item.logprob, LEAST_LOGPROB)
                    for each, item in step.items()
                }
            )
        else:  # the first token of a prompt, which nothing comes before
            tokens.append(_token_text(token_id, tokenizer.decode([token_id], skip_special_tokens=False), tokenizer))
            token_logprobs.append(None)
            top_logprobs.append(None)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": _text_offsets(completion, tokenizer, params),
    }


def _text_offsets(completion: CompletionOutput, tokenizer: Tokenizer, params: SamplingParams) -> list[int]:
    """Where in the text each token begins; at its end for those that a stop string cut off."""
    detokenizer = IncrementalDetokenizer(
        tokenizer, skip_special_tokens=params.skip_special_tokens, continuation=not params.echo
    )
    pieces = [detokenizer.push(token_id) for token_id in completion.token_ids]
    text = "".join(pieces)
    offset = len(text.lstrip()) - len(text) if params.strip else 0
    offsets = []
    for piece in pieces:
        offsets.append(min(max(0, offset), len(completion.text)))
        offset += len(piece)
    return offsets


def _likeliest(step: dict[int, Logprob]) -> list[tuple[int, Logprob]]:
    ranked = [(item.rank, token_id, item) for token_id, item in step.items() if item.rank is not None]
    return [(token_id, item) for _, token_id, item in sorted(ranked, key=lambda entry: entry[0])]


def _token_text(token_id: int, decoded_token: str, tokenizer: Tokenizer) -> str:
    """The token's text; for a part of a character `bytes:` and the bytes written out, as OpenAI has it."""
    if "\ufffd" in decoded_token:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return decoded_token
