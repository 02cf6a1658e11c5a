from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams

NAN, INF, HUGE = math.nan, math.inf, 10**400
INT32_MAX = 2**31 - 1
FIELDS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
NOT_NUMBERS = ("5", b"5", [5], {5: 5}, {5}, 1j, object())


def real(low: float, high: float, *, above: bool = False) -> tuple[list[Any], list[str]]:
    """Values that a number from `low` (or above it) to `high` cannot be, and what the refusal tells of the range."""
    beyond = [low - 0.001, math.nextafter(low, -INF), math.nextafter(high, INF), 2 * high + 1, -1e308, 1e308]
    values = [*beyond, NAN, INF, -INF, HUGE, -HUGE, True, False, None, *NOT_NUMBERS]
    return [*values, low, low + 1e-308] if above else values, [f"{low:g}", f"{high:g}"]


def integer(low: int, high: int, *, optional: bool = False, shown: Sequence[str] = ()) -> tuple[list[Any], list[str]]:
    """The same for an integer; `optional` ones may be None."""
    beyond = [low - 1, low - 1000, high + 1, high + 2**63, 2**64, -(2**63), HUGE, -HUGE]
    values = [*beyond, 1.0, 0.5, NAN, INF, -INF, True, False]
    return [*values, *NOT_NUMBERS, *([] if optional else [None])], list(shown or (str(low), str(high)))


def boolean() -> tuple[list[Any], list[str]]:
    return [0, 1, 2, -1, HUGE, 0.0, 1.0, NAN, None, *NOT_NUMBERS, "", "true"], ["true or false"]


def strings(count: int, characters: int) -> tuple[list[Any], list[str]]:
    too_many = [str(number) for number in range(count + 1)]
    values = [
        "",
        [""],
        ["a", ""],
        too_many,
        "a" * (characters + 1),
        ["a", None],
        [1],
        [b"a"],
        [NAN],
        0,
        5,
        1.5,
        NAN,
        HUGE,
    ]
    return [*values, True, False, b"a", b"", {"a": 1}, {}], [str(count), str(characters)]


def token_ids(count: int) -> tuple[list[Any], list[str]]:
    of_each = [[-1], [2**31], [2**63], [HUGE], [True], ["a"], [1.0], [NAN], [INF], [None], [[1]], [1, -1]]
    return [*of_each, range(count + 1), 0, 5, 1.5, NAN, HUGE, True, False, "5", "", b"5", b"", {5: 5}, {}], [f"{count}"]


