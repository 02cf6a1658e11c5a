"""Contrastive search and guidance through the engine: all that a request may come with, and what is refused."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid import LLM, AsyncEngine
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.capture import CaptureParams
from pellucid.core.errors import CapacityError, ContextLengthError, EngineError, InvalidRequestError, QueueFullError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.engine.hidden_states import HiddenStates
from pellucid.engine.search.book import SearchBook
from tests.support.engines import load_fake_backend, make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.fake_tokenizer import ALPHABET
from tests.support.mutants import mutant
from tests.support.tiny_models import write_tiny_model
from tests.support.token_searches import CONTRASTIVE, GREEDY, GUIDED, PROMPT, answered, is_forgotten
from tests.support.tokenizers import byte_level_metadata

BOTH = pytest.mark.parametrize("params", [CONTRASTIVE, GUIDED], ids=["contrastive", "guided"])


@BOTH
def test_tokens_are_streamed_one_by_one(params: SamplingParams) -> None:
    engine = make_engine()
    whole = answered(engine, "whole", params)
    engine.add_request("streamed", PROMPT, params, stream=True)
    seen = []
    while engine.has_unfinished():
        seen.append(len(engine.step().tokens))
    assert max(seen) == 1
    assert engine.replies["streamed"].outputs == [whole]
    tokens = engine.tokens["streamed"]
    assert [token.token_id for token in tokens] == whole.token_ids
    assert "".join(token.text for token in tokens) == whole.text
    assert [token.finish_reason for token in tokens] == [None] * 8 + ["length"]
    assert tokens[-1].request_output is engine.replies["streamed"]


@BOTH
def test_stop_strings_and_stop_tokens_end_the_answer(params: SamplingParams) -> None:
    engine = make_engine()
    whole = answered(engine, "whole", params)
    text, tokens = whole.text, whole.token_ids
    for stream in (False, True):
        stopped = answered(engine, f"string {stream}", replace(params, stop=text[3:5]), stream=stream)
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (
            text[: text.find(text[3:5])],
            "stop",
            text[3:5],
        )
        stopped = answered(engine, f"token {stream}", replace(params, stop_token_ids=[tokens[4]]), stream=stream)
        assert stopped.token_ids == tokens[: tokens.index(tokens[4]) + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[4])


@BOTH
def test_one_token_is_enough(params: SamplingParams) -> None:
    engine = make_engine()
    whole = answered(engine, "whole", params)
    assert answered(engine, "one", replace(params, max_tokens=1)).token_ids == whole.token_ids[:1]


@BOTH
def test_the_answer_goes_to_the_end_of_the_context(params: SamplingParams) -> None:
    engine = make_engine(max_model_len=80)
    whole = answered(engine, "whole", replace(params, max_tokens=None))
    assert (len(whole.token_ids), whole.finish_reason) == (10, "length")
    if params is GUIDED:  # the longer of the two contexts ends it
        longer = replace(params, max_tokens=None, negative_prompt=[5] * 75)
        assert len(answered(engine, "longer", longer).token_ids) == 5
        assert len(answered(engine, "shorter", longer, prompt=PROMPT[:3]).token_ids) == 5


@BOTH
def test_an_abort_keeps_what_was_chosen(params: SamplingParams) -> None:
    engine = make_engine(max_num_batched_tokens=30)
    whole = answered(engine, "whole", params)
    for stream in (False, True):
        for steps in range(1, 9):
            name = f"{stream} {steps}"
            engine.add_request(name, PROMPT, params, stream=stream)
            for _ in range(steps):
                engine.step()
            engine.abort(name)
            (output,) = engine.replies[name].outputs
            assert output.finish_reason == "abort"
            assert output.token_ids == whole.token_ids[: len(output.token_ids)]
            assert output.text == whole.text[: len(output.token_ids)]
            if stream:
                assert engine.tokens[name][-1].request_output is engine.replies[name]
    assert len(engine.replies["True 8"].outputs[0].token_ids) > 2
    engine.scheduler.check_idle()


@BOTH
def test_a_step_that_fails_fails_those_alone_who_fail_alone(params: SamplingParams) -> None:
    backend = FakeBackend()
    engine = make_engine(backend=backend, enable_prefix_caching=False)
    whole = answered(engine, "whole", params)
    backend.fail_forwards = {backend.num_forwards + 3}  # with both in it; each is then computed alone
    engine.add_request("searched", PROMPT, params)
    engine.add_request("beside", PROMPT[:9], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    engine.run()
    assert engine.replies["searched"].outputs == [whole]
    assert engine.replies["beside"].error is None
    backend.fail_on = whole.token_ids[2]
    engine.add_request("failed", PROMPT, params, stream=True)
    engine.run()
    reply = engine.replies["failed"]
    assert reply.error is not None
    assert reply.outputs[0].finish_reason == "error"
    assert is_forgotten(engine)


@BOTH
def test_a_defect_leaves_nothing_behind(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request("lost", PROMPT, params, stream=True)
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(SearchBook, "advance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.step()
    monkeypatch.undo()
    (reply,) = engine.reset(caught.value).finished
    assert isinstance(reply.error, EngineError)
    assert reply.outputs[0].token_ids == [token.token_id for token in engine.tokens["lost"]]
    assert is_forgotten(engine)
    assert answered(engine, "next", params).finish_reason == "length"


@BOTH
def test_metrics_count_what_the_answer_took(params: SamplingParams) -> None:
    engine = make_engine()
    engine.add_request("0", PROMPT, params)
    engine.run()
    metrics = engine.replies["0"].metrics
    assert (metrics.prompt_tokens, metrics.output_tokens) == (70, 9)
    assert [len(times) for times in metrics.token_times] == [9]
    assert metrics.ttft is not None
    assert engine.metrics().counters.output_tokens == 9


def test_logprobs_are_those_of_the_candidates() -> None:
    engine = make_engine()
    plain = answered(engine, "plain", SamplingParams(max_tokens=1, temperature=0, logprobs=4))
    params = replace(CONTRASTIVE, logprobs=4, logprobs_mode="processed")
    searched = answered(engine, "searched", params)
    for entry, token_id in zip(searched.logprobs, searched.token_ids, strict=True):
        first = next(iter(entry))
        assert first == token_id
        assert entry[first].rank in (1, 2, 3, 4)
    assert sorted(searched.logprobs[0]) == sorted(plain.logprobs[0])
    assert all(searched.logprobs[0][token_id] == plain.logprobs[0][token_id] for token_id in plain.logprobs[0])


def test_candidates_are_taken_from_what_penalties_and_masks_leave() -> None:
    engine = make_engine()
    plain = answered(engine, "plain", CONTRASTIVE)
    banned = replace(CONTRASTIVE, banned_token_ids=plain.token_ids, min_tokens=9, ignore_eos=False)
    assert not set(answered(engine, "banned", banned).token_ids) & set(plain.token_ids)
    allowed = replace(CONTRASTIVE, allowed_token_ids=[4, 9], logprobs=2, logprobs_mode="processed")
    found = answered(engine, "allowed", allowed)
    assert set(found.token_ids) <= {4, 9}
    for entry in found.logprobs:
        assert sum(math.exp(logprob.logprob) for logprob in entry.values()) == pytest.approx(1)
    assert set(answered(engine, "biased", replace(CONTRASTIVE, logit_bias={5: 100})).token_ids) == {5}
    forced = replace(
        CONTRASTIVE, logits_processors=[lambda token_ids, logits: np.where(np.arange(61) == 8, logits, -np.inf)]
    )
    assert answered(engine, "forced", forced).token_ids == [8] * 9
    assert answered(engine, "penalized", replace(CONTRASTIVE, repetition_penalty=9.0)).token_ids != plain.token_ids


@pytest.mark.filterwarnings("ignore:the native core is not installed")
def test_answers_follow_a_grammar(tmp_path: Path) -> None:
    """Alone and batched with each other, whose grammars are at other places."""
    metadata = byte_level_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    model = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=size, extra_metadata=metadata)
    pattern = "(ab|cd){1,9}[x-z]{3}!"
    params = [
        replace(params, max_tokens=60, ignore_eos=False, structured_outputs=StructuredOutputsParams(regex=pattern))
        for params in (CONTRASTIVE, GUIDED, replace(GREEDY, dola_layers=[0]))
    ]
    with LLM(model, threads=1, max_model_len=200) as llm:
        alone = [llm.generate("a prompt", one)[0].outputs for one in params]
        together = llm.generate(["a prompt"] * len(params), params)
        assert [reply.outputs for reply in together] == alone
        for (output,) in alone:
            assert re.fullmatch(pattern, output.text), output
            assert output.finish_reason == "stop"


def test_guided_logprobs_are_those_of_both_together() -> None:
    engine = make_engine()
    params = replace(GUIDED, temperature=0, logprobs=3)
    for entry in answered(engine, "0", params).logprobs:
        assert next(iter(entry.values())).rank == 1
    assert answered(engine, "1", params).logprobs != answered(engine, "2", replace(params, guidance_scale=3.0)).logprobs


def test_a_prefix_that_a_search_computed_serves_others_and_not_the_next_search() -> None:
    engine = make_engine()
    whole = answered(engine, "first", CONTRASTIVE)
    plain = SamplingParams(max_tokens=2, temperature=0)
    answered(engine, "plain", plain)
    assert answered(engine, "second", CONTRASTIVE) == whole
    cached = {name: reply.metrics.cached_tokens for name, reply in engine.replies.items()}
    assert cached["first"] == cached["second"] == 0
    assert cached["plain"] >= 64
    answered(engine, "guided", GUIDED)
    assert engine.replies["guided"].metrics.cached_tokens >= 64


def test_nothing_is_captured_beside_searches_that_know_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each token of the context the hidden state is taken once, and of each candidate; of others nothing."""
    backend = FakeBackend()
    engine = make_engine(backend=backend, max_num_batched_tokens=40)
    seen: list[int] = []
    forward = backend.forward

    def watched(batch: ForwardBatch) -> ForwardOutput:
        sequences = () if batch.capture is None else batch.capture.sequences
        seen.append(sum(len(wanted.tokens) for wanted in sequences))
        return forward(batch)

    monkeypatch.setattr(backend, "forward", watched)
    answered(engine, "plain", SamplingParams(max_tokens=3, temperature=0))
    assert not any(seen)
    seen.clear()
    answered(engine, "searched", CONTRASTIVE)
    assert seen == [40, 30] + [4] * 9
    seen.clear()
    engine.add_request("preempted", PROMPT, CONTRASTIVE)
    for _ in range(5):
        engine.step()
    engine.scheduler.preempt_last()
    engine.run()
    assert engine.replies["preempted"].outputs == engine.replies["searched"].outputs
    assert sum(seen) == 70 + 9 * 4


