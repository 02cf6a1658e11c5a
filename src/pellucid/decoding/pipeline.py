"""Every built-in transform of a row of logits, in the published order (docs/decoding.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import SamplingBatch
from pellucid.decoding import mirostat, penalties, rng, temperature, token_mask, truncation
from pellucid.decoding.distribution import Logits

_NO_TOKENS = np.empty(0, dtype=np.int32)
_NO_BIAS = (_NO_TOKENS, np.empty(0, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How to choose the token of one row: an entry of a `SamplingBatch`, whose attributes it has.

    Attributes:
        record: of SAMPLING_DTYPE; `row[name]` is one value of it as a Python number.
        mask: None where every token may be chosen.
    """

    record: np.void
    tokens: NDArray[np.int32] = field(default_factory=lambda: _NO_TOKENS)
    bias: tuple[NDArray[np.int32], NDArray[np.float32]] = _NO_BIAS
    mask: NDArray[np.uint32] | None = None
    dry_breakers: NDArray[np.int32] = field(default_factory=lambda: _NO_TOKENS)

    @classmethod
    def of(cls, sampling: SamplingBatch, row: int) -> RowSampling:
        def entry(column: list[Any] | None, absent: Any) -> Any:
            return absent if column is None or column[row] is None else column[row]

        return cls(
            sampling.rows[row],
            tokens=entry(sampling.tokens, _NO_TOKENS),
            bias=entry(sampling.bias, _NO_BIAS),
            mask=entry(sampling.masks, None),
            dry_breakers=entry(sampling.dry_breakers, _NO_TOKENS),
        )

    def __getitem__(self, name: str) -> Any:
        return self.record[name].item()

    def draw_bits(self, stream: int = rng.STREAM_SAMPLE) -> int:
        """The 64 random bits of this sequence and position for one purpose."""
        return rng.draw_bits(self["seed"], self["sequence_index"], self["position"], stream)


Transform = Callable[[Logits, RowSampling], Logits]


def _frequency_and_presence_penalty(logits: Logits, row: RowSampling) -> Logits:
    output = row.tokens[row["num_prompt_tokens"] :]
    return penalties.frequency_and_presence_penalty(logits, output, row["frequency_penalty"], row["presence_penalty"])


def _dry(logits: Logits, row: RowSampling) -> Logits:
    return penalties.dry(
        logits,
        row.tokens,
        multiplier=row["dry_multiplier"],
        base=row["dry_base"],
        allowed_length=row["dry_allowed_length"],
        last_n=row["dry_penalty_last_n"],
        breakers=row.dry_breakers,
    )


def _no_repeat_ngram(logits: Logits, row: RowSampling) -> Logits:
    return token_mask.without(logits, token_mask.repeated_ngrams(row.tokens, row["no_repeat_ngram_size"]))


def _temperature(logits: Logits, row: RowSampling) -> Logits:
    return temperature.dynamic_temperature(logits, row["temperature"], row["dynatemp_range"], row["dynatemp_exponent"])


def _xtc(logits: Logits, row: RowSampling) -> Logits:
    if rng.uniform(row.draw_bits(rng.STREAM_XTC)) >= row["xtc_probability"]:
        return logits
    return truncation.xtc(logits, row["xtc_threshold"])


def _mirostat(logits: Logits, row: RowSampling) -> Logits:
    version = mirostat.mirostat_v1 if row["mirostat"] == 1 else mirostat.mirostat_v2
    return version(logits, row["mirostat_mu"])


CONSTRAINTS: dict[str, Transform] = {
    "logit_bias": lambda logits, row: penalties.logit_bias(logits, *row.bias),
    "repetition_penalty": lambda logits, row: penalties.repetition_penalty(
        logits, row.tokens, row["repetition_penalty"]
    ),
    "frequency_penalty": _frequency_and_presence_penalty,
    "dry_multiplier": _dry,
    "mask": lambda logits, row: logits if row.mask is None else token_mask.apply_mask(logits, row.mask),
    "no_repeat_ngram_size": _no_repeat_ngram,
}
"""For greedy and sampled rows alike, each by its first parameter. Nothing may be left after them."""

WARPERS: dict[str, Transform] = {
    "temperature": _temperature,
    "top_n_sigma": lambda logits, row: truncation.top_n_sigma(logits, row["top_n_sigma"]),
    "top_k": lambda logits, row: truncation.top_k(logits, row["top_k"]),
    "top_p": lambda logits, row: truncation.top_p(logits, row["top_p"]),
    "min_p": lambda logits, row: truncation.min_p(logits, row["min_p"]),
    "typical_p": lambda logits, row: truncation.typical_p(logits, row["typical_p"]),
    "epsilon_cutoff": lambda logits, row: truncation.epsilon_cutoff(logits, row["epsilon_cutoff"]),
    "eta_cutoff": lambda logits, row: truncation.eta_cutoff(logits, row["eta_cutoff"]),
    "xtc_probability": _xtc,
}
"""For sampled rows. Something is always left after each."""

MIROSTAT_WARPERS: dict[str, Transform] = {"temperature": _temperature, "mirostat": _mirostat}
"""In place of `WARPERS` where `mirostat` is not 0."""


def constrain(logits: Logits, row: RowSampling) -> Logits:
    """The row after bias, penalties and masks."""
    for transform in CONSTRAINTS.values():
        logits = transform(logits, row)
    return logits


def warp(logits: Logits, row: RowSampling) -> Logits:
    """What `constrain` gave, after temperature and truncations: the distribution that is drawn from. Greedy leaves it
    as it is."""
    if row["temperature"] == 0:
        return logits
    for transform in (MIROSTAT_WARPERS if row["mirostat"] else WARPERS).values():
        logits = transform(logits, row)
    return logits
