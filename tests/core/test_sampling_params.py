from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams

NAN, INF, HUGE = math.nan, math.inf, 10**400


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (16, 1.0, 0, 1.0, 0.0)
    assert (params.seed, params.logprobs, params.n, params.min_tokens, params.ignore_eos) == (None, None, 1, 0, False)
    assert (params.stop_strings, params.stop_token_ids, params.include_stop_str_in_output) == ((), (), False)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 2**31, 2**63, HUGE, 1.0, NAN, True, "5", [5]]),
        ("temperature", [-0.1, 1e-308, 1e5, NAN, INF, -INF, HUGE, True, "1", None, 1j]),
        ("top_k", [-2, 2**31, 2**63, HUGE, 1.5, NAN, True, None, "5"]),
        ("top_p", [0, -0.1, 1.0001, NAN, INF, HUGE, True, None]),
        ("min_p", [-0.1, 1.0001, NAN, INF, HUGE, True, None]),
        ("seed", [-1, 2**64, HUGE, 1.0, NAN, True, "1"]),
        ("logprobs", [-1, 21, 2**31, 2**63, HUGE, True, 1.0]),
        ("n", [0, -1, 129, 2**31, 2**63, HUGE, True, None, 1.0]),
        ("min_tokens", [-1, 17, 2**63, HUGE, True, None]),
        ("ignore_eos", [0, 1, None, "true"]),
        ("include_stop_str_in_output", [0, None]),
        ("skip_special_tokens", [1, None]),
        ("detokenize", [1, None]),
        ("stop", ["", ["a", ""], ["a"] * 10_000, ["a" * 2000], [1], 5, b"a", {"a": 1}, [None]]),
        ("stop_token_ids", [[-1], [2**31], [HUGE], [True], ["a"], [1.0], 5, "5", list(range(10_000))]),
    ],
)
def test_refusals_name_the_parameter(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        assert caught.value.message.startswith(name)
        assert len(caught.value.message) < 300


def test_values_are_resolved() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=0,
        top_k=-1,
        top_p=np.float32(0.5),  # type: ignore[arg-type]
        stop="end",
        stop_token_ids=iter([1, 2]),
    )
    assert type(params.max_tokens) is int
    assert params.top_k == 0
    assert params.greedy
    assert type(params.temperature) is type(params.top_p) is float
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(max_tokens=None, min_tokens=5).max_tokens is None


def test_immutable_and_hashable() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    assert hash(params) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="gradient_penalty"):
        SamplingParams(gradient_penalty=1.0)  # type: ignore[call-arg]


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mirostat", [1, 2]),
        ("repetition_penalty", [1.3, np.float32(0.5)]),
        ("dry_sequence_breakers", [None, "a", ["a", "\n"]]),
        ("logit_bias", [None, {5: -100, 3: 1}, [(3, 1.5)]]),
        ("early_stopping", [True, "never"]),
        ("dola_layers", [None, "low", "high", [3, 1]]),
    ],
)
def test_what_is_taken(name: str, values: list[Any]) -> None:
    for value in values:
        hash(SamplingParams(**{name: value}))


def test_negative_prompts_are_text_or_token_ids() -> None:
    for value in ("text", [1, 2]):
        hash(SamplingParams(guidance_scale=1.5, negative_prompt=value))


def test_mirostat_stands_alone() -> None:
    for name, value in (("top_k", 5), ("top_p", 0.5), ("xtc_probability", 0.5)):
        with pytest.raises(InvalidRequestError, match=name) as caught:
            SamplingParams(mirostat=2, **{name: value})
        assert caught.value.param == "mirostat"


def test_pairs_of_logit_bias_are_ordered_and_unique() -> None:
    assert SamplingParams(logit_bias={7: 1, 3: -0.5}).logit_bias == ((3, -0.5), (7, 1.0))
    with pytest.raises(InvalidRequestError, match="token id 3 twice"):
        SamplingParams(logit_bias=[(3, 1.0), (3, 2.0)])


CONTRASTIVE: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4, "temperature": 0}


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({**CONTRASTIVE, "temperature": 1}, "temperature", "penalty_alpha needs temperature 0"),
        ({**CONTRASTIVE, "top_k": 1}, "top_k", "at least 2 with penalty_alpha"),
        ({**CONTRASTIVE, "top_p": 0.9}, "top_p", "top_p cannot be combined with penalty_alpha"),
        ({**CONTRASTIVE, "n": 2}, "n", "n cannot be combined with penalty_alpha"),
        ({**CONTRASTIVE, "best_of": 2}, "best_of", "best_of cannot be combined with penalty_alpha"),
        ({**CONTRASTIVE, "num_beams": 2}, "num_beams", "num_beams cannot be combined with penalty_alpha"),
        ({**CONTRASTIVE, "dola_layers": "low"}, "dola_layers", "dola_layers cannot be combined with penalty_alpha"),
        (
            {**CONTRASTIVE, "guidance_scale": 2},
            "guidance_scale",
            "guidance_scale cannot be combined",
        ),
        ({**CONTRASTIVE, "logprobs": 1}, "logprobs_mode", 'set logprobs_mode to "processed"'),
        ({"guidance_scale": 2, "n": 2}, "n", "n cannot be combined with guidance_scale"),
        ({"guidance_scale": 2, "dola_layers": [0]}, "dola_layers", "cannot be combined with guidance_scale"),
        ({"negative_prompt": "no"}, "negative_prompt", "needs a guidance_scale other than 1"),
    ],
)
def test_what_searches_and_guidance_do_not_go_with_is_refused(values: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        SamplingParams(**values)
    assert error.value.param == param