REFUSED: dict[str, tuple[list[Any], list[str]]] = {
    "max_tokens": integer(1, INT32_MAX, optional=True),
    "temperature": ([*real(0, 1e4)[0], 1e-5, 1e-308], ["0", "0.0001", "10000"]),
    "top_k": integer(-1, INT32_MAX),
    "top_p": real(0, 1, above=True),
    "min_p": real(0, 1),
    "seed": integer(0, 2**64 - 1, optional=True, shown=("0", "2^64 - 1")),
    "ignore_eos": boolean(),
    "stop": strings(64, 1024),
    "stop_token_ids": token_ids(1024),
    "include_stop_str_in_output": boolean(),
    "logprobs": integer(0, 20, optional=True),
    "n": integer(1, 128),
    "min_tokens": integer(0, INT32_MAX),
    "skip_special_tokens": boolean(),
    "detokenize": boolean(),
    "dynatemp_range": real(0, 1e4),
    "dynatemp_exponent": real(0, 100, above=True),
    "top_n_sigma": real(0, 1000),
    "typical_p": real(0, 1, above=True),
    "epsilon_cutoff": real(0, 0.9),
    "eta_cutoff": real(0, 0.9),
    "xtc_probability": real(0, 1),
    "xtc_threshold": real(0, 1),
    "mirostat": integer(0, 2),
    "mirostat_tau": real(0, 100, above=True),
    "mirostat_eta": real(0, 1, above=True),
    "allowed_token_ids": token_ids(2**20),
    "banned_token_ids": token_ids(2**20),
    "bad_words": strings(1024, 1024),
    "structured_outputs": (
        [0, 1, NAN, True, False, "", "{}", b"{}", {}, {"json": {}}, [], HUGE],
        ["StructuredOutputs"],
    ),
    "repetition_penalty": real(0, 100, above=True),
    "presence_penalty": real(-2, 2),
    "frequency_penalty": real(-2, 2),
    "dry_multiplier": real(0, 100),
    "dry_base": real(1, 10),
    "dry_allowed_length": integer(1, INT32_MAX),
    "dry_penalty_last_n": integer(-1, INT32_MAX),
    "dry_sequence_breakers": strings(64, 1024),
    "no_repeat_ngram_size": integer(0, INT32_MAX),
    "logit_bias": (
        [{1: value} for value in real(-100, 100)[0]]
        + [{key: 1.0} for key in (-1, 2**31, HUGE, True, 1.0, NAN, "1", None)]
        + [
            [(1, 2, 3)],
            [1],
            [(1,)],
            ["ab"],
            dict.fromkeys(range(4097), 1),
            0,
            5,
            1.5,
            NAN,
            HUGE,
            True,
            False,
            "",
            "5",
            b"5",
        ],
        ["-100", "100"],
    ),
    "logits_processors": (
        [[1], ["a"], [None], [len, 5], [len] * 17, 0, 5, NAN, True, False, "", "len", b"", {}, {"a": len}],
        ["16 functions"],
    ),
    "logprobs_mode": (["", "RAW", "raw ", 0, 1, NAN, True, None, [], b"raw", HUGE], ['"raw" or "processed"']),
    "prompt_logprobs": integer(0, 20, optional=True),
    "best_of": integer(1, 128, optional=True),
    "echo": boolean(),
    "strip": boolean(),
    "num_beams": integer(1, 128),
    "num_beam_groups": integer(1, 128),
    "diversity_penalty": real(0, 100),
    "length_penalty": real(-10, 10),
    "early_stopping": ([0, 1, NAN, None, "", "always", b"never", [], HUGE], ['"never"']),
    "penalty_alpha": real(0, 1),
    "dola_layers": (
        [
            "",
            "middle",
            b"low",
            [],
            [-1],
            [HUGE],
            [True],
            [1.0],
            ["low"],
            range(1025),
            0,
            5,
            NAN,
            True,
            False,
            {},
            {1: 2},
        ],
        ['"low", "high"'],
    ),
    "guidance_scale": real(0, 100),
    "negative_prompt": (
        [[-1], [HUGE], [True], [1.0], [NAN], ["a"], range(2**20 + 1), 0, 5, NAN, True, False, b"a", {}, {1: 2}],
        [f"{2**20}"],
    ),
    "speculative": boolean(),
}
"""For every field: values that it cannot have, and what the refusal says of its range."""


def test_every_field_has_its_row() -> None:
    assert set(REFUSED) == set(FIELDS)


def test_every_field_is_documented() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    table = docs[docs.index("## SamplingParams") : docs.index("## RequestOutput")]
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert documented == set(FIELDS)
    described = re.findall(r"^        (\w+): ", SamplingParams.__doc__ or "", re.MULTILINE)
    assert sorted(described) == sorted([*FIELDS, "InvalidRequestError"])


@pytest.mark.parametrize("name", FIELDS)
def test_refusals_name_the_parameter_and_its_range(name: str) -> None:
    values, range_texts = REFUSED[name]
    messages = []
    for value in values:
        error = refusal(**{name: value})
        assert error.param == name, error
        assert error.message.startswith(name)
        assert len(error.message) < 300
        messages.append(error.message)
    for text in range_texts:
        assert any(text in message for message in messages), text


