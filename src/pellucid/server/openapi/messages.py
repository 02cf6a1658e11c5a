"""What the document says of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from pellucid.core.sampling_params import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS
from pellucid.core.validation import INT32_MAX
from pellucid.server.anthropic.requests import (
    EFFORTS,
    LEAST_BUDGET_TOKENS,
    NEUTRAL,
    NEUTRAL_OF_COUNTING,
    NEUTRAL_OF_TOOLS,
    PROMPT_FIELDS,
)
from pellucid.server.openai.chat_body import EXTENSION_FIELDS
from pellucid.server.openapi.fields import CACHE_CONTROL, MODEL, extension_properties, neutral_properties
from pellucid.server.openapi.operation import (
    EVENTS,
    JSON,
    OF_GENERATION,
    OF_THE_MODEL,
    Operation,
    event,
    json_text,
)
from pellucid.server.openapi.schema import (
    BOOLEAN,
    INTEGER,
    STRING,
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


def _text_block() -> Schema:
    properties = {"type": const("text"), "text": STRING, "citations": const([]), "cache_control": CACHE_CONTROL}
    return request_object(properties, ("type", "text"))


def _message() -> Schema:
    text = ref("TextBlock")
    call = {
        "type": const("tool_use"),
        "id": STRING,
        "name": STRING,
        "input": {"type": "object"},
        "caller": const({"type": "direct"}),
        "cache_control": CACHE_CONTROL,
    }
    thinking = {
        "type": const("thinking"),
        "thinking": STRING,
        "signature": STRING,
        "cache_control": CACHE_CONTROL,
    }
    result = {
        "type": const("tool_result"),
        "tool_use_id": STRING,
        "content": any_of(STRING, array(text)),
        "is_error": BOOLEAN,
        "cache_control": CACHE_CONTROL,
    }
    of_assistant = any_of(
        text,
        request_object(call, ("type", "id", "name", "input")),
        request_object(thinking, ("type", "thinking")),
    )
    of_user = any_of(text, request_object(result, ("type", "tool_use_id")))
    return any_of(
        *(
            request_object({"role": const(role), "content": any_of(STRING, array(block))}, ("role", "content"))
            for role, block in (("user", of_user), ("assistant", of_assistant), ("system", text))
        )
    )


def _prompt_properties() -> dict[str, Schema]:
    tool = {
        **neutral_properties(NEUTRAL_OF_TOOLS),
        "name": STRING,
        "description": STRING,
        "input_schema": described({"type": "object"}, "A JSON schema."),
        "strict": BOOLEAN,
        "cache_control": CACHE_CONTROL,
    }
    no_parallel = {"disable_parallel_tool_use": BOOLEAN}
    choice = any_of(
        request_object({"type": enum("auto", "any", "none"), **no_parallel}, ("type",)),
        request_object({"type": const("tool"), "name": STRING, **no_parallel}, ("type", "name")),
    )
    form = request_object({"type": const("json_schema"), "schema": {"type": "object"}}, ("type", "schema"))
    display = {"display": const("summarized")}
    thinking = any_of(
        request_object(
            {"type": const("enabled"), "budget_tokens": integer(LEAST_BUDGET_TOKENS, INT32_MAX), **display},
            ("type", "budget_tokens"),
        ),
        request_object({"type": enum("disabled", "adaptive"), **display}, ("type",)),
    )
    properties = {
        "messages": described(array(ref("Message"), least=1), "The conversation so far."),
        "system": described(any_of(STRING, array(ref("TextBlock"))), "What the model is told before it."),
        "tools": described(array(request_object(tool, ("name", "input_schema"))), "What the model may call."),
        "tool_choice": described(choice, "Whether it calls, and what."),
        "thinking": described(thinking, "Whether the model thinks before it answers, where it can."),
        "output_config": described(
            request_object({"format": form, "effort": enum(*EFFORTS)}), "What the answer must look like."
        ),
        "cache_control": CACHE_CONTROL,
    }
    assert properties.keys() == PROMPT_FIELDS
    return {**properties, "model": MODEL}


def _message_request() -> Schema:
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
    user = request_object({"user_id": described(STRING, "Names the caller; no answer depends on it.")})
    properties = {
        **neutral_properties(NEUTRAL),
        **extension_properties(EXTENSION_FIELDS - {"stop", "n"}),
        **_prompt_properties(),
        "n": described(const(1), "There is one answer."),
        "max_tokens": described(integer(1, INT32_MAX), "Most tokens to generate."),
        "stop_sequences": described(array(stop, most=MAX_STOP_STRINGS), "Strings that end the text."),
        "stream": described(BOOLEAN, "Send the answer as server-sent events, the last one `message_stop`."),
        "metadata": user,
        "user_profile_id": STRING,
    }
    return request_object(properties, ("model", "messages", "max_tokens"))


def _count_tokens_request() -> Schema:
    properties = {
        **neutral_properties(NEUTRAL_OF_COUNTING),
        **extension_properties(("chat_template_kwargs",)),
        **_prompt_properties(),
    }
    return request_object(properties, ("model", "messages"))


def _answer() -> Schema:
    block = any_of(
        answer_object({"type": const("text"), "text": STRING}),
        answer_object({"type": const("thinking"), "thinking": STRING, "signature": STRING}),
        answer_object({"type": const("tool_use"), "id": STRING, "name": STRING, "input": {"type": "object"}}),
    )
    reasons = ("end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use")
    return answer_object(
        {
            "id": STRING,
            "type": const("message"),
            "role": const("assistant"),
            "model": STRING,
            "content": array(block),
            "stop_reason": nullable(enum(*reasons)),
            "stop_sequence": nullable(STRING),
            "usage": ref("MessageUsage"),
        }
    )


def schemas() -> dict[str, Schema]:
    """The components that these routes need, by name."""
    usage = {
        "input_tokens": INTEGER,
        "cache_creation_input_tokens": INTEGER,
        "cache_read_input_tokens": INTEGER,
        "output_tokens": INTEGER,
        "output_tokens_details": answer_object({"thinking_tokens": INTEGER}),
    }
    kinds = ("message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop")
    return {
        "MessagesRequest": _message_request(),
        "CountTokensRequest": _count_tokens_request(),
        "Message": _message(),
        "TextBlock": _text_block(),
        "MessageAnswer": _answer(),
        "MessageUsage": answer_object(usage, optional=("output_tokens_details",)),
        "MessageEvent": {
            "type": "object",
            "properties": {"type": enum(*kinds, "message_delta", "message_stop"), "message": ref("MessageAnswer")},
            "required": ["type"],
        },
        "TokenCount": answer_object({"input_tokens": INTEGER}),
    }


OPERATIONS = {
    ("post", "/v1/messages"): Operation(
        tag="Anthropic",
        summary="Answer a conversation",
        description="Fields beyond Anthropic's are those of vLLM and of Pellucid's SamplingParams.",
        body=ref("MessagesRequest"),
        example={"model": "MODEL", "max_tokens": 50, "messages": [{"role": "user", "content": "Name three fruits."}]},
        answer={
            JSON: ref("MessageAnswer"),
            EVENTS: event(json_text(any_of(ref("MessageEvent"), ref("AnthropicError")))),
        },
        errors=OF_GENERATION,
        has_anthropic_errors=True,
    ),
    ("post", "/v1/messages/count_tokens"): Operation(
        tag="Anthropic",
        summary="How many tokens the prompt of such a message has",
        body=ref("CountTokensRequest"),
        example={"model": "MODEL", "messages": [{"role": "user", "content": "Name three fruits."}]},
        answer={JSON: ref("TokenCount")},
        errors=OF_THE_MODEL,
        has_anthropic_errors=True,
    ),
}
