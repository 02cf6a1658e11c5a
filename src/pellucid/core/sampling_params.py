"""What a request asks of the decoder. Names and meanings follow vLLM, transformers or llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.core.validation import (
    INT32_MAX,
    UINT64_MAX,
    RealRange,
    check_boolean,
    check_integer,
    check_strings,
    check_token_ids,
    refusal,
    shown,
)

LogitsProcessor: TypeAlias = Callable[[list[int], NDArray[np.float32]], NDArray[np.float32]]
"""Gets the tokens generated so far and the logits, float32 [vocab_size], which it may change; returns such logits."""

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_LOGIT_BIASES = 4096
MAX_LISTED_TOKEN_IDS = 1 << 20
MAX_LOGITS_PROCESSORS = 16
MAX_DOLA_LAYERS = 1024
MIN_TEMPERATURE = 1e-4
MAX_TEMPERATURE = 1e4

REALS = {
    "dynatemp_range": RealRange(0, MAX_TEMPERATURE),
    "dynatemp_exponent": RealRange(0, 100, open=True),
    "top_p": RealRange(0, 1, open=True),
    "min_p": RealRange(0, 1),
    "typical_p": RealRange(0, 1, open=True),
    "top_n_sigma": RealRange(0, 1000),
    "epsilon_cutoff": RealRange(0, 0.9),
    "eta_cutoff": RealRange(0, 0.9),
    "xtc_probability": RealRange(0, 1),
    "xtc_threshold": RealRange(0, 1),
    "mirostat_tau": RealRange(0, 100, open=True),
    "mirostat_eta": RealRange(0, 1, open=True),
    "repetition_penalty": RealRange(0, 100, open=True),
    "presence_penalty": RealRange(-2, 2),
    "frequency_penalty": RealRange(-2, 2),
    "dry_multiplier": RealRange(0, 100),
    "dry_base": RealRange(1, 10),
    "length_penalty": RealRange(-10, 10),
    "diversity_penalty": RealRange(0, 100),
    "penalty_alpha": RealRange(0, 1),
    "guidance_scale": RealRange(0, 100),
}
INTEGERS = {
    "mirostat": (0, 2),
    "dry_allowed_length": (1, INT32_MAX),
    "dry_penalty_last_n": (-1, INT32_MAX),
    "no_repeat_ngram_size": (0, INT32_MAX),
    "min_tokens": (0, INT32_MAX),
    "n": (1, MAX_N),
    "num_beams": (1, MAX_N),
    "num_beam_groups": (1, MAX_N),
}
OPTIONAL_INTEGERS = {
    "max_tokens": (1, INT32_MAX),
    "seed": (0, UINT64_MAX),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "best_of": (1, MAX_N),
}
"""Those that may be None."""
BOOLEANS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
    "echo",
    "strip",
    "speculative",
)
STRINGS = {"stop": MAX_STOP_STRINGS, "bad_words": MAX_BAD_WORDS, "dry_sequence_breakers": MAX_STOP_STRINGS}
"""Most strings of each, each string of up to MAX_STOP_CHARACTERS."""
TOKEN_IDS = {
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "banned_token_ids": MAX_LISTED_TOKEN_IDS,
    "allowed_token_ids": MAX_LISTED_TOKEN_IDS,
}
"""Most token ids of each."""
_TEMPERATURE_RANGE = f"0 (greedy) or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue one prompt. Immutable, checked when made. docs/decoding.md has the order of the transforms, their
    formulas and papers.

    Length and end:
        max_tokens: the most tokens to generate; None generates until the context is full.
        min_tokens: no end-of-sequence or stop token may be chosen, and no stop string ends the text, before this many
            tokens.
        ignore_eos: go on past the model's end-of-sequence tokens.
        stop: strings that end the text; the text returned ends before the first one found.
        stop_token_ids: token ids that end the text.
        include_stop_str_in_output: leave the stop string, or the text of the token that stopped, in the text.

    Randomness:
        temperature: divides the logits; 0 is greedy (the highest logit, the lowest id on a tie).
        dynatemp_range: the temperature moves with the entropy of the distribution, from `temperature - dynatemp_range`
            to `temperature + dynatemp_range`; 0 leaves it fixed.
        dynatemp_exponent: how it moves between the two.
        seed: the same seed draws the same tokens whatever else runs; None takes one from the LLM's seed.

    Which tokens may be drawn:
        top_n_sigma: drop logits more than `top_n_sigma` standard deviations below the highest; 0 keeps all.
        top_k: keep the `top_k` most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to `top_p` (Holtzman et al., 2020).
        min_p: drop tokens less probable than `min_p` times the most probable one (Nguyen et al., 2024).
        typical_p: keep the tokens nearest to the expected surprise whose probabilities sum to `typical_p` (Meister et
            al., 2023).
        epsilon_cutoff: drop tokens less probable than this; 0 keeps all (Hewitt et al., 2022).
        eta_cutoff: drop tokens less probable than a bound that falls with the entropy; 0 keeps all (Hewitt et al.,
            2022).
        xtc_probability: how often to drop all but the least probable of the tokens above `xtc_threshold`; 0 never.
        xtc_threshold: a probability.
        mirostat: 1 or 2 steers the surprise of the text to `mirostat_tau`, in place of the eight above (Basu et al.,
            2021); 0 is off.
        mirostat_tau: bits of surprise.
        mirostat_eta: how fast it steers.
        allowed_token_ids: none but these may be chosen; None for all.
        banned_token_ids: these may not.
        bad_words: strings that may not be written.
        structured_outputs: a grammar that the answer follows.

    Penalties:
        repetition_penalty: divides positive and multiplies negative logits of every token seen, in the prompt too
            (Keskar et al., 2019); 1 is off.
        presence_penalty: is subtracted from the logit of every token generated before.
        frequency_penalty: is subtracted once for each time that a token was generated before.
        dry_multiplier: penalty of a token that would prolong a repetition, growing with its length; 0 is off.
        dry_base: by how much it grows with each token.
        dry_allowed_length: longest repetition without penalty.
        dry_penalty_last_n: tokens looked back at; -1 for all, 0 for none.
        dry_sequence_breakers: strings that no repetition reaches across.
        no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 is off.
        logit_bias: what is added to the logits of tokens, by id.
        logits_processors: functions that change the logits before all else.

    What is reported:
        logprobs: for each token report its log-probability and the `logprobs` most probable tokens; None for none.
        logprobs_mode: "raw" for those of the model's own distribution, before any transform; "processed" for those of
            the distribution that was drawn from.
        prompt_logprobs: as `logprobs`, for each token of the prompt after the first, always raw; None for none.
        n: how many continuations of the prompt to return; each draws its own numbers.
        best_of: how many to generate, of which the `n` with the highest mean log-probability a token are returned, the
            best first; None for `n`. More than `n` cannot be streamed.
        skip_special_tokens: leave control tokens out of the text.
        detokenize: turn tokens into text; without it, `text` is empty.
        echo: begin the text, the token ids and the log-probabilities with the prompt's.
        strip: leave out white space at both ends of the text.

    Search, each in place of sampling:
        num_beams: beam search with so many beams; 1 is off. Needs temperature 0.
        num_beam_groups: groups of beams that differ from each other (Vijayakumar et al., 2016).
        diversity_penalty: what a token costs that another group has chosen at the same step.
        length_penalty: beams are ranked by log-probability / length^length_penalty.
        early_stopping: True ends when `num_beams` are complete; False when no better one is likely; "never" when none
            is possible.
        penalty_alpha: contrastive search among the `top_k` most probable tokens; 0 is off (Su et al., 2022).

    Guidance, of the logits themselves:
        dola_layers: contrast the last layer with earlier ones, "low", "high" or a list of layers (Chuang et al., 2023).
        guidance_scale: how far to move from what `negative_prompt` would give (Sanchez et al., 2023); 1 is off.
        negative_prompt: text or token ids; None is the last token of the prompt.

    Speed:
        speculative: let the engine guess ahead where it is set up to, which never changes a token.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of range, or two contradict; `param` names it.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    skip_special_tokens: bool = True
    detokenize: bool = True
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    allowed_token_ids: Iterable[int] | None = None
    banned_token_ids: Iterable[int] | None = ()
    bad_words: str | Iterable[str] | None = ()
    structured_outputs: StructuredOutputsParams | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: str | Iterable[str] | None = ("\n", ":", '"', "*")
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = ()
    logits_processors: Iterable[LogitsProcessor] | None = ()
    logprobs_mode: Literal["raw", "processed"] = "raw"
    prompt_logprobs: int | None = None
    best_of: int | None = None
    echo: bool = False
    strip: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    penalty_alpha: float = 0.0
    dola_layers: Literal["low", "high"] | Iterable[int] | None = None
    guidance_scale: float = 1.0
    negative_prompt: str | Iterable[int] | None = None
    speculative: bool = True

    def __post_init__(self) -> None:
        for name, reals in REALS.items():
            if (value := getattr(self, name)) is not _DEFAULTS[name]:
                self._set(name, reals.check(name, value))
        for name, (low, high) in INTEGERS.items():
            if (value := getattr(self, name)) is not _DEFAULTS[name]:
                self._set(name, check_integer(name, value, low, high))
        for name in BOOLEANS:
            check_boolean(name, getattr(self, name))
        temperature = RealRange(0, MAX_TEMPERATURE).check("temperature", self.temperature)
        if 0 < temperature < MIN_TEMPERATURE:
            raise refusal("temperature", self.temperature, _TEMPERATURE_RANGE)
        self._set("temperature", temperature)
        top_k_range = f"0 or -1 (keep all) or an integer up to {INT32_MAX}"
        self._set("top_k", max(0, check_integer("top_k", self.top_k, -1, INT32_MAX, top_k_range)))
        for name, (low, high) in OPTIONAL_INTEGERS.items():
            if (value := getattr(self, name)) is not None:
                range_text = f"None or an integer from {low} to {'2^64 - 1' if high == UINT64_MAX else high}"
                self._set(name, check_integer(name, value, low, high, range_text))
        for name, most in STRINGS.items():
            self._set(name, check_strings(name, getattr(self, name), most, MAX_STOP_CHARACTERS))
        for name, most in TOKEN_IDS.items():
            if (token_ids := getattr(self, name)) is not None:
                self._set(name, check_token_ids(name, token_ids, most))
            elif name != "allowed_token_ids":
                self._set(name, ())
        if self.allowed_token_ids == ():
            raise InvalidRequestError("allowed_token_ids is empty: no token could follow", param="allowed_token_ids")
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._set("logits_processors", _logits_processors(self.logits_processors))
        if self.logprobs_mode not in ("raw", "processed"):
            raise refusal("logprobs_mode", self.logprobs_mode, '"raw" or "processed"')
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise refusal("early_stopping", self.early_stopping, 'true, false or "never"')
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise refusal("structured_outputs", self.structured_outputs, "a StructuredOutputsParams")
        self._set("dola_layers", _dola_layers(self.dola_layers))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            negative = check_token_ids("negative_prompt", self.negative_prompt, MAX_LISTED_TOKEN_IDS)
            self._set("negative_prompt", negative)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse values that contradict each other."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise refusal("best_of", self.best_of, f"at least n, {self.n}")
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop needs text to look at: leave detokenize true", param="stop")
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequestError(
                "structured_outputs ends an answer with an end-of-sequence token: leave ignore_eos false",
                param="ignore_eos",
            )
        self._check_beams()
        if self.mirostat:
            for name in _REPLACED_BY_MIROSTAT:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise InvalidRequestError(
                        f"mirostat chooses which tokens are kept, and so does {name}: leave {name} at "
                        f"{_DEFAULTS[name]:g}, or mirostat at 0",
                        param="mirostat",
                    )

        self._check_contrast()

    def _check_contrast(self) -> None:
        """Refuse what contrastive search, DoLa and guidance cannot be combined with, or do not look at."""
        if self.penalty_alpha:
            if self.temperature != 0:
                raise InvalidRequestError("penalty_alpha needs temperature 0: nothing is drawn", param="temperature")
            if self.top_k < 2:
                raise refusal("top_k", self.top_k, "at least 2 with penalty_alpha: the number of candidates")
            self._refuse("penalty_alpha", (*_TRUNCATIONS, "n", "best_of", "num_beams", "dola_layers", "guidance_scale"))
            if self.logprobs is not None and self.logprobs_mode != "processed":
                raise InvalidRequestError(
                    "with penalty_alpha, logprobs are those of the distribution that the candidates are taken from: "
                    'set logprobs_mode to "processed"',
                    param="logprobs_mode",
                )
        if self.guidance_scale != 1:
            self._refuse("guidance_scale", ("n", "best_of", "num_beams", "dola_layers"))
        elif self.negative_prompt is not None:
            raise InvalidRequestError("negative_prompt needs a guidance_scale other than 1", param="negative_prompt")

    def _refuse(self, name: str, others: Iterable[str]) -> None:
        """Refuse any of `others`, none of which goes together with `name`."""
        for other in others:
            if getattr(self, other) != _DEFAULTS[other]:
                raise InvalidRequestError(f"{other} cannot be combined with {name}", param=other)

    def _check_beams(self) -> None:
        """Refuse what beam search cannot be combined with."""
        if self.num_beams % self.num_beam_groups:
            raise refusal("num_beam_groups", self.num_beam_groups, f"a divisor of num_beams, {self.num_beams}")
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0):
            raise refusal(
                "diversity_penalty", self.diversity_penalty, "above 0 where num_beam_groups is above 1, and 0 elsewhere"
            )
        if self.num_beams == 1:
            return
        if self.temperature != 0:
            raise refusal("temperature", self.temperature, "0 with num_beams: a beam search draws nothing")
        if self.n > self.num_beams:
            raise refusal("n", self.n, f"at most num_beams, {self.num_beams}")
        self._refuse("num_beams", ("best_of",))
        if self.logprobs is not None and self.logprobs_mode != "processed":
            raise refusal("logprobs_mode", self.logprobs_mode, '"processed" with num_beams: beams are ranked by these')

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple it was resolved to."""
        return self.stop  # type: ignore[return-value]

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: the highest logit is taken."""
        return self.temperature == 0

    @property
    def num_sequences(self) -> int:
        """How many continuations are generated."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int:
        """How many alternatives' log-probabilities are needed, besides each chosen token's; -1 where not even that."""
        if self.logprobs is not None:
            return self.logprobs
        return 0 if self.num_sequences > self.n else -1

    @property
    def num_prompt_logprobs(self) -> int:
        """The same for the tokens of the prompt."""
        echoed = self.logprobs if self.echo else None
        return max((count for count in (self.prompt_logprobs, echoed) if count is not None), default=-1)

    @property
    def looks_at_tokens(self) -> bool:
        """Whether a built-in transform depends on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.dry_multiplier != 0
            or self.no_repeat_ngram_size != 0
        )


_TRUNCATIONS = (
    "top_p",
    "min_p",
    "typical_p",
    "top_n_sigma",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc_probability",
    "mirostat",
    "dynatemp_range",
)
_REPLACED_BY_MIROSTAT = (
    "top_n_sigma",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "xtc_probability",
)
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias, by rising id."""
    range_text = f"up to {MAX_LOGIT_BIASES} token ids, each with a number from -100 to 100"
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, (Mapping, Iterable)):
        raise refusal("logit_bias", value, range_text)
    pairs = value.items() if isinstance(value, Mapping) else list(value)
    if len(pairs) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"logit_bias must be {range_text}, not {len(pairs)} of them", param="logit_bias")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise refusal("logit_bias", pair, range_text)
        token_id = check_integer("logit_bias", pair[0], 0, INT32_MAX, range_text)
        if token_id in biases:
            raise InvalidRequestError(f"logit_bias has token id {token_id} twice", param="logit_bias")
        biases[token_id] = RealRange(-100, 100).check("logit_bias", pair[1])
    return tuple(sorted(biases.items()))