def refusal(**params: Any) -> InvalidRequestError:
    try:
        SamplingParams(**params)
    except InvalidRequestError as error:
        return error
    raise AssertionError(f"{str(params)[:100]} was taken")


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"stop": "a", "detokenize": False}, "stop"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"structured_outputs": StructuredOutputsParams(regex="a"), "ignore_eos": True}, "ignore_eos"),
        ({"mirostat": 1, "top_n_sigma": 1}, "mirostat"),
        ({"mirostat": 2, "top_k": 5}, "mirostat"),
        ({"mirostat": 1, "top_p": 0.5}, "mirostat"),
        ({"mirostat": 1, "min_p": 0.5}, "mirostat"),
        ({"mirostat": 2, "typical_p": 0.5}, "mirostat"),
        ({"mirostat": 1, "epsilon_cutoff": 0.5}, "mirostat"),
        ({"mirostat": 2, "eta_cutoff": 0.5}, "mirostat"),
        ({"mirostat": 1, "xtc_probability": 0.5}, "mirostat"),
        ({"penalty_alpha": 0.5, "temperature": 1.0, "top_k": 4}, "temperature"),
        ({"penalty_alpha": 0.5, "temperature": 0, "top_k": 1}, "top_k"),
        ({"penalty_alpha": 0.5, "temperature": 0, "top_k": 4, "top_p": 0.5}, "top_p"),
        ({"penalty_alpha": 0.5, "temperature": 0, "top_k": 4, "n": 2}, "n"),
        ({"penalty_alpha": 0.5, "temperature": 0, "top_k": 4, "logprobs": 1}, "logprobs_mode"),
        ({"guidance_scale": 2, "n": 2}, "n"),
        ({"guidance_scale": 2, "best_of": 2}, "best_of"),
        ({"guidance_scale": 2, "dola_layers": "low"}, "dola_layers"),
        ({"negative_prompt": "a"}, "negative_prompt"),
    ],
)
def test_what_contradicts_each_other_is_refused(params: dict[str, Any], param: str) -> None:
    error = refusal(**params)
    assert error.param == param
    assert param in error.message
    others = params.keys() - {param}
    assert not others or any(name in error.message for name in others)


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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mirostat", [1, 2]),
        ("repetition_penalty", [1.3, np.float32(0.5)]),
        ("dry_sequence_breakers", [None, "a", ["a", "\n"]]),
        ("logit_bias", [None, {5: -100, 3: 1}, [(3, 1.5)]]),
        ("dola_layers", [None, "low", "high", [3, 1]]),
    ],
)
def test_what_is_taken(name: str, values: list[Any]) -> None:
    for value in values:
        hash(SamplingParams(**{name: value}))


def test_negative_prompts_are_text_or_token_ids() -> None:
    for value in ("text", [1, 2]):
        hash(SamplingParams(guidance_scale=1.5, negative_prompt=value))


def test_beams() -> None:
    for options in ({"early_stopping": True}, {"early_stopping": "never", "length_penalty": -1, "n": 4}):
        hash(SamplingParams(temperature=0, num_beams=4, **options))  # type: ignore[arg-type]
    SamplingParams(temperature=0, num_beams=6, num_beam_groups=3, diversity_penalty=0.5)
    SamplingParams(temperature=0, num_beams=2, logprobs=1, logprobs_mode="processed")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"num_beams": 2, "temperature": 1.0}, "temperature", "0 with num_beams"),
        ({"num_beams": 2, "n": 3}, "n", "at most num_beams, 2"),
        ({"num_beams": 2, "best_of": 2}, "best_of", "cannot be combined with num_beams"),
        ({"num_beams": 2, "penalty_alpha": 0.6, "top_k": 4}, "num_beams", "cannot be combined with penalty_alpha"),
        ({"num_beams": 2, "guidance_scale": 1.5}, "num_beams", "cannot be combined with guidance_scale"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups", "a divisor of num_beams"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty", "above 0 where num_beam_groups"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "diversity_penalty", "above 0 where num_beam_groups"),
        ({"num_beams": 4, "logprobs": 1}, "logprobs_mode", '"processed" with num_beams'),
        ({"num_beam_groups": 2}, "num_beam_groups", "a divisor of num_beams, 1"),
        ({"diversity_penalty": 2.0}, "diversity_penalty", "above 0 where num_beam_groups"),
        ({"num_beams": 4, "early_stopping": "always"}, "early_stopping", 'true, false or "never"'),
    ],
)
def test_beams_are_refused(options: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(**{"temperature": 0, **options})
    assert caught.value.param == param


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
