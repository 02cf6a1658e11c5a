"""Options for the fields of SamplingParams: all of them, by their names, with the values they are given."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from pellucid.cli.parser import CommandParser
from pellucid.cli.sampling_options import GROUPS, add_sampling_options
from pellucid.cli.session import sampling_params
from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams

OTHERWISE = {
    "logits_processors",  # functions
    "detokenize",  # the commands print text
    "speculative",  # --speculative turns it on, for the engine
    "structured_outputs",  # has options of its own
}
GIVEN: dict[str, tuple[list[str], Any]] = {
    "max_tokens": (["5"], 5),
    "min_tokens": (["3"], 3),
    "ignore_eos": ([], True),
    "stop": (["a", "b,c"], ("a", "b,c")),
    "stop_token_ids": (["4,5"], (4, 5)),
    "include_stop_str_in_output": ([], True),
    "temperature": (["0.5"], 0.5),
    "seed": (["18446744073709551615"], 2**64 - 1),
    "top_k": (["-1"], 0),
    "top_p": (["0.5"], 0.5),
    "min_p": (["0.25"], 0.25),
    "typical_p": (["0.5"], 0.5),
    "top_n_sigma": (["1.5"], 1.5),
    "epsilon_cutoff": (["0.5"], 0.5),
    "eta_cutoff": (["0.5"], 0.5),
    "xtc_probability": (["0.5"], 0.5),
    "xtc_threshold": (["0.5"], 0.5),
    "dynatemp_range": (["0.5"], 0.5),
    "dynatemp_exponent": (["2"], 2.0),
    "mirostat": (["2"], 2),
    "mirostat_tau": (["3"], 3.0),
    "mirostat_eta": (["0.5"], 0.5),
    "allowed_token_ids": (["7"], (7,)),
    "banned_token_ids": (["7,8"], (7, 8)),
    "bad_words": (["a b", "c"], ("a b", "c")),
    "logit_bias": (["9=-100", "3=0.5"], ((3, 0.5), (9, -100.0))),
    "repetition_penalty": (["1.5"], 1.5),
    "presence_penalty": (["-0.5"], -0.5),
    "frequency_penalty": (["-2"], -2.0),
    "no_repeat_ngram_size": (["3"], 3),
    "dry_multiplier": (["0.8"], 0.8),
    "dry_base": (["2"], 2.0),
    "dry_allowed_length": (["3"], 3),
    "dry_penalty_last_n": (["-1"], -1),
    "dry_sequence_breakers": (["\n", "."], ("\n", ".")),
    "num_beams": (["3"], 3),
    "num_beam_groups": (["1"], 1),
    "diversity_penalty": (["0"], 0.0),
    "length_penalty": (["-1.5"], -1.5),
    "early_stopping": (["never"], "never"),
    "penalty_alpha": (["0"], 0.0),
    "dola_layers": (["0,2"], (0, 2)),
    "guidance_scale": (["1"], 1.0),
    "negative_prompt": (["no"], "no"),
    "skip_special_tokens": ([], True),
    "strip": ([], True),
    "n": (["2"], 2),
    "best_of": (["3"], 3),
    "echo": ([], True),
    "logprobs": (["3"], 3),
    "logprobs_mode": (["processed"], "processed"),
    "prompt_logprobs": (["0"], 0),
}
NEEDED = {"negative_prompt": ("--guidance-scale", "2")}


def params_of(*arguments: str, **options: Any) -> SamplingParams:
    parser = CommandParser("x", "", "")
    add_sampling_options(parser, **options)
    return sampling_params(parser.parse(arguments))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_every_field_has_an_option() -> None:
    options = [option.field for group in GROUPS.values() for option in group]
    assert len(options) == len(set(options))
    assert set(options) | OTHERWISE == {field.name for field in fields(SamplingParams)}
    assert set(options) == set(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_a_value_arrives(name: str) -> None:
    texts, value = GIVEN[name]
    arguments = [argument for text in texts for argument in (flag(name), text)] or [flag(name)]
    assert getattr(params_of(*arguments, *NEEDED.get(name, ())), name) == value


def test_what_is_not_given_has_its_default() -> None:
    assert params_of() == SamplingParams(temperature=0, max_tokens=512)
    assert params_of(of_one_answer=False) == params_of()
    assert params_of("--temperature", "1").seed is not None
    assert not params_of("--no-skip-special-tokens").skip_special_tokens
    assert params_of("--early-stopping", "true", "--dola-layers", "high").early_stopping is True


@pytest.mark.parametrize("name", ["n", "best_of", "echo", "logprobs", "logprobs_mode", "prompt_logprobs"])
def test_a_conversation_has_one_answer(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"unknown option `{flag(name)}`"):
        params_of(flag(name), *GIVEN[name][0][:1], of_one_answer=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allowed-token-ids", "1,x"], "invalid token_ids value: '1,x'"),
        (["--logit-bias", "5"], "invalid logit_bias value: '5'"),
        (["--logit-bias", "5=200"], "logit_bias must be a number from -100 to 100"),
        (["--top-k", "1.5"], "invalid int value"),
        (["--top-p", "nan"], "top_p must be a number over 0 and up to 1"),
        (["--early-stopping", "maybe"], "early_stopping must be"),
        (["--dola-layers", "middle"], "invalid dola_layers value"),
        (["--logprobs-mode", "cooked"], "logprobs_mode must be"),
        (["--best-of", "2", "--n", "3"], "best_of must be at least n, 3"),
        (["--top-kk", "5"], "did you mean `--top-k`"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        params_of(*arguments)
    assert message in caught.value.message
