"""What the document says of `/v1/responses`."""

from __future__ import annotations

from pellucid.core.sampling_params import MAX_LOGPROBS
from pellucid.core.validation import INT32_MAX
from pellucid.server.chat.effort import EFFORTS
from pellucid.server.openai.chat_body import EXTENSION_FIELDS
from pellucid.server.openai.fields import LABELS
from pellucid.server.openai.responses_api_items import NEUTRAL as NEUTRAL_OF_ITEMS
from pellucid.server.openai.responses_api_items import ROLES, STATUSES
from pellucid.server.openai.responses_api_requests import (
    FIELDS,
    INCLUDABLE,
    NEUTRAL,
    NEUTRAL_OF_REASONING,
    NEUTRAL_OF_TOOLS,
)
from pellucid.server.openapi.fields import (
    CACHE_OPTIONS_PROPERTY,
    METADATA,
    MODEL,
    extension_properties,
    label_properties,
    neutral_properties,
)
from pellucid.server.openapi.operation import EVENTS, JSON, OF_GENERATION, Operation, event, json_text
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


def _parts(*kinds: str) -> Schema:
    """Text, or parts of these kinds that hold some."""
    extra: dict[str, Schema] = {"prompt_cache_breakpoint": const({"mode": "explicit"})}
    parts = []
    for kind in kinds:
        part = {"type": const(kind), "text": STRING, **extra}
        if kind == "output_text":
            part |= {"annotations": const([]), "logprobs": {"type": "array"}, "parsed": {}}
        parts.append(request_object(part, ("type", "text")))
    return array(any_of(*parts) if len(parts) > 1 else parts[0])


def _item() -> Schema:
    common = {**neutral_properties(NEUTRAL_OF_ITEMS), "id": STRING, "status": enum(*STATUSES)}
    others = tuple(role for role in ROLES if role != "assistant")
    kinds: tuple[tuple[dict[str, Schema], tuple[str, ...]], ...] = (
        (
            {"type": const("message"), "role": enum(*others), "content": any_of(STRING, _parts("input_text"))},
            ("role", "content"),
        ),
        (
            {
                "type": const("message"),
                "role": const("assistant"),
                "content": any_of(STRING, _parts("output_text", "input_text")),
            },
            ("role", "content"),
        ),
        (
            {"type": const("reasoning"), "summary": _parts("summary_text"), "content": _parts("reasoning_text")},
            ("type",),
        ),
        (
            {
                "type": const("function_call"),
                "call_id": STRING,
                "name": STRING,
                "arguments": STRING,
                "parsed_arguments": {},
            },
            ("type", "call_id", "name", "arguments"),
        ),
        (
            {
                "type": const("function_call_output"),
                "call_id": STRING,
                "name": STRING,
                "output": any_of(STRING, _parts("input_text", "output_text")),
            },
            ("type", "call_id", "output"),
        ),
    )
    return any_of(*(request_object({**common, **properties}, required) for properties, required in kinds))


