"""How many tokens to guess: as many as bring the most tokens a second, by what was accepted and what steps took."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListLike
from heapq import heapify, heappop, heapreplace
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from pellucid.core.sequence import Sequence

MARGIN = 0.05
"""By how much guessing must promise to be faster than not guessing: estimates err, and nothing is to be lost."""

PRIOR = 0.3
"""Acceptance that is assumed before anything is known."""

PRIOR_WEIGHT = 2.0
"""Guesses of its own that count for as much as what is known of others, for a sequence's acceptance."""

FADING = 0.95
"""What an observation still counts after the next one."""

PROBE_SHARE = 0.01
"""Share of the time that goes into trying out again what did not pay."""

NUM_SAMPLES = 5
"""Of the last so many steps of a size the median counts."""

STEP_MEMORY = 128
"""For how many steps a measured cost is believed: a machine gets busy, and contexts grow."""

FIRST_SLOPE = 0.1
"""What a further token costs at least, as a share of a step, where no step with as many tokens was measured."""

LEAST_SLOPE = 0.04
"""The same where one was: steps that something else held up make others look cheap."""


class Acceptance:
    """The probability that a guessed token is accepted, all before it having been: an estimate for each sequence, which
    leans on that of all while it is young, and forgets what was long ago."""

    def __init__(self) -> None:
        self._all = _Share(PRIOR)
        self._shares: dict[Sequence, _Share] = {}

    def estimate(self, sequence: Sequence) -> float:
        share = self._shares.get(sequence)
        if share is None:
            share = self._shares[sequence] = _Share(self._all.estimate)
        return share.estimate

    def learn(self, sequence: Sequence, num_accepted: int, num_drafts: int) -> None:
        """`num_drafts` tokens were guessed and the first `num_accepted` of them were right."""
        num_judged = min(num_drafts, num_accepted + 1)  # of those after a wrong one nothing is known
        self.estimate(sequence)
        for share in (self._shares[sequence], self._all):
            share.learn(num_accepted, num_judged)

    def forget(self, sequence: Sequence) -> None:
        self._shares.pop(sequence, None)


class _Share:
    __slots__ = ("_right", "_total")

    def __init__(self, prior: float) -> None:
        self._right = PRIOR_WEIGHT * prior
        self._total = PRIOR_WEIGHT

    @property
    def estimate(self) -> float:
        return self._right / self._total

    def learn(self, num_right: int, num_judged: int) -> None:
        faded = FADING**num_judged
        self._right = self._right * faded + num_right
        self._total = self._total * faded + num_judged


class StepCost:
    """Seconds that a step takes by how many tokens it computes: the median of the last few as they were measured, since
    now and then something else holds one up."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._learned_at: dict[int, int] = {}
        self._num_steps = 0

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens took `seconds`."""
        size = _rounded(num_tokens)
        if size not in self._samples or not self.knows(num_tokens):
            self._samples[size] = deque(maxlen=NUM_SAMPLES)
        samples = self._samples[size]
        samples.append(seconds)
        self._medians[size] = median_low(samples)
        self._num_steps += 1
        self._learned_at[size] = self._num_steps

    def knows(self, num_tokens: int) -> bool:
        """Whether a step of about so many tokens was measured lately."""
        learned_at = self._learned_at.get(_rounded(num_tokens))
        return learned_at is not None and self._num_steps - learned_at < STEP_MEMORY

    def estimate(self, fewest: int, most: int) -> NDArray[np.float64]:
        """Seconds of a step with each number of tokens from `fewest`, which is known, to `most`, rising."""
        sizes = sorted(size for size in self._medians if self.knows(size))
        seconds = np.maximum.accumulate([self._medians[size] for size in sizes])
        wanted = np.arange(fewest, most + 1)
        estimated: NDArray[np.float64] = np.interp(wanted, sizes, seconds)
        largest, slope = sizes[-1], float(seconds[-1]) * min(FIRST_SLOPE, 1 / sizes[-1])
        if len(sizes) > 1:
            slope = max(slope, float((seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])))
        estimated = np.where(wanted > largest, seconds[-1] + slope * (wanted - largest), estimated)
        least: NDArray[np.float64] = estimated[0] * (1 + least_slope(fewest) * (wanted - fewest))
        return np.maximum(least, estimated, out=least)


def least_slope(num_tokens: int) -> float:
    """What a further token in a step of so many costs at least, as a share of the step. A guess that is right with no
    more probability than `num_tokens` times that does not pay, however cheap steps seem."""
    return min(LEAST_SLOPE, 0.5 / num_tokens)


def _rounded(num_tokens: int) -> int:
    """`num_tokens` to four binary digits, so that near sizes are one."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift


def choose_lengths(
    acceptance: ListLike[float],
    limits: ListLike[int],
    num_sequences: int,
    seconds: ListLike[float] | NDArray[np.float64],
    draft_seconds: float = 0.0,
) -> list[int]:
    """How many tokens to guess of each sequence so that the whole step gives the most tokens a second.

    The j-th guess of a sequence whose guesses are accepted with probability p is one more token with probability p^j
    (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, arXiv:2211.17192). So the most
    promising guesses come first, whosesoever they are, and as many of them as pay.

    Args:
        acceptance: p of each sequence that may be drafted.
        limits: most guesses of each.
        num_sequences: in the step, those that may not be drafted included; each gives a token in any case.
        seconds: entry k is what the step takes with k guesses.
        draft_seconds: what making guesses takes, for each token of the longest.
    """
    promising = [(-p, index) for index, (p, limit) in enumerate(zip(acceptance, limits, strict=True)) if limit > 0]
    heapify(promising)
    lengths = [0] * len(limits)
    taken: list[int] = []
    best, best_rate = 0, (1 + MARGIN) * num_sequences / seconds[0]
    num_tokens, longest = float(num_sequences), 0
    while promising and len(taken) + 1 < len(seconds):
        probability, index = promising[0]
        num_tokens -= probability
        taken.append(index)
        lengths[index] += 1
        longest = max(longest, lengths[index])
        rate = num_tokens / (seconds[len(taken)] + draft_seconds * longest)
        if rate > best_rate:
            best, best_rate = len(taken), rate
        if lengths[index] < limits[index]:
            heapreplace(promising, (probability * acceptance[index], index))
        else:
            heappop(promising)
    lengths = [0] * len(limits)
    for index in taken[:best]:
        lengths[index] += 1
    return lengths
