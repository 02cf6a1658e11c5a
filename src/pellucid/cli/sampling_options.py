"""The options that fill a SamplingParams: for each field, one of its name; for structured_outputs, those of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from pellucid.cli.structured_options import add_structured_output_options

DEFAULT_MAX_TOKENS = 512


class Option(NamedTuple):
    """An option for a field of SamplingParams.

    Attributes:
        field: its name; the option is the same with dashes.
        read: from text to value. bool makes a switch; a list, an option to repeat.
        metavar: what the help calls the value; None for a switch.
        help: what it does, and its default where that is not to do it.
    """

    field: str
    read: Callable[[str], Any] | type[list[Any]]
    metavar: str | None
    help: str


def token_ids(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(part) for part in text.split(",")]


def logit_bias(text: str) -> tuple[int, float]:
    """`ID=BIAS`."""
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


def dola_layers(text: str) -> str | list[int]:
    """`low`, `high`, or layers."""
    return text if text in ("low", "high") else token_ids(text)


def early_stopping(text: str) -> bool | str:
    """`true`, `false`, or `never`."""
    return {"true": True, "false": False}.get(text, text)


GROUPS: dict[str, tuple[Option, ...]] = {
    "length and end": (
        Option("max_tokens", int, "N", f"most tokens of an answer (default: {DEFAULT_MAX_TOKENS})"),
        Option("min_tokens", int, "N", "let nothing end the answer before so many tokens"),
        Option("ignore_eos", bool, None, "go on where the model would end"),
        Option("stop", list, "TEXT", "stop before this text (repeat for several)"),
        Option("stop_token_ids", token_ids, "ID,ID,...", "stop at these tokens"),
        Option("include_stop_str_in_output", bool, None, "leave what stopped the answer in it"),
    ),
    "sampling": (
        Option(
            "temperature",
            float,
            "T",
            "0 always takes the likeliest token, so the same prompt gives the same answer; 1 draws from the model's "
            "own distribution (default: 0)",
        ),
        Option("seed", int, "N", "draw the same numbers again (default: a new seed each run)"),
        Option("top_k", int, "K", "draw from the K likeliest tokens only"),
        Option("top_p", float, "P", "draw from the likeliest tokens that make up P together"),
        Option("min_p", float, "P", "leave out tokens less likely than P times the likeliest"),
        Option("typical_p", float, "P", "draw from the tokens of the most expected surprise that make up P"),
        Option("top_n_sigma", float, "N", "leave out logits more than N standard deviations below the highest"),
        Option("epsilon_cutoff", float, "P", "leave out tokens less likely than P"),
        Option("eta_cutoff", float, "P", "the same with a bound that falls where the model is unsure"),
        Option("xtc_probability", float, "P", "how often to leave out all likely tokens but the least likely of them"),
        Option("xtc_threshold", float, "P", "how likely that is (default: 0.1)"),
        Option("dynatemp_range", float, "R", "let the temperature move by so much, with the entropy"),
        Option("dynatemp_exponent", float, "E", "how it moves (default: 1)"),
        Option("mirostat", int, "1|2", "steer the surprise of the text, in place of the eight from top-k to xtc"),
        Option("mirostat_tau", float, "BITS", "to so many bits (default: 5)"),
        Option("mirostat_eta", float, "RATE", "how fast (default: 0.1)"),
    ),
    "which tokens": (
        Option("allowed_token_ids", token_ids, "ID,ID,...", "choose among these tokens only"),
        Option("banned_token_ids", token_ids, "ID,ID,...", "choose none of these tokens"),
        Option("bad_words", list, "TEXT", "do not write this text (repeat for several)"),
        Option("logit_bias", list, "ID=BIAS", "add BIAS to a token's logit, -100 to 100 (repeat for several)"),
        Option("repetition_penalty", float, "X", "divide the logits of tokens seen, the prompt's too, by X"),
        Option("presence_penalty", float, "X", "take X from the logits of tokens in the answer so far"),
        Option("frequency_penalty", float, "X", "the same, once for each time"),
        Option("no_repeat_ngram_size", int, "N", "let no N tokens come twice in the same order"),
        Option("dry_multiplier", float, "X", "penalty of prolonging a repetition; see docs/decoding.md for all of DRY"),
        Option("dry_base", float, "X", "by how much it grows with each token (default: 1.75)"),
        Option("dry_allowed_length", int, "N", "longest repetition without penalty (default: 2)"),
        Option("dry_penalty_last_n", int, "N", "tokens looked back at; -1 for all (default: -1)"),
        Option(
            "dry_sequence_breakers",
            list,
            "TEXT",
            "no repetition reaches across this text (repeat for several; default: line end, colon, quote, asterisk)",
        ),
    ),
    "search and guidance": (
        Option("num_beams", int, "N", "beam search with N beams, in place of sampling"),
        Option("num_beam_groups", int, "N", "groups of beams that differ from each other"),
        Option("diversity_penalty", float, "X", "what a token costs that another group has just chosen"),
        Option("length_penalty", float, "X", "rank beams by log-probability / length^X (default: 1)"),
        Option("early_stopping", early_stopping, "true|false|never", "when beam search may end (default: false)"),
        Option("penalty_alpha", float, "A", "contrastive search among the top-k tokens, in place of sampling"),
        Option("dola_layers", dola_layers, "low|high|N,N,...", "contrast the last layer with these (DoLa)"),
        Option("guidance_scale", float, "X", "move away from what the negative prompt would give; 1 is off"),
        Option("negative_prompt", str, "TEXT", "what to move away from (default: the prompt's last token)"),
    ),
    "text": (
        Option("skip_special_tokens", bool, None, "leave control tokens out of the text"),
        Option("strip", bool, None, "leave out white space at both ends of the text"),
    ),
    "one or several answers": (
        Option("n", int, "N", "give N answers, when all have ended"),
        Option("best_of", int, "N", "generate N answers, and give the --n likeliest of them"),
        Option("echo", bool, None, "begin with the text of the prompt"),
        Option("logprobs", int, "N", "print a token a line with its log-probability and the N likeliest alternatives"),
        Option("logprobs_mode", str, "raw|processed", "of the model's own distribution, or of the one drawn from"),
        Option("prompt_logprobs", int, "N", "with --json, the same for the tokens of the prompt"),
    ),
}
"""Every field that an option can give, by the heading that it has in the help."""

OF_ONE_ANSWER = "one or several answers"
"""The group that a conversation has no use for."""

ON_UNLESS_SWITCHED_OFF = frozenset(("skip_special_tokens",))
DEFAULTS = {"temperature": 0.0}
_ENTRIES: dict[str, Callable[[str], Any]] = {"logit_bias": logit_bias}


def add_sampling_options(parser: argparse.ArgumentParser, *, of_one_answer: bool = True) -> None:
    """Options that fill a SamplingParams; one that is not given is None.

    Args:
        of_one_answer: with those that ask for several answers, or for more than the text of one.
    """
    for heading, options in GROUPS.items():
        if heading != OF_ONE_ANSWER or of_one_answer:
            group = parser.add_argument_group(heading)
            for option in options:
                _add(group, option)
    add_structured_output_options(parser)


def given_params(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that options were given for."""
    names = (option.field for options in GROUPS.values() for option in options)
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    flag = "--" + option.field.replace("_", "-")
    if option.field in ON_UNLESS_SWITCHED_OFF:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"{option.help} (default: yes)")
    elif option.read is bool:
        group.add_argument(flag, action="store_true", default=None, help=option.help)
    elif option.read is list:
        read = _ENTRIES.get(option.field, str)
        group.add_argument(flag, action="append", type=read, metavar=option.metavar, help=option.help)
    else:
        default = DEFAULTS.get(option.field)
        group.add_argument(flag, type=option.read, default=default, metavar=option.metavar, help=option.help)