def _logits_processors(value: Any) -> tuple[LogitsProcessor, ...]:
    range_text = f"up to {MAX_LOGITS_PROCESSORS} functions of token ids and logits"
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal("logits_processors", value, f"a list of {range_text}")
    processors = tuple(value)
    if len(processors) > MAX_LOGITS_PROCESSORS:
        raise InvalidRequestError(
            f"logits_processors must be {range_text}, not {len(processors)} of them", param="logits_processors"
        )
    for processor in processors:
        if not callable(processor):
            raise InvalidRequestError(
                f"logits_processors must be {range_text}; {shown(processor)} cannot be called",
                param="logits_processors",
            )
    return processors


def _dola_layers(value: Any) -> str | tuple[int, ...] | None:
    if value is None or (isinstance(value, str) and value in ("low", "high")):
        return value
    range_text = f'"low", "high" or up to {MAX_DOLA_LAYERS} layers'
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal("dola_layers", value, range_text)
    layers = tuple(value)
    if not 1 <= len(layers) <= MAX_DOLA_LAYERS:
        raise InvalidRequestError(f"dola_layers must be {range_text}, not {len(layers)} of them", param="dola_layers")
    return tuple(sorted({check_integer("dola_layers", layer, 0, INT32_MAX) for layer in layers}))
