"""What the document says of `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping

from pellucid.core.sampling_params import MAX_LOGPROBS
from pellucid.core.validation import INT32_MAX
from pellucid.server.chat.conversation import ECHOES
from pellucid.server.chat.effort import EFFORTS
from pellucid.server.openai.fields import LABELS
from pellucid.server.openai.inputs import MAX_INPUTS
from pellucid.server.openai.requests import NEUTRAL_CHAT, NEUTRAL_COMPLETION, SAMPLING_FIELDS
from pellucid.server.openai.response_format import RESPONSE_FORMAT_FIELDS
from pellucid.server.openapi.fields import (
    CACHE_CONTROL,
    CACHE_OPTIONS_PROPERTY,
    METADATA,
    MODEL,
    extension_properties,
    label_properties,
    neutral_properties,
    tools_property,
)
from pellucid.server.openapi.operation import OF_GENERATION, Operation, json_or_events
from pellucid.server.openapi.sampling import TEXT, sampling_properties
from pellucid.server.openapi.schema import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    TOKEN_ID,
    Schema,
    answer_object,
    any_of,
    array,
    const,
    described,
    enum,
    integer,
    nullable,
    ref,
    request_object,
)
from pellucid.tokenizer.chat_template import ROLES


def _tool_properties() -> dict[str, Schema]:
    named = {"type": const("function"), "function": request_object({"name": STRING}, ("name",))}
    function = request_object(named, named)
    allowed = request_object({"mode": enum("auto", "required"), "tools": array(function, least=1)}, ("mode", "tools"))
    some = {"type": const("allowed_tools"), "allowed_tools": allowed}
    choice = any_of(enum("none", "auto", "required"), function, request_object(some, some))
    return {
        "tools": tools_property(),
        "tool_choice": described(choice, "Whether it calls, and what."),
        "parallel_tool_calls": described(BOOLEAN, "Whether it may make more than one call."),
    }


def _common_properties() -> dict[str, Schema]:
    stream_options = {
        "include_usage": described(BOOLEAN, "A last event tells how many tokens it took."),
        "continuous_usage_stats": described(BOOLEAN, "Every event tells how many tokens its choice took so far."),
        "include_obfuscation": described(enum(False), "Not supported."),
    }
    return {
        **extension_properties((*SAMPLING_FIELDS, *RESPONSE_FORMAT_FIELDS, "priority", "cache_salt")),
        **label_properties(LABELS),
        "metadata": described(METADATA, "Taken; no answer depends on it."),
        "model": MODEL,
        "stream": described(BOOLEAN, "Send the answer as server-sent events, the last one `[DONE]`."),
        "stream_options": described(request_object(stream_options), "With `stream` alone."),
        "return_token_ids": described(BOOLEAN, "Tell the token ids of prompt and answer too."),
    }


def completion_request() -> Schema:
    """The body of `/v1/completions`."""
    one = any_of(TEXT, array(TOKEN_ID, least=1))
    prompt = any_of(*one["anyOf"], array(one, least=1, most=MAX_INPUTS))
    max_tokens = described(integer(0, INT32_MAX), "Most tokens to generate; 0 with `echo` gives the prompt back.")
    properties = {
        **_common_properties(),
        "prompt": described(prompt, "Text, token ids, or several of these, each answered by choices of its own."),
        "max_tokens": {**max_tokens, "default": 16},
        "logprobs": sampling_properties()["logprobs"],
        "echo": sampling_properties()["echo"],
        **neutral_properties(NEUTRAL_COMPLETION),
    }
    return request_object(properties, ("prompt",))


def chat_request() -> Schema:
    """The body of `/v1/chat/completions`."""
    limit = integer(1, INT32_MAX)
    part = request_object({"type": const("text"), "text": STRING}, ("type", "text"))
    prediction = {"type": const("content"), "content": any_of(STRING, array(part))}
    properties = {
        **_common_properties(),
        **_tool_properties(),
        **extension_properties(("chat_template_kwargs",)),
        "messages": described(array(ref("ChatMessage"), least=1), "The conversation so far."),
        "max_completion_tokens": described(limit, "Most tokens to generate; without it, until the context is full."),
        "max_tokens": described(limit, "The older name of max_completion_tokens."),
        "logprobs": described(BOOLEAN, "Tell the log-probability of each token."),
        "top_logprobs": described(integer(0, MAX_LOGPROBS), "And those of so many alternatives; needs `logprobs`."),
        "reasoning_effort": described(enum(*EFFORTS), "How much to think first, where the model's template has a say."),
        "prediction": described(request_object(prediction, prediction), "Taken; no answer depends on it."),
        "prompt_cache_options": CACHE_OPTIONS_PROPERTY,
        **neutral_properties(NEUTRAL_CHAT),
    }
    return request_object(properties, ("messages",))


def _chat_message() -> Schema:
    part = request_object({"type": const("text"), "text": STRING, "cache_control": CACHE_CONTROL}, ("type", "text"))
    properties = {
        "content": any_of(STRING, array(part)),
        "reasoning_content": STRING,
        "name": STRING,
        "tool_call_id": STRING,
    }
    others = enum(*(role for role in ROLES if role not in ("assistant", "tool")))
    answer = {
        **properties,
        "role": const("assistant"),
        "tool_calls": array(_message_call()),
        **dict.fromkeys(ECHOES, described({}, "What a client added to an answer; says nothing.")),
    }
    result = {**properties, "role": const("tool"), "tool_call_id": described(STRING, "Of one of the calls before it.")}
    return any_of(
        request_object({**properties, "role": described(others, "Who speaks.")}, ("role", "content")),
        request_object(answer, ("role", "content")),
        request_object({**answer, "tool_calls": array(_message_call(), least=1)}, ("role", "tool_calls")),
        request_object(result, ("role", "content", "tool_call_id")),
    )


def _message_call() -> Schema:
    """A call in a message that a client sends back."""
    arguments = described(any_of(STRING, {"type": "object"}), "An object, or the text of one in JSON.")
    properties = {"name": STRING, "arguments": arguments, "parsed_arguments": {}}
    function = request_object(properties, ("name", "arguments"))
    call = {"id": STRING, "type": const("function"), "function": function, "index": integer(0, INT32_MAX)}
    return request_object(call, ("id", "function"))


_USAGE = answer_object(
    {
        "prompt_tokens": INTEGER,
        "completion_tokens": INTEGER,
        "total_tokens": INTEGER,
        "prompt_tokens_details": answer_object({"cached_tokens": INTEGER}),
    }
)
FINISH_REASONS = enum("stop", "length", "tool_calls", "abort", "error")
STOP_REASON = described(any_of(STRING, INTEGER, {"type": "null"}), "The stop string or stop token id that ended it.")
_TOKEN = {"token": STRING, "logprob": NUMBER, "bytes": array(integer(0, 255))}
_OF_PROMPT = answer_object({"logprob": NUMBER, "rank": nullable(INTEGER), "decoded_token": STRING})
_EXTRAS: dict[str, Schema] = {
    "prompt_logprobs": array(any_of({"type": "object", "additionalProperties": _OF_PROMPT}, {"type": "null"})),
    "prompt_token_ids": array(INTEGER),
    "token_ids": array(INTEGER),
}


def _chat_choice(message: Schema, name: str, extras: Mapping[str, Schema] = _EXTRAS) -> Schema:
    token = answer_object({**_TOKEN, "top_logprobs": array(answer_object(_TOKEN))})
    logprobs = answer_object({"content": array(token), "refusal": {"type": "null"}})
    properties = {
        "index": INTEGER,
        name: message,
        "logprobs": nullable(logprobs),
        "finish_reason": nullable(FINISH_REASONS),
        "stop_reason": STOP_REASON,
        **extras,
    }
    return answer_object(properties, optional=(*extras, *(("stop_reason",) if name == "delta" else ())))


def _text_choice() -> Schema:
    logprobs = answer_object(
        {
            "tokens": array(STRING),
            "token_logprobs": array(nullable(NUMBER)),
            "top_logprobs": array(any_of({"type": "object", "additionalProperties": NUMBER}, {"type": "null"})),
            "text_offset": array(INTEGER),
        }
    )
    properties = {
        "index": INTEGER,
        "text": STRING,
        "logprobs": nullable(logprobs),
        "finish_reason": nullable(FINISH_REASONS),
        "stop_reason": STOP_REASON,
        **_EXTRAS,
    }
    return answer_object(properties, optional=_EXTRAS)


def _tool_call(*, is_piece: bool) -> Schema:
    function = answer_object({"name": STRING, "arguments": STRING}, optional=("name",) if is_piece else ())
    properties = {"id": STRING, "type": const("function"), "function": function}
    if is_piece:
        return answer_object({"index": INTEGER, **properties}, optional=("id", "type"))
    return answer_object(properties)


def _body(kind: str, choice: Schema, usage: Schema, *, is_chunk: bool = False) -> Schema:
    properties = {
        "id": STRING,
        "object": const(kind),
        "created": described(INTEGER, "Seconds since 1970."),
        "model": STRING,
        "choices": array(choice),
        "usage": usage,
    }
    return answer_object(properties, optional=("usage",) if is_chunk else ())


def schemas() -> dict[str, Schema]:
    """The components that these routes need, by name."""
    message = answer_object(
        {
            "role": const("assistant"),
            "content": nullable(STRING),
            "refusal": {"type": "null"},
            "reasoning_content": nullable(STRING),
            "tool_calls": array(_tool_call(is_piece=False)),
        },
        optional=("reasoning_content", "tool_calls"),
    )
    delta_properties = {
        "role": const("assistant"),
        "content": nullable(STRING),
        "reasoning_content": STRING,
        "tool_calls": array(_tool_call(is_piece=True)),
    }
    delta = answer_object(delta_properties, optional=delta_properties)
    usage = ref("Usage")
    return {
        "CompletionRequest": completion_request(),
        "ChatCompletionRequest": chat_request(),
        "ChatMessage": _chat_message(),
        "Usage": _USAGE,
        "Completion": _body("text_completion", _text_choice(), usage),
        "CompletionChunk": _body("text_completion", _text_choice(), nullable(usage), is_chunk=True),
        "ChatCompletion": _body("chat.completion", _chat_choice(message, "message"), usage),
        "ChatCompletionChunk": _body(
            "chat.completion.chunk", _chat_choice(delta, "delta"), nullable(usage), is_chunk=True
        ),
    }


OPERATIONS = {
    ("post", "/v1/chat/completions"): Operation(
        tag="OpenAI",
        summary="Answer a conversation",
        description="Fields beyond OpenAI's are those of vLLM and of Pellucid's SamplingParams.",
        body=ref("ChatCompletionRequest"),
        example={"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 50},
        answer=json_or_events("ChatCompletion", "ChatCompletionChunk"),
        errors=OF_GENERATION,
    ),
    ("post", "/v1/completions"): Operation(
        tag="OpenAI",
        summary="Continue a text",
        description="Fields beyond OpenAI's are those of vLLM and of Pellucid's SamplingParams.",
        body=ref("CompletionRequest"),
        example={"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
        answer=json_or_events("Completion", "CompletionChunk"),
        errors=OF_GENERATION,
    ),
}
