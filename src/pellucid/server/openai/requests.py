"""Request bodies of the OpenAI API, checked and turned into what the engine takes.

Nothing is ignored: a parameter that is not supported is refused by its name, unless its value asks for nothing. `null`
is as good as leaving a parameter out. (https://platform.openai.com/docs/api-reference)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import MAX_LOGIT_BIASES, MAX_LOGPROBS, SamplingParams
from pellucid.core.validation import INT32_MAX, check_boolean, check_integer, refusal
from pellucid.server.chat.effort import effort_variables
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn, render_chat
from pellucid.server.json_fields import (
    Neutral,
    check_fields,
    check_neutral,
    read_choice,
    read_list,
    read_object,
    read_string,
    required,
)
from pellucid.server.openai.fields import (
    CACHE_RETENTIONS,
    cache_salt,
    check_cache_options,
    check_names,
    metadata,
    model_name,
    priority,
    without_nulls,
)
from pellucid.server.openai.inputs import input_list
from pellucid.server.openai.response_format import RESPONSE_FORMAT_FIELDS, structured_outputs
from pellucid.server.served_model import ServedModel
from pellucid.tokenizer.chat_template import check_template_kwargs

SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams)) - {
    "max_tokens",
    "logprobs",
    "echo",
    "structured_outputs",
    "logits_processors",  # functions, which no body holds
}
"""Parameters that mean what the field of SamplingParams of that name means: OpenAI's, and beyond them vLLM's."""

_NEUTRAL: Neutral = {
    "prompt_cache_retention": CACHE_RETENTIONS,
    "store": (False,),
    "service_tier": ("auto", "default"),
}
NEUTRAL_CHAT: Neutral = {
    **_NEUTRAL,
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "moderation": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_COMPLETION: Neutral = {
    **_NEUTRAL,
    "suffix": ("",),
}
"""Parameters that are not supported, with the values that ask for nothing."""

_COMMON = frozenset(("model", "metadata", "return_token_ids", "stream", "stream_options", "priority", "cache_salt"))


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a body asks for.

    Attributes:
        model: the model it names.
        prompts: text or token ids; one, but for a completion request with a list of them.
        sampling_params: for each of them.
        is_chat: whether the answers are an assistant's messages.
        return_token_ids: whether the answer has the token ids too (as in vLLM).
        is_prompt_only: whether nothing was to be generated, and only the prompt is wanted back: a token is generated
            all the same, and left out of the answer.
        stream: whether the answer is to come as events.
        include_usage: whether a last event tells how many tokens it took.
        usage_so_far: tokens of each prompt, where every event is to tell how many its choice took so far; else none.
        priority: lower runs first.
        cache_salt: prefix-cache entries are shared only between requests of the same salt.
        chat: what a chat says about tools, and how its answers are read.
    """

    model: str
    prompts: list[str | list[int]]
    sampling_params: SamplingParams
    is_chat: bool
    return_token_ids: bool
    is_prompt_only: bool = False
    stream: bool = False
    include_usage: bool = False
    usage_so_far: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str = ""
    chat: ChatTurn = field(default_factory=ChatTurn)


def parse_chat_completion(body: Mapping[str, Any], model: ServedModel) -> GenerationRequest:
    """The body of `POST /v1/chat/completions`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ModelNotFoundError: it asks for another model.
        ModelFileError: the model's chat template is faulty.
    """
    body = without_nulls(body)
    own = {
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "chat_template_kwargs",
        "reasoning_effort",
        "prediction",
        "prompt_cache_options",
    }
    _check_names(body, own, NEUTRAL_CHAT)
    check_cache_options(body)
    _check_prediction(body.get("prediction"))
    logprobs = check_boolean("logprobs", body.get("logprobs", False))
    top_logprobs = check_integer("top_logprobs", body.get("top_logprobs", 0), 0, MAX_LOGPROBS)
    if top_logprobs and not logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    limits = {
        name: check_integer(name, body[name], 1, INT32_MAX)
        for name in ("max_completion_tokens", "max_tokens")
        if name in body
    }
    if len(set(limits.values())) == 2:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ: give max_completion_tokens alone", param="max_tokens"
        )
    template_kwargs = body.get("chat_template_kwargs", {})
    if not isinstance(template_kwargs, dict):
        raise refusal("chat_template_kwargs", template_kwargs, "an object")
    check_template_kwargs(template_kwargs)
    if "reasoning_effort" in body:
        template_kwargs = effort_variables(body["reasoning_effort"], template_kwargs, model.chat_format)
    params = _sampling_params(
        body, max_tokens=next(iter(limits.values()), None), logprobs=top_logprobs if logprobs else None
    )
    turn = parse_chat_turn(
        body.get("tools"),
        body.get("tool_choice"),
        body.get("parallel_tool_calls"),
        model.chat_format,
        has_format=params.structured_outputs is not None,
    )
    prompt, turn = render_chat(required("", body, "messages"), turn, model, **template_kwargs)
    return replace(_request(body, model, [prompt], turn.sampling_params(params), is_chat=True), chat=turn)


def _check_prediction(prediction: Any) -> None:
    """A guess of the answer asks for speed and for nothing else. Raises InvalidRequestError where it is malformed."""
    if prediction is None:
        return
    fields = read_object("prediction", prediction)
    check_fields("prediction", fields, ("type", "content"))
    read_choice("prediction.type", required("prediction", fields, "type"), ("content",))
    content = required("prediction", fields, "content")
    if isinstance(content, str):
        return
    for index, part in enumerate(read_list("prediction.content", content, "a string or a list of text parts")):
        path = f"prediction.content[{index}]"
        part_fields = read_object(path, part)
        check_fields(path, part_fields, ("type", "text"))
        read_choice(f"{path}.type", required(path, part_fields, "type"), ("text",))
        read_string(f"{path}.text", required(path, part_fields, "text"))