def test_mutant_that_asks_for_what_is_known_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HiddenStates, "_want", mutant(HiddenStates._want, "max(begin, num_known)", "begin"))
    with pytest.raises(AssertionError):
        test_nothing_is_captured_beside_searches_that_know_their_context(monkeypatch)


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        (replace(CONTRASTIVE, top_k=9), "top_k", "at most 8 are computed at once"),
        (replace(GUIDED, negative_prompt=""), "negative_prompt", "negative_prompt: the prompt is empty"),
        (replace(GUIDED, negative_prompt=[VOCAB_SIZE]), "negative_prompt", "not in the vocabulary"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused(params: SamplingParams, param: str, message: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match=message) as error:
        engine.add_request("0", PROMPT, params)
    assert error.value.param == param
    assert not engine.has_unfinished()


@BOTH
def test_captures_are_refused(params: SamplingParams) -> None:
    with pytest.raises(InvalidRequestError, match="a capture is of one sequence") as error:
        make_engine().add_request("0", PROMPT, params, capture=CaptureParams(residual=True))
    assert error.value.param == "capture"


def test_processors_see_the_guided_logits_once() -> None:
    """And the tokens of the answer alone, whatever the negative prompt is."""
    calls: list[tuple[list[int], float]] = []

    def watch(token_ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        calls.append((token_ids, float(logits.max())))
        return logits

    engine = make_engine()
    plain = answered(engine, "plain", GUIDED)
    watched = answered(engine, "watched", replace(GUIDED, logits_processors=[watch], min_tokens=9))
    assert watched.token_ids == plain.token_ids
    assert [token_ids for token_ids, _ in calls] == [plain.token_ids[:count] for count in range(9)]
    guided = calls[0][1]
    calls.clear()
    answered(engine, "unguided", replace(GREEDY, logits_processors=[watch]))
    assert calls[0][1] != guided


def test_what_is_ruled_out_is_ruled_out_by_the_answer() -> None:
    engine = make_engine()
    plain = answered(engine, "plain", GUIDED)
    params = replace(GUIDED, banned_token_ids=plain.token_ids[:1], negative_prompt=[5] * 30)
    assert plain.token_ids[0] not in answered(engine, "banned", params).token_ids
    assert answered(engine, "long", replace(params, bad_words=["ab"])).finish_reason == "length"


def test_a_negative_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="negative_prompt: the prompt has 1024 tokens") as error:
        make_engine().add_request("0", PROMPT, replace(GUIDED, negative_prompt=[3] * 1024))
    assert error.value.param == "negative_prompt"


def test_one_place_is_too_few_for_guidance() -> None:
    with pytest.raises(InvalidRequestError, match="needs two sequences at once"):
        make_engine(max_num_seqs=1).add_request("0", PROMPT, GUIDED)


def test_a_search_that_the_pool_does_not_hold_is_refused() -> None:
    engine = make_engine(num_blocks=16, max_model_len=1000)
    with pytest.raises(CapacityError, match=r"4 sequences of up to 1001 tokens, .* there are 16") as error:
        engine.add_request("0", PROMPT, replace(CONTRASTIVE, max_tokens=None))
    assert error.value.param == "max_tokens"
    assert answered(engine, "1", CONTRASTIVE).finish_reason == "length"


@BOTH
def test_a_full_queue_keeps_nothing_of_a_search(params: SamplingParams) -> None:
    engine = make_engine(max_waiting=1)
    engine.add_request("0", PROMPT, GREEDY)
    with pytest.raises(QueueFullError):
        engine.add_request("1", PROMPT, params)
    assert is_forgotten(engine)


def test_the_last_token_is_the_negative_prompt_where_none_is_given() -> None:
    engine = make_engine()
    without = answered(engine, "without", replace(GUIDED, negative_prompt=None))
    assert without.token_ids == answered(engine, "last", replace(GUIDED, negative_prompt=PROMPT[-1:])).token_ids
    text = "".join(ALPHABET[token_id] for token_id in PROMPT[:5])
    as_text, as_ids = (replace(GUIDED, negative_prompt=negative) for negative in (text, PROMPT[:5]))
    assert answered(engine, "text", as_text).token_ids == answered(engine, "ids", as_ids).token_ids


@BOTH
def test_the_llm_and_the_async_engine_serve_them(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answered(make_engine(), "alone", params)
    load_fake_backend(monkeypatch)
    with LLM("any") as llm:
        for reply in llm.generate([PROMPT, PROMPT[:5], PROMPT], params)[::2]:
            assert reply.outputs == [wanted]
        assert [token.token_id for token in llm.stream(PROMPT, params)] == wanted.token_ids
        with pytest.raises(InvalidRequestError, match="negative_prompt"):
            llm.generate(PROMPT, replace(GUIDED, negative_prompt=[VOCAB_SIZE]))

    async def ask() -> tuple[list[int | None], Any]:
        async with AsyncEngine("any") as engine:
            tokens = [token.token_id async for token in engine.generate(PROMPT, params)]
            return tokens, await engine.complete(PROMPT, params)

    load_fake_backend(monkeypatch)
    tokens, reply = asyncio.run(ask())
    assert tokens == wanted.token_ids
    assert reply.outputs == [wanted]
