"""Guessing ahead as the engine does it: whose tokens, at whose cost, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pellucid import LLM, AsyncEngine, CaptureParams, InvalidRequestError, SamplingParams, SpeculativeConfig
from pellucid.core.config import BLOCK_SIZE, num_blocks_for
from pellucid.core.trace import SpeculationVerdict, StepDone
from pellucid.decoding import rng
from pellucid.engine.speculative.drafter import Drafter
from pellucid.engine.speculative.lookahead import LookaheadDrafter
from pellucid.engine.speculative.ngram import NgramDrafter
from pellucid.kvcache.cache_manager import CacheManager
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import CheckedEngine, answer_alone, load_fake_backend, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer

PROMPT = [(7 * index * index + 3) % VOCAB_SIZE for index in range(100)]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, seed=9)


class Events(list[Any]):
    def emit(self, event: Any) -> None:
        self.append(event)


def guessing_engine(drafter: Drafter, num_draft_tokens: int = 4, **arguments: Any) -> CheckedEngine:
    config = SpeculativeConfig("ngram", num_draft_tokens, adaptive=False)
    return make_engine(speculative=config, drafter=drafter, **arguments)


def oracle(*params: SamplingParams, prompt: list[int] = PROMPT, wrong: float = 0.0) -> ScriptedDrafter:
    """A drafter that knows what `prompt` is answered with."""
    truth = {
        (each.seed or 0, output.index): output.token_ids
        for each in params
        for output in answer_alone(prompt, each, seed=0).outputs
    }
    return ScriptedDrafter(VOCAB_SIZE, truth, wrong=wrong, shorten=0)


def test_a_right_guess_saves_a_step() -> None:
    backend = FakeBackend()
    engine = guessing_engine(oracle(GREEDY), backend=backend)
    engine.add_request("a", PROMPT, GREEDY)
    engine.run()
    assert engine.replies["a"].outputs == answer_alone(PROMPT, GREEDY, seed=0).outputs
    assert backend.num_forwards == 1 + 59 // 5 + 1, "a prefill, and 60 tokens of which the first came with it"
    metrics = engine.replies["a"].metrics
    assert metrics.draft_tokens == metrics.accepted_tokens == 59 - 12
    assert metrics.acceptance_rate == 1


def test_tokens_are_counted_as_what_they_are() -> None:
    engine = guessing_engine(oracle(GREEDY, wrong=0.3))
    engine.add_request("a", PROMPT, GREEDY)
    engine.run()
    request, metrics = engine.replies["a"].metrics, engine.metrics()
    counters = metrics.counters
    assert 0 < request.accepted_tokens < request.draft_tokens
    assert (request.draft_tokens, request.accepted_tokens) == (counters.draft_tokens, counters.accepted_tokens)
    assert metrics.acceptance_rate == request.acceptance_rate == request.accepted_tokens / request.draft_tokens
    assert counters.output_tokens == request.output_tokens == 60
    assert counters.computed_tokens == 100 + 59 - request.accepted_tokens + request.draft_tokens
    assert metrics.prefill_tokens == request.prefill_tokens == 100
    assert metrics.step_times.draft > 0
    assert len(request.token_times[0]) == 60


@pytest.mark.parametrize(
    ("params", "capture"),
    [
        (SamplingParams(temperature=0, max_tokens=20, speculative=False), None),
        (SamplingParams(temperature=0, max_tokens=20), CaptureParams(residual=[0])),
    ],
)
def test_who_is_not_guessed_for(params: SamplingParams, capture: CaptureParams | None) -> None:
    drafter = ScriptedDrafter(VOCAB_SIZE)
    engine = guessing_engine(drafter)
    engine.add_request("a", PROMPT, params, capture=capture)
    engine.run()
    assert drafter.num_asked == engine.metrics().counters.draft_tokens == 0


def test_streamed_tokens_come_one_by_one_and_in_order() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, seed=9, stop=["zq", "D"], logprobs=2)
    alone = answer_alone(PROMPT, params, seed=0).outputs[0]
    engine = guessing_engine(oracle(params, wrong=0.2))
    engine.add_request("a", PROMPT, params, stream=True)
    engine.run()
    tokens = engine.tokens["a"]
    assert [token.token_id for token in tokens] == alone.token_ids
    assert "".join(token.text for token in tokens) == alone.text
    assert [token.logprobs for token in tokens] == alone.logprobs
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [alone.finish_reason]


def test_nobody_gives_way_for_a_guess() -> None:
    """Guesses that are all wrong leave every step as it was, the blocks held after it and the preemptions too."""

    def blocks_held(drafter: Drafter | None) -> tuple[list[list[int]], int]:
        arguments: dict[str, Any] = {"num_blocks": 9, "max_model_len": 320, "max_num_batched_tokens": 64}
        engine = make_engine(**arguments) if drafter is None else guessing_engine(drafter, 30, **arguments)
        for number in range(5):
            params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, banned_token_ids=[1])
            engine.add_request(str(number), PROMPT[: 20 * number + 1], params)
        held = []
        while engine.has_unfinished():
            engine.step()
            held.append([sequence.num_blocks for sequence in engine.scheduler.running])
        return held, engine.metrics().counters.preemptions

    class Wrong(ScriptedDrafter):
        def _guess(self, sequence: Any, most: int) -> list[int]:
            return [1] * most

    wanted = blocks_held(None)
    assert wanted[1] > 0
    assert blocks_held(Wrong(VOCAB_SIZE)) == wanted


def check_blocks(drafter: Drafter) -> None:
    engine = guessing_engine(drafter, 20, windows=(None, 70))
    for number in range(3):
        engine.add_request(str(number), PROMPT[: 30 * number + 5], SamplingParams(max_tokens=200, seed=number, n=2))
    while engine.has_unfinished():
        engine.step()
        for sequence in engine.scheduler.running:
            assert not sequence.draft_token_ids
            assert len(sequence.block_tables[0]) == num_blocks_for(sequence.num_computed_tokens)
            assert sequence.num_registered_blocks <= sequence.num_computed_tokens // BLOCK_SIZE
    assert engine.metrics().counters.draft_tokens > 500


def test_blocks_that_only_wrong_guesses_needed_go_back() -> None:
    check_blocks(ScriptedDrafter(VOCAB_SIZE))


def test_mutant_that_keeps_them_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheManager, "give_back", lambda *arguments: None)
    with pytest.raises(AssertionError):
        check_blocks(ScriptedDrafter(VOCAB_SIZE))


def test_a_guess_that_cannot_be_computed_fails_nobody() -> None:
    """Law 1: whatever a guess does to the model, the answer is the one without it."""
    backend = FakeBackend()
    wanted = answer_alone(PROMPT, GREEDY, seed=0)
    backend.fail_on = next(token for token in range(VOCAB_SIZE) if token not in PROMPT + wanted.outputs[0].token_ids)

    class Poisonous(ScriptedDrafter):
        def _guess(self, sequence: Any, most: int) -> list[int]:
            return [backend.fail_on] * most  # type: ignore[list-item]

    engine = guessing_engine(Poisonous(VOCAB_SIZE), backend=backend)
    for name in ("a", "b"):
        engine.add_request(name, PROMPT, GREEDY)
    engine.run()
    assert engine.replies["a"].outputs == engine.replies["b"].outputs == wanted.outputs
    assert engine.metrics().counters.draft_tokens == 0


def test_a_failing_request_fails_beside_guesses_too() -> None:
    backend = FakeBackend()
    engine = guessing_engine(oracle(GREEDY), backend=backend)
    wanted = answer_alone(PROMPT, GREEDY, seed=0).outputs
    backend.fail_on = next(token for token in range(VOCAB_SIZE) if token not in PROMPT + wanted[0].token_ids)
    engine.add_request("good", PROMPT, GREEDY)
    engine.step()
    engine.add_request("bad", [backend.fail_on, 1, 2], GREEDY)
    engine.run()
    assert engine.replies["bad"].error is not None
    assert engine.replies["good"].outputs == wanted


def test_a_drafter_hears_what_was_chosen_and_who_has_ended() -> None:
    drafter = oracle(GREEDY, wrong=0.3)
    engine = guessing_engine(drafter)
    engine.add_request("a", PROMPT, GREEDY)
    engine.add_request("gone", PROMPT[:5], SamplingParams(n=2, max_tokens=500, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.abort("gone")
    assert [sequence.group.request_id for sequence in drafter.forgotten] == ["gone", "gone"]
    engine.run()
    assert drafter.forgotten[-1].group.request_id == "a"
    answer = answer_alone(PROMPT, GREEDY, seed=0).outputs[0].token_ids
    observed = [(drafts, chosen) for sequence, drafts, chosen in drafter.observed if sequence.group.request_id == "a"]
    told = 1
    for drafts, chosen in observed:
        right = 0
        while right < len(drafts) and drafts[right] == chosen[right]:
            right += 1
        assert chosen[: right + 1] == answer[told : told + right + 1]
        told += right + 1
    engine.add_request("reset", PROMPT, GREEDY)
    engine.step()
    engine.reset(ZeroDivisionError())
    assert drafter.forgotten[-1].group.request_id == "reset"


def test_a_step_tells_of_guesses() -> None:
    events = Events()
    engine = guessing_engine(oracle(GREEDY), trace=events)
    engine.add_request("a", PROMPT, GREEDY)
    engine.run()
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [step.num_draft_tokens for step in steps] == [0] + [4] * 11 + [3]
    assert [step.num_sampled_tokens for step in steps] == [1] + [5] * 11 + [4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_verdicts_tell_what_spoke_for_each_guess(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=9, max_tokens=60, ignore_eos=True, seed=9, banned_token_ids=[4, 5]
    )
    events = Events()
    engine = guessing_engine(oracle(params, wrong=0.3), trace=events)
    engine.add_request("a", PROMPT, params)
    engine.run()
    answer = answer_alone(PROMPT, params, seed=0).outputs[0].token_ids
    assert answer == engine.replies["a"].outputs[0].token_ids
    verdicts = [event for event in events if isinstance(event, SpeculationVerdict)]
    assert sum(len(verdict.draft_token_ids) for verdict in verdicts) == engine.metrics().counters.draft_tokens
    assert sum(verdict.num_accepted for verdict in verdicts) == engine.metrics().counters.accepted_tokens > 0
    for verdict in verdicts:
        begin, drafts = verdict.position - len(PROMPT), verdict.draft_token_ids
        count = verdict.num_accepted
        assert (verdict.request_id, verdict.index) == ("a", 0)
        assert len(verdict.target_probabilities) == len(verdict.draft_probabilities) == len(drafts)
        assert len(verdict.chosen_token_ids) == 1 + len(drafts)
        assert verdict.chosen_token_ids[: count + 1] == answer[begin : begin + count + 1]
        assert drafts[:count] == verdict.chosen_token_ids[:count]
        assert count == len(drafts) or drafts[count] != verdict.chosen_token_ids[count]
        context = PROMPT + answer[:begin] + drafts
        rows = engine.alone.logits(context)[-1 - len(drafts) : -1].astype(np.float64)
        expected = [distribution(row, 9 if temperature else 1)[draft] for row, draft in zip(rows, drafts, strict=True)]
        assert verdict.target_probabilities == pytest.approx(expected, abs=1e-6)
        if temperature:
            assert verdict.draws == [
                rng.uniform(rng.draw_bits(9, 0, verdict.position + place)) for place in range(1 + len(drafts))
            ]
        else:
            assert verdict.draws is None


def distribution(logits: Any, top_k: int) -> Any:
    """Probabilities of the `top_k` highest logits but those of tokens 4 and 5."""
    logits[[4, 5]] = -np.inf
    logits[np.argsort(-logits)[top_k:]] = -np.inf
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def test_llm_and_async_engine_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "abcabcabc"
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    wanted = answer_alone(FakeTokenizer().encode(prompt), params, seed=0).outputs
    for speculative, kind in (("ngram", NgramDrafter), ("lookahead", LookaheadDrafter)):
        load_fake_backend(monkeypatch)
        with LLM("fake", speculative=speculative) as llm:  # type: ignore[arg-type]
            assert isinstance(llm._engine._drafter, kind)
            assert llm.generate(prompt, params)[0].outputs == wanted
    config = SpeculativeConfig("ngram", 3, adaptive=False, prompt_lookup_min=1)
    load_fake_backend(monkeypatch)
    with LLM("fake", speculative=config) as llm:
        assert llm.config.speculative is config
        reply = llm.generate(prompt, params)[0]
        assert reply.outputs == wanted
        assert reply.metrics.draft_tokens > 0

    load_fake_backend(monkeypatch)

    async def answer() -> Any:
        async with AsyncEngine("fake", speculative=config) as engine:
            return [token async for token in engine.generate(prompt, params)][-1].request_output

    reply = asyncio.run(answer())
    assert reply.outputs == wanted
    assert reply.metrics.draft_tokens > 0


@pytest.mark.parametrize("make", [LLM, AsyncEngine])
@pytest.mark.parametrize("speculative", ["magic", 3, {"method": "ngram"}])
def test_what_is_no_method_is_refused(make: Callable[..., Any], speculative: Any) -> None:
    with pytest.raises(InvalidRequestError, match="speculative must be"):
        make("fake", speculative=speculative)