def parse_completion(body: Mapping[str, Any], model: ServedModel) -> GenerationRequest:
    """The body of `POST /v1/completions`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ModelNotFoundError: it asks for another model.
    """
    body = without_nulls(body)
    _check_names(body, {"prompt", "max_tokens", "logprobs", "echo"}, NEUTRAL_COMPLETION)
    echo = check_boolean("echo", body.get("echo", False))
    max_tokens = check_integer("max_tokens", body.get("max_tokens", 16), 0 if echo else 1, INT32_MAX)
    params = _sampling_params(body, max_tokens=max(1, max_tokens), logprobs=body.get("logprobs"), echo=echo)
    prompts = input_list("prompt", required("", body, "prompt"))
    request = _request(body, model, prompts, params, is_chat=False, is_prompt_only=max_tokens == 0)
    if request.stream and request.is_prompt_only:
        raise InvalidRequestError("with max_tokens 0 nothing comes that could be streamed", param="stream")
    return request


def _request(
    body: Mapping[str, Any],
    model: ServedModel,
    prompts: list[str | list[int]],
    params: SamplingParams,
    *,
    is_chat: bool,
    is_prompt_only: bool = False,
) -> GenerationRequest:
    stream = check_boolean("stream", body.get("stream", False))
    include_usage, continuous_usage = _usage_options(body, stream=stream)
    return GenerationRequest(
        model_name(body, model),
        prompts,
        _within_limit(params, len(prompts), model.max_output_tokens),
        is_chat,
        check_boolean("return_token_ids", body.get("return_token_ids", False)),
        is_prompt_only,
        stream,
        include_usage,
        tuple(_num_tokens(prompt, model) for prompt in prompts) if continuous_usage else (),
        priority(body),
        cache_salt(body),
    )


def _usage_options(body: Mapping[str, Any], *, stream: bool) -> tuple[bool, bool]:
    """Whether a stream tells its usage at the end, and whether with every event (which is vLLM's)."""
    options = read_object("stream_options", body.get("stream_options", {}))
    if "stream_options" in body and not stream:
        raise InvalidRequestError("stream_options needs stream: true", param="stream_options")
    own = ("include_usage", "continuous_usage_stats")
    check_fields("stream_options", options, (*own, "include_obfuscation"))
    check_neutral("stream_options.include_obfuscation", options.get("include_obfuscation", False), (False,))
    at_end, always = (check_boolean(f"stream_options.{name}", options.get(name, False)) for name in own)
    return at_end, always


def _num_tokens(prompt: str | list[int], model: ServedModel) -> int:
    if isinstance(prompt, str):
        prompt = model.tokenizer.encode(prompt, max_tokens=model.max_model_len - 1)
    return len(prompt)


def _within_limit(params: SamplingParams, num_prompts: int, max_output_tokens: int | None) -> SamplingParams:
    """`params`, unless they ask for more tokens than a request may have. Where they leave that open, the limit is
    theirs."""
    if max_output_tokens is None:
        return params
    num_sequences = num_prompts * params.num_sequences
    each = max_output_tokens // num_sequences
    if each and params.max_tokens is None:
        return replace(params, max_tokens=each)
    asked = num_sequences * (params.max_tokens or 1)
    if asked > max_output_tokens:
        name = "n" if num_prompts == 1 and params.num_sequences > 1 else "max_tokens"
        raise InvalidRequestError(
            f"{num_sequences} continuations of up to {params.max_tokens or 1} tokens make {asked}, and a request may "
            f"have {max_output_tokens} here (max_output_tokens)",
            param=name,
        )
    return params


ENDPOINTS: dict[str, Callable[[Mapping[str, Any], ServedModel], GenerationRequest]] = {
    "/v1/chat/completions": parse_chat_completion,
    "/v1/completions": parse_completion,
}


def _check_names(body: Mapping[str, Any], own: set[str], neutral: Neutral) -> None:
    check_names(body, own | SAMPLING_FIELDS | RESPONSE_FORMAT_FIELDS | _COMMON, neutral)
    metadata(body)


def _sampling_params(body: Mapping[str, Any], *, max_tokens: Any, logprobs: Any, echo: bool = False) -> SamplingParams:
    given = {name: body[name] for name in SAMPLING_FIELDS if name in body}
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"])
    return SamplingParams(
        max_tokens=max_tokens, logprobs=logprobs, echo=echo, structured_outputs=structured_outputs(body), **given
    )


def _logit_bias(biases: Any) -> dict[int, Any]:
    """By token id: JSON's keys are strings."""
    if not isinstance(biases, dict):
        raise refusal("logit_bias", biases, "an object of token ids, each with a number from -100 to 100")
    if len(biases) > MAX_LOGIT_BIASES:
        return biases  # SamplingParams refuses so many, whatever they are
    for token_id in biases:
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
            raise refusal("logit_bias", token_id, "an object whose keys are token ids, written in digits")
    if len({int(token_id) for token_id in biases}) < len(biases):
        raise InvalidRequestError("logit_bias names a token id twice", param="logit_bias")
    return {int(token_id): bias for token_id, bias in biases.items()}