def _request() -> Schema:
    tool = {
        **neutral_properties(NEUTRAL_OF_TOOLS),
        "type": const("function"),
        "name": STRING,
        "description": STRING,
        "parameters": described({"type": "object"}, "A JSON schema."),
        "strict": BOOLEAN,
    }
    function = request_object({"type": const("function"), "name": STRING}, ("type", "name"))
    allowed = {
        "type": const("allowed_tools"),
        "mode": enum("auto", "required"),
        "tools": array(function, least=1),
    }
    choice = any_of(enum("none", "auto", "required"), function, request_object(allowed, allowed))
    form = any_of(
        request_object({"type": enum("text", "json_object")}, ("type",)),
        request_object(
            {
                "type": const("json_schema"),
                "name": STRING,
                "description": STRING,
                "schema": {"type": "object"},
                "strict": BOOLEAN,
            },
            ("type", "name", "schema"),
        ),
    )
    own: dict[str, Schema] = {
        "model": MODEL,
        "input": described(any_of(STRING, array(ref("InputItem"), least=1)), "Text, or what was said so far."),
        "instructions": described(STRING, "What the model is told before it."),
        "max_output_tokens": described(
            integer(1, INT32_MAX), "Most tokens to generate; without it, until the context is full."
        ),
        "max_tool_calls": described(integer(1, INT32_MAX), "Of built-in tools, of which there are none."),
        "tools": described(array(request_object(tool, ("type", "name"))), "What the model may call."),
        "tool_choice": described(choice, "Whether it calls, and what."),
        "parallel_tool_calls": described(BOOLEAN, "Whether it may make more than one call."),
        "text": described(
            request_object({"format": form, "verbosity": const("medium")}), "What the answer must look like."
        ),
        "prompt_cache_options": CACHE_OPTIONS_PROPERTY,
        "reasoning": request_object({**neutral_properties(NEUTRAL_OF_REASONING), "effort": enum(*EFFORTS)}),
        "include": described(array(enum(*INCLUDABLE)), "What the answer is to tell besides."),
        "top_logprobs": described(
            integer(0, MAX_LOGPROBS), "So many alternatives; needs `include` of log-probabilities."
        ),
        "stream": described(BOOLEAN, "Send the answer as server-sent events, the last one `response.completed`."),
        "stream_options": described(request_object({"include_obfuscation": const(False)}), "With `stream` alone."),
        "store": described(BOOLEAN, "Nothing is stored, whatever it says."),
        "metadata": described(METADATA, "Comes back with the answer."),
        **label_properties(LABELS),
    }
    assert own.keys() == FIELDS
    properties = {
        **neutral_properties(NEUTRAL),
        **extension_properties(EXTENSION_FIELDS - {"n"}),
        "n": described(const(1), "There is one answer."),
        **own,
    }
    return request_object(properties, ("input",))


def _response() -> Schema:
    usage = answer_object(
        {
            "input_tokens": INTEGER,
            "input_tokens_details": answer_object({"cached_tokens": INTEGER, "cache_write_tokens": INTEGER}),
            "output_tokens": INTEGER,
            "output_tokens_details": answer_object({"reasoning_tokens": INTEGER}),
            "total_tokens": INTEGER,
        }
    )
    part = any_of(
        answer_object(
            {"type": const("output_text"), "text": STRING, "annotations": const([]), "logprobs": {"type": "array"}}
        ),
        answer_object({"type": const("reasoning_text"), "text": STRING}),
    )
    common = {"id": STRING, "status": enum("in_progress", "completed", "incomplete")}
    content = {"content": array(part)}
    item = any_of(
        answer_object({"type": const("message"), **common, "role": const("assistant"), **content}),
        answer_object({"type": const("reasoning"), **common, "summary": {"type": "array"}, **content}),
        answer_object(
            {"type": const("function_call"), **common, "call_id": STRING, "name": STRING, "arguments": STRING}
        ),
    )
    return {
        "type": "object",
        "description": "Beside these, what the request asked for.",
        "properties": {
            "id": STRING,
            "object": const("response"),
            "created_at": described(INTEGER, "Seconds since 1970."),
            "completed_at": nullable(INTEGER),
            "status": enum("in_progress", "completed", "incomplete", "failed"),
            "error": nullable(answer_object({"code": STRING, "message": STRING})),
            "incomplete_details": nullable(answer_object({"reason": const("max_output_tokens")})),
            "output": array(item),
            "usage": nullable(usage),
            "model": STRING,
        },
        "required": ["id", "object", "created_at", "status", "error", "output", "usage", "model"],
    }


def schemas() -> dict[str, Schema]:
    """The components that the route needs, by name."""
    return {
        "ResponsesRequest": _request(),
        "InputItem": _item(),
        "Response": _response(),
        "ResponseEvent": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "pattern": "^response\\."},
                "sequence_number": INTEGER,
                "response": ref("Response"),
            },
            "required": ["type", "sequence_number"],
        },
    }


OPERATIONS = {
    ("post", "/v1/responses"): Operation(
        tag="OpenAI",
        summary="Answer a conversation, with typed items",
        description="As far as it needs no memory: nothing is stored, and what refers to what was stored is refused.",
        body=ref("ResponsesRequest"),
        example={"input": "Name three fruits.", "max_output_tokens": 50},
        answer={JSON: ref("Response"), EVENTS: event(json_text(any_of(ref("ResponseEvent"), ref("Error"))))},
        errors=OF_GENERATION,
    ),
}
