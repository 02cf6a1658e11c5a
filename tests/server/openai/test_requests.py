"""Bodies of the OpenAI API: what is taken, and that nothing is ignored."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, ModelNotFoundError
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai import requests
from pellucid.server.openai.requests import parse_chat_completion, parse_completion
from tests.support.served_models import served_model

MODEL = served_model()
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**body: Any) -> requests.GenerationRequest:
    return parse_chat_completion({"model": "m", "messages": MESSAGES, **body}, MODEL)


def completion(**body: Any) -> requests.GenerationRequest:
    return parse_completion({"model": "m", "prompt": "hi", **body}, MODEL)


EITHER = pytest.mark.parametrize("parse", [chat, completion])


def test_the_least_bodies() -> None:
    request = chat()
    assert request.prompts == [MODEL.tokenizer.apply_chat_template(MESSAGES)]
    assert request.sampling_params == SamplingParams(max_tokens=None)
    assert (request.model, request.is_chat, request.return_token_ids) == ("m", True, False)
    request = completion()
    assert request.prompts == ["hi"]
    assert request.sampling_params == SamplingParams(max_tokens=16)
    assert not request.is_chat


VALUES: dict[str, Any] = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 7,
    "ignore_eos": True,
    "stop": ["a", "b"],
    "stop_token_ids": [4],
    "include_stop_str_in_output": True,
    "n": 2,
    "min_tokens": 1,
    "skip_special_tokens": False,
    "detokenize": True,
    "dynatemp_range": 0.2,
    "dynatemp_exponent": 2,
    "top_n_sigma": 1.5,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "mirostat": 0,
    "mirostat_tau": 3,
    "mirostat_eta": 0.2,
    "allowed_token_ids": [1, 2],
    "banned_token_ids": [2],
    "bad_words": ["a"],
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "dry_multiplier": 0.8,
    "dry_base": 2,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": 64,
    "dry_sequence_breakers": [","],
    "no_repeat_ngram_size": 3,
    "logit_bias": {"5": 1, "7": -100},
    "logprobs_mode": "processed",
    "prompt_logprobs": 1,
    "best_of": 3,
    "strip": True,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "length_penalty": 2,
    "early_stopping": "never",
    "penalty_alpha": 0,
    "dola_layers": "low",
    "guidance_scale": 1,
    "negative_prompt": None,
    "speculative": False,
}


@EITHER
def test_every_sampling_parameter_can_be_given(parse: Any) -> None:
    others = {"logprobs", "echo", "structured_outputs", "logits_processors"}  # which are tested by themselves
    assert {*VALUES, *others} == {field.name for field in fields(SamplingParams)}
    expected = SamplingParams(**VALUES | {"logit_bias": {5: 1, 7: -100}})
    assert parse(**VALUES).sampling_params == expected
    assert parse(stop="a").sampling_params.stop == ("a",)


def test_the_prompt_alone() -> None:
    request = completion(echo=True, max_tokens=0, logprobs=1)
    assert request.is_prompt_only
    assert request.sampling_params == SamplingParams(max_tokens=1, echo=True, logprobs=1)
    request = completion(echo=True, max_tokens=1)
    assert not request.is_prompt_only
    assert request.sampling_params.echo


def test_log_probabilities() -> None:
    assert completion(logprobs=3).sampling_params.logprobs == 3
    assert chat(logprobs=True).sampling_params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling_params.logprobs == 4
    assert chat(logprobs=False, top_logprobs=0).sampling_params.logprobs is None


def test_the_limit_of_a_chat_has_two_names() -> None:
    for body in ({"max_tokens": 9}, {"max_completion_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 9}):
        assert chat(**body).sampling_params.max_tokens == 9


def test_prompts() -> None:
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[[1], "b"]).prompts == [[1], "b"]


@EITHER
def test_null_is_as_good_as_nothing(parse: Any) -> None:
    names = [*requests.SAMPLING_FIELDS, *requests._NEUTRAL, "max_tokens", "logprobs", "user"]
    assert parse(**dict.fromkeys(names)) == parse()


@EITHER
def test_values_that_ask_for_nothing_are_taken(parse: Any) -> None:
    table = requests.NEUTRAL_CHAT if parse is chat else requests.NEUTRAL_COMPLETION
    for name, values in table.items():
        for value in values:
            assert parse(**{name: value}) == parse(), name
    assert parse(user="me", metadata={"a": "b"}) == parse()
    assert parse(frequency_penalty=0.0, logit_bias={}, best_of=None) == parse()


def test_what_asks_for_speed_or_money_alone_is_taken() -> None:
    parts = [{"type": "text", "text": "a"}]
    for body in (
        {"prediction": {"type": "content", "content": "hello"}},
        {"prediction": {"type": "content", "content": parts}},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
        {"prompt_cache_options": {}},
    ):
        assert chat(**body) == chat()


@EITHER
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stream", 0, "stream must be"),
        ("stream_options", {}, "needs stream"),
        ("priority", 2**31, "priority must be"),
        ("cache_salt", 5, "cache_salt must be"),
        ("metadata", {"a": 1}, "metadata must be"),
        ("frequency_penalty", 2.5, "frequency_penalty must be"),
        ("frequency_penalty", False, "frequency_penalty must be"),
        ("logit_bias", {"-5": 1}, "written in digits"),
        ("logit_bias", {"5.0": 1}, "written in digits"),
        ("logit_bias", {"": 1}, "written in digits"),
        ("logit_bias", {"\u0665": 1}, "written in digits"),
        ("logit_bias", {"1" * 5000: 1}, "written in digits"),
        ("logit_bias", {"5": 1, "05": 2}, "twice"),
        ("logit_bias", {"5": 101}, "logit_bias must be"),
        ("logit_bias", {"5": "1"}, "logit_bias must be"),
        ("logit_bias", [[5, 1]], "logit_bias must be"),
        ("logit_bias", 5, "logit_bias must be"),
        ("logits_processors", ["len"], "not a parameter"),
        ("best_of", 129, "best_of must be"),
        ("prompt_logprobs", 21, "prompt_logprobs must be"),
        ("dola_layers", "middle", "dola_layers must be"),
        ("speculative", 1, "speculative must be"),
        ("temprature", 1, "did you mean temperature?"),
        ("xyzzy", 1, "not a parameter"),
        ("user", 5, "a string"),
        ("temperature", 1e-308, "temperature must be"),
        ("temperature", "hot", "temperature must be"),
        ("top_p", 0, "top_p must be"),
        ("top_k", 2**63, "top_k must be"),
        ("n", 10**400, "n must be"),
        ("n", 0, "n must be"),
        ("seed", -1, "seed must be"),
        ("max_tokens", 0, "max_tokens must be"),
        ("stop", 5, "stop must be"),
        ("stop", [""], "stop must be"),
        ("stop_token_ids", [-1], "stop_token_ids"),
        ("ignore_eos", 1, "ignore_eos must be"),
        ("return_token_ids", "yes", "return_token_ids must be"),
        ("model", 5, "model must be"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(parse: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message.replace("?", r"\?")) as caught:
        parse(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"prediction": "hello"}, "prediction"),
        ({"prediction": {"type": "text", "content": "a"}}, "prediction.type"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content"),
        ({"prediction": {"type": "content", "content": [{"type": "image"}]}}, "prediction.content[0].type"),
        ({"prediction": {"type": "content", "content": "a", "x": 1}}, "prediction.x"),
        ({"prompt_cache_options": {"ttl": "1h"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"x": 1}}, "prompt_cache_options.x"),
        ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"store": True}, "store"),
        ({"prompt": "x"}, "prompt"),
        ({"echo": False}, "echo"),
    ],
)
def test_what_a_chat_refuses(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"messages": MESSAGES}, "messages"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)
def test_what_a_completion_refuses(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**body)
    assert caught.value.param == param


def test_the_model_goes_by_its_names() -> None:
    model = served_model("a", "b")
    assert parse_completion({"model": "b", "prompt": "hi"}, model).model == "b"
    assert parse_completion({"prompt": "hi"}, model).model == "a"
    with pytest.raises(ModelNotFoundError, match="a, b") as error:
        parse_completion({"model": "c", "prompt": "hi"}, model)
    assert error.value.param == "model"


@pytest.mark.parametrize("parse", [chat, completion])
def test_streams(parse: Any) -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    assert (request.stream, request.include_usage, request.usage_so_far) == (True, True, ())
    assert not parse().stream
    request = parse(stream=True, stream_options={"include_usage": False, "continuous_usage_stats": True})
    assert not request.include_usage
    assert request.usage_so_far == tuple(
        len(MODEL.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in request.prompts
    )
    for name, value in (("x", 1), ("include_usage", 1), ("continuous_usage_stats", 1), ("include_obfuscation", True)):
        with pytest.raises(InvalidRequestError) as error:
            parse(stream=True, stream_options={name: value})
        assert error.value.param == f"stream_options.{name}"


def test_the_tokens_of_a_request_are_limited() -> None:
    model = served_model(max_output_tokens=100)

    def parsed(**body: Any) -> requests.GenerationRequest:
        return parse_completion({"prompt": "hi", **body}, model)

    assert parsed(n=5, max_tokens=20).sampling_params.max_tokens == 20
    for body, param in (
        ({"max_tokens": 101}, "max_tokens"),
        ({"n": 5, "max_tokens": 21}, "n"),
        ({"prompt": ["a", "b"], "max_tokens": 51}, "max_tokens"),
    ):
        with pytest.raises(InvalidRequestError, match="100 here") as error:
            parsed(**body)
        assert error.value.param == param
    messages = {"messages": MESSAGES}
    assert parse_chat_completion(messages, model).sampling_params.max_tokens == 100
    assert parse_chat_completion({**messages, "n": 3}, model).sampling_params.max_tokens == 33
