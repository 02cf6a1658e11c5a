"""What a request asks of the decoder. Names and meanings follow vLLM's where it has one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import INT32_MAX, UINT64_MAX, check_boolean, check_integer, check_real, refusal

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MIN_TEMPERATURE = 1e-4
MAX_TEMPERATURE = 1e4


def _stop_strings(value: Any) -> tuple[str, ...]:
    range_text = f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters each"
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, dict)) or not isinstance(value, Iterable):
        raise refusal("stop", value, range_text)
    strings = tuple(value)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop must be {range_text}, not {len(strings)} of them", param="stop")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise refusal("stop", string, range_text)
    return strings


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    range_text = f"up to {MAX_STOP_TOKEN_IDS} token ids"
    if value is None:
        return ()
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise refusal("stop_token_ids", value, range_text)
    ids = tuple(value)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids must be {range_text}, not {len(ids)} of them", param="stop_token_ids"
        )
    return tuple(check_integer("stop_token_ids", token_id, 0, INT32_MAX) for token_id in ids)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue one prompt. Immutable, checked when made.

    Attributes:
        max_tokens: the most tokens to generate; None generates until the context is full.
        temperature: divides the logits; 0 is greedy (the highest logit, the lowest id on a tie).
        top_k: keep the `top_k` most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities sum to `top_p` (Holtzman et al., 2020).
        min_p: drop tokens less probable than `min_p` times the most probable one (Nguyen et al., 2024).
        seed: the same seed draws the same tokens whatever else runs; None takes one from the LLM's seed.
        ignore_eos: go on past the model's end-of-sequence tokens.
        stop: strings that end the text; the text returned ends before the first one found.
        stop_token_ids: token ids that end the text.
        include_stop_str_in_output: leave the stop string, or the text of the token that stopped, in the text.
        logprobs: for each token report its log-probability and the `logprobs` most probable tokens; None for none.
            They are those of the model's own distribution, before any transform.
        n: how many continuations of the prompt to return; each draws its own numbers.
        min_tokens: no end-of-sequence or stop token may be chosen, and no stop string ends the text, before this many
            tokens.
        skip_special_tokens: leave control tokens out of the text.
        detokenize: turn tokens into text; without it, `text` is empty.

    Raises:
        InvalidRequestError: a value is of the wrong type or out of range; `param` names it.
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

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._set("max_tokens", check_integer("max_tokens", self.max_tokens, 1, INT32_MAX))
        temperature_range = f"0 (greedy) or a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}"
        temperature = check_real("temperature", self.temperature, temperature_range)
        if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise refusal("temperature", self.temperature, temperature_range)
        self._set("temperature", temperature)
        top_k_range = f"0 or -1 (keep all) or an integer up to {INT32_MAX}"
        self._set("top_k", max(0, check_integer("top_k", self.top_k, -1, INT32_MAX, top_k_range)))
        top_p = check_real("top_p", self.top_p, "a number over 0 and up to 1")
        if not 0 < top_p <= 1:
            raise refusal("top_p", self.top_p, "a number over 0 and up to 1")
        self._set("top_p", top_p)
        min_p = check_real("min_p", self.min_p, "a number from 0 to 1")
        if not 0 <= min_p <= 1:
            raise refusal("min_p", self.min_p, "a number from 0 to 1")
        self._set("min_p", min_p)
        if self.seed is not None:
            self._set("seed", check_integer("seed", self.seed, 0, UINT64_MAX, "None or an integer from 0 to 2^64 - 1"))
        if self.logprobs is not None:
            logprobs_range = f"None or an integer from 0 to {MAX_LOGPROBS}"
            self._set("logprobs", check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, logprobs_range))
        self._set("n", check_integer("n", self.n, 1, MAX_N))
        self._set("min_tokens", check_integer("min_tokens", self.min_tokens, 0, INT32_MAX))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            check_boolean(name, getattr(self, name))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop needs text to look at: leave detokenize true", param="stop")

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
