"""How much is guessed: what pays and no more, on a simulated machine whose steps take as long as they are told to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import SpeculativeConfig
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.speculative import adaptive, speculation
from pellucid.engine.speculative.adaptive import (
    FIRST_SLOPE,
    LEAST_SLOPE,
    MARGIN,
    STEP_MEMORY,
    Acceptance,
    StepCost,
    choose_lengths,
    least_slope,
)
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.ngram import NgramDrafter
from pellucid.engine.speculative.speculation import Speculation
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import make_engine
from tests.support.fake_backend import FakeBackend
from tests.support.mutants import mutant
from tests.support.sequences import make_sequence

VOCAB_SIZE = 300
NUM_TOKENS = 400
PROMPT_LENGTH = 300

SECONDS = ([1, 2, 4, 8, 16, 64], [4.1e-3, 4.4e-3, 5.6e-3, 10e-3, 20e-3, 66e-3])
"""What a step took with so many tokens, on two cores and SmolLM2 135M."""


class Machine:
    """A clock that steps and guesses move."""

    def __init__(self, noise: float = 0.05) -> None:
        self.now = 0.0
        self._noise = noise
        self._rng = random.Random(1)

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds * self._rng.lognormvariate(0, self._noise)


class Typist(FakeBackend):
    """Types the same text for every sequence, whatever it reads, and takes `seconds` for a step of so many tokens."""

    def __init__(self, text: list[int], machine: Machine, seconds: Callable[[int], float]) -> None:
        super().__init__(vocab_size=VOCAB_SIZE)
        self._text = np.array([*text, 0])
        self._machine = machine
        self._seconds = seconds

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        self._machine.work(self._seconds(batch.num_tokens))
        logits = np.zeros((len(batch.logits_rows), VOCAB_SIZE), np.float32)
        positions = np.minimum(batch.positions[batch.logits_rows] + 1, len(self._text) - 1)
        logits[np.arange(len(logits)), self._text[positions]] = 1
        return ForwardOutput(logits)

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        nothing = np.zeros((len(logits), 0), np.float32)
        return SampledTokens(logits.argmax(axis=1).astype(np.int32), nothing[:, :0].sum(axis=1), nothing, nothing)


class SlowDrafter(ScriptedDrafter):
    """Takes a part of a step for each token of its longest guess. Right from `right_from` on, and wrong before."""

    is_cheap = False

    def __init__(self, text: list[int], machine: Machine, seconds: float, right_from: int) -> None:
        super().__init__(VOCAB_SIZE, shorten=0)
        self._text, self._machine, self._seconds, self._right_from = text, machine, seconds, right_from

    def propose(self, sequences: list, max_tokens: list[int]) -> list[list[int]]:  # type: ignore[type-arg]
        guesses = []
        for sequence, most in zip(sequences, max_tokens, strict=True):
            begin = sequence.num_tokens
            coming = [*self._text[begin : begin + most], *[0] * most][:most]
            guesses.append(coming if begin >= self._right_from else [token ^ 1 for token in coming])
        self._machine.work(self._seconds * max(map(len, guesses)))
        return guesses


def two_cores(num_tokens: int) -> float:
    return float(np.interp(num_tokens, *SECONDS))


def random_text(length: int, seed: int = 2) -> list[int]:
    """Words as frequent as in a language: the n-th of them 1 / n times as often as the first."""
    rng = random.Random(seed)
    words = range(1, VOCAB_SIZE)
    return rng.choices(words, weights=[1 / word for word in words], k=length)


def edited_text() -> list[int]:
    """A prompt, and an answer that repeats it with one token in twenty changed."""
    rng = random.Random(4)
    prompt = random_text(PROMPT_LENGTH)
    return prompt + [rng.randrange(1, VOCAB_SIZE) if rng.random() < 0.05 else token for token in prompt + prompt[:100]]


def decode_seconds(
    text: list[int],
    make_drafter: Callable[[Machine], Drafter] | None,
    *,
    seconds: Callable[[int], float] = two_cores,
    num_requests: int = 1,
) -> float:
    machine = Machine()
    arguments = {}
    if make_drafter is not None:
        arguments = {"speculative": SpeculativeConfig("ngram"), "drafter": make_drafter(machine)}
    engine = make_engine(
        backend=Typist(text, machine, seconds),
        num_blocks=1 + 60 * num_requests,
        max_model_len=3500,
        max_num_seqs=num_requests,
        max_num_batched_tokens=512,
        clock=machine,
        **arguments,  # type: ignore[arg-type]
    )
    params = SamplingParams(
        max_tokens=len(text) - PROMPT_LENGTH, temperature=0, ignore_eos=True, detokenize=False, logprobs=None
    )
    for number in range(num_requests):
        engine.add_request(str(number), text[:PROMPT_LENGTH], params)
    engine.run()
    for reply in engine.replies.values():
        assert reply.outputs[0].token_ids == text[PROMPT_LENGTH:]
    times = [reply.metrics.token_times[0] for reply in engine.replies.values()]
    return max(each[-1] for each in times) - min(each[0] for each in times)


def gain(text: list[int], make_drafter: Callable[[Machine], Drafter], **arguments: object) -> float:
    """How many times as fast decoding is."""
    without = decode_seconds(text, None, **arguments)  # type: ignore[arg-type]
    return without / decode_seconds(text, make_drafter, **arguments)  # type: ignore[arg-type]


def lookup(machine: Machine) -> Drafter:
    return NgramDrafter(2, 4)


def adversary(machine: Machine) -> Drafter:
    return ScriptedDrafter(VOCAB_SIZE, shorten=0)


def test_an_edited_text_is_much_faster() -> None:
    assert gain(edited_text(), lookup) > 1.6


def check_that_nothing_is_lost() -> None:
    text = random_text(PROMPT_LENGTH + NUM_TOKENS)
    for make in (lookup, adversary):
        for num_requests in (1, 4, 16):
            assert gain(text, make, num_requests=num_requests) > 0.97, (make, num_requests)


def test_a_random_text_loses_nothing() -> None:
    check_that_nothing_is_lost()


def test_where_each_token_costs_as_much_as_the_first_nothing_is_guessed() -> None:
    assert gain(edited_text(), lookup, seconds=lambda num_tokens: 4e-3 * num_tokens) > 0.97


def test_a_slow_drafter_that_is_wrong_costs_little() -> None:
    text = random_text(PROMPT_LENGTH + 2000)
    assert gain(text, lambda machine: SlowDrafter(text, machine, 1e-3, len(text))) > 0.97


def check_that_it_is_tried_again() -> None:
    text = random_text(PROMPT_LENGTH + 3000)
    assert gain(text, lambda machine: SlowDrafter(text, machine, 0.3e-3, PROMPT_LENGTH + 500)) > 1.5


def test_a_slow_drafter_is_tried_again() -> None:
    check_that_it_is_tried_again()


def check_that_a_cheap_one_is_listened_to() -> None:
    """After a long text of which nothing could be guessed, everything can."""
    text = random_text(PROMPT_LENGTH + 600)
    text += text[PROMPT_LENGTH:]
    assert gain(text, lookup) > 1.3


def test_what_a_cheap_drafter_would_have_guessed_counts() -> None:
    check_that_a_cheap_one_is_listened_to()


def never_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptance, "learn", lambda *arguments: None)


def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "choose_lengths", lambda acceptance, limits, *rest: list(limits))


def never_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "FADING", 1.0)
    monkeypatch.setattr(Speculation, "learn", mutant(Speculation.learn, "elif (guess", "elif False and (guess"))


def never_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "PROBE_SHARE", 1e-9)


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (never_learn, check_that_nothing_is_lost),
        (always_guess, check_that_nothing_is_lost),
        (never_forget, check_that_a_cheap_one_is_listened_to),
        (never_try_again, check_that_it_is_tried_again),
    ],
)
def test_mutants_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# The parts


@pytest.mark.parametrize("seed", range(40))
def test_the_lengths_are_the_best_there_are(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 3)
    acceptance = [rng.random() for _ in range(count)]
    limits = [rng.randint(0, 4) for _ in range(count)]
    num_sequences = count + rng.randint(0, 2)
    seconds = list(itertools.accumulate([1.0] + [rng.random() / 2 for _ in range(rng.randint(1, 12))]))

    def rate(lengths: tuple[int, ...]) -> float:
        if sum(lengths) >= len(seconds):
            return 0.0
        gained = sum(p**place for p, length in zip(acceptance, lengths, strict=True) for place in range(1, length + 1))
        return (num_sequences + gained) / seconds[sum(lengths)]

    chosen = choose_lengths(acceptance, limits, num_sequences, seconds)
    best = max(map(rate, itertools.product(*(range(limit + 1) for limit in limits))))
    none = rate((0,) * count)
    if best <= (1 + MARGIN) * none:
        assert chosen == [0] * count
    else:
        assert rate(tuple(chosen)) == pytest.approx(best)


def test_what_guessing_takes_counts() -> None:
    assert choose_lengths([0.9], [4], 1, [1.0] * 5) == [4]
    assert choose_lengths([0.9], [4], 1, [1.0] * 5, draft_seconds=1.0) == [0]
    assert 0 < choose_lengths([0.9], [4], 1, [1.0] * 5, draft_seconds=0.55)[0] < 4


def test_the_cost_of_a_step_is_what_was_measured() -> None:
    cost = StepCost()
    assert not cost.knows(1)
    cost.learn(1, 4.0)
    assert cost.knows(1)
    assert not cost.knows(2)
    assert cost.estimate(1, 3).tolist() == pytest.approx([4, 4 * (1 + FIRST_SLOPE), 4 * (1 + 2 * FIRST_SLOPE)])
    cost.learn(5, 8.0)
    assert cost.estimate(1, 7).tolist() == pytest.approx([4, 5, 6, 7, 8, 9, 10])
    for seconds in (6.0, 600.0, 6.0, 6.2, 6.0, 1.0):  # something else held one up
        cost.learn(5, seconds)
    assert cost.estimate(1, 5).tolist() == pytest.approx([4, 4.5, 5, 5.5, 6])
    for _ in range(STEP_MEMORY):
        cost.learn(1, 4.0)
    assert not cost.knows(5)
    assert cost.estimate(1, 5)[-1] == pytest.approx(4 * (1 + 4 * FIRST_SLOPE))


def test_a_step_of_more_tokens_never_seems_to_cost_less() -> None:
    cost = StepCost()
    for num_tokens, seconds in ((1, 5.0), (2, 4.0), (40, 30.0), (43, 28.0)):
        cost.learn(num_tokens, seconds)
    assert (np.diff(cost.estimate(1, 60)) >= 0).all()


def test_a_step_that_was_held_up_makes_no_other_look_free() -> None:
    cost = StepCost()
    cost.learn(1, 9.0)
    cost.learn(5, 8.0)
    estimated = cost.estimate(1, 9)
    assert estimated[:5].tolist() == pytest.approx([9 * (1 + LEAST_SLOPE * further) for further in range(5)])
    assert estimated[8] == pytest.approx(9 * (1 + FIRST_SLOPE * 4))
    assert choose_lengths([0.1], [16], 1, cost.estimate(1, 17)) == [1]


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 40])
def test_what_cannot_pay_is_known_before_costs_are_asked_for(num_tokens: int) -> None:
    cost = StepCost()
    cost.learn(num_tokens, 1.0)
    cost.learn(num_tokens + 16, 1.0)  # as cheap as it gets
    seconds = cost.estimate(num_tokens, num_tokens + 8)
    probability = num_tokens * least_slope(num_tokens)
    assert choose_lengths([probability] * 3, [4] * 3, num_tokens, seconds) == [0] * 3


def test_acceptance_is_learned_and_forgotten() -> None:
    acceptance, sequence, other = Acceptance(), make_sequence([1]), make_sequence([2])
    rng = random.Random(3)
    for share in (0.9, 0.2):
        estimates = []
        for _ in range(400):
            right = next((place for place in range(4) if rng.random() > share), 4)
            acceptance.learn(sequence, right, 4)
            estimates.append(acceptance.estimate(sequence))
        assert sum(estimates[-300:]) / 300 == pytest.approx(share, abs=0.05)
    assert acceptance.estimate(other) == pytest.approx(acceptance._all.estimate), "one that is new is as all have been"
    acceptance.forget(sequence)
    acceptance.forget(other)
    assert not acceptance._shares
